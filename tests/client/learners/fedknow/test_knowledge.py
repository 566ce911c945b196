"""The extractor: which weights are kept, that pruned ones are exactly zero, and that nothing is
lost in storage."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.learners.fedknow.knowledge import (
    FineTuning,
    Knowledge,
    extract,
    prunable,
    top_fraction,
)
from fedknow.client.state import load_state, save_state


def take(model, task, rho=0.25, epochs=2, seed=3):
    tuning = FineTuning(epochs, batch_size=8, lr=1e-2, seed=seed)
    return extract(model, task.train, task.classes, rho, tuning)


def test_largest_weights_over_all_layers_by_hand():
    a, b = (
        torch.tensor([[0.1, -5.0], [0.2, 0.3]]),
        torch.tensor([[4.0, -0.4, 0.05, 0.0]]),
    )
    masks = top_fraction([a, b], 0.375)  # three of eight: -5, 4, -0.4
    assert masks[0].tolist() == [[False, True], [False, False]]
    assert masks[1].tolist() == [[True, True, False, False]]


def test_many_zeros_do_not_make_a_mask_of_everything():
    weights = torch.zeros(100)
    weights[:3] = 1.0
    (mask,) = top_fraction([weights], 0.1)
    assert int(mask.sum()) == 10
    assert mask[:3].all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.001, 1.0), st.integers(1, 300))
def test_fraction_is_kept_exactly_and_nothing_larger_is_left_out(seed, rho, size):
    weights = torch.randn(
        size, generator=torch.Generator().manual_seed(seed)
    ).round(decimals=1)  # with ties
    (mask,) = top_fraction([weights], rho)
    assert int(mask.sum()) == max(1, round(rho * size))
    if not mask.all():
        assert weights[mask].abs().min() >= weights[~mask].abs().max()


@pytest.mark.parametrize("norm", [False, True])
def test_pruned_weights_stay_exactly_zero_through_fine_tuning(
    tiny_model, tiny_task, norm
):
    model = tiny_model(norm=norm)
    weights = list(prunable(model.body).values())
    masks = top_fraction(weights, 0.25)
    before = [weight.detach().clone() for weight in weights]
    knowledge = take(model, tiny_task(0))
    for weight, mask, old in zip(weights, masks, before, strict=True):
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != old[mask]).any()  # the others were fine-tuned
    assert len(knowledge.values) == sum(int(mask.sum()) for mask in masks)


def test_without_fine_tuning_the_values_are_the_models_own(tiny_model, tiny_task):
    model = tiny_model()
    flat = torch.cat(
        [weight.detach().flatten() for weight in prunable(model.body).values()]
    )
    knowledge = take(model, tiny_task(0), epochs=0)
    places = np.flatnonzero(np.unpackbits(knowledge.mask.numpy())[: len(flat)])
    assert torch.equal(knowledge.values, flat[torch.from_numpy(places)])


@pytest.mark.parametrize("norm", [False, True])
def test_knowledge_answers_as_the_pruned_model_did(tiny_model, tiny_task, norm):
    model, task = tiny_model(norm=norm), tiny_task(1)
    knowledge = take(model, task)
    with torch.no_grad():
        expected = model.eval()(task.test.x)[:, list(task.classes)]
    other = tiny_model(
        seed=9, norm=norm
    )  # another body, whose own weights must not shine through
    # Up to rounding: matrix products of other sizes (batches of 7, a slice of the head) may sum
    # in another order.
    torch.testing.assert_close(
        knowledge.logits(other.body, task.test.x, 7),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )


def test_size_is_a_bit_a_weight_and_the_kept_values(tiny_model, tiny_task):
    model = tiny_model()
    total = sum(weight.numel() for weight in prunable(model.body).values())
    knowledge = take(model, tiny_task(0))
    kept = round(0.25 * total)
    biases = 3 + 8
    assert knowledge.nbytes == -(-total // 8) + 4 * (kept + biases + 2 * 8 + 2)


def test_round_trip_through_a_file_is_exact(tiny_model, tiny_task, tmp_path):
    knowledge = take(tiny_model(norm=True), tiny_task(2))
    save_state(
        tmp_path / "state.safetensors",
        {"knowledge": {"2": knowledge.state_dict()}},
    )
    again = Knowledge.from_state(
        load_state(tmp_path / "state.safetensors")["knowledge"]["2"]
    )
    x = tiny_task(0).test.x
    body = tiny_model(norm=True).body
    assert again.classes == knowledge.classes
    assert torch.equal(again.logits(body, x, 5), knowledge.logits(body, x, 5))


def test_same_seed_same_knowledge(tiny_model, tiny_task):
    a, b = take(tiny_model(), tiny_task(0)), take(tiny_model(), tiny_task(0))
    assert torch.equal(a.values, b.values)
    assert not torch.equal(
        a.values, take(tiny_model(), tiny_task(0), seed=4).values
    )
