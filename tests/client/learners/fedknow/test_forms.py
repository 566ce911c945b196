"""Lighter forms of knowledge: what each keeps, its bytes, and that it answers as it was stored."""

import math

import pytest
import torch
from torch import nn

from fedknow.client.learners.fedknow.finetuning import FineTuning
from fedknow.client.learners.fedknow.forms import (
    Filters,
    Int8,
    LowRank,
    distinct_filters,
    form_of,
    rank_for,
    read_knowledge,
)
from fedknow.client.learners.fedknow.knowledge import (
    Magnitude,
    extract,
    prunable,
)
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import Round
from fedknow.client.state import load_state, save_state
from fedknow.protocols.config import TrainConfig

FORMS = {
    "magnitude": Magnitude(0.25),
    "int8": Int8(0.25),
    "filters": Filters(0.25),
    "low-rank": LowRank(0.9),
}
WHOLE = (3 + 8) * 4 + 2 * (8 + 1) * 4
"""Bytes of the tiny model's biases and two rows of its head."""


def take(model, task, form, epochs=3):
    tuning = FineTuning(epochs, 8, 1e-2, seed=3)
    return extract(model, task.train, task.classes, form, tuning)


def body_of(knowledge, tiny_model):
    body = tiny_model(seed=9).body
    knowledge.restore_into(body)
    return body


def test_bytes_by_hand():
    """Weights (4, -2, 1) over a scale of 4 / 127: 127, -63.5 and 31.75, the second to even."""
    weight = nn.Parameter(torch.tensor([[4.0, -2.0, 1.0, 0.5]]))
    form = Int8(0.75)
    shaped = form.shape([weight])
    assert weight.tolist() == [[4.0, -2.0, 1.0, 0.0]]
    stored = form.store([weight], shaped, nothing)
    assert stored.values.tolist() == [127, -64, 32]
    assert stored.scales.item() == pytest.approx(4 / 127)
    expected = [4.0, -64 * 4 / 127, 32 * 4 / 127, 0.0]
    assert stored.flat([weight]).tolist() == pytest.approx(expected)
    assert stored.nbytes == 1 + 3 + 4


def nothing():
    """Knowledge of a model without biases and head."""
    empty = torch.zeros(0)
    state = {
        "classes": [],
        "mask": empty.to(torch.uint8),
        "values": empty,
        "whole": {},
        "head_weight": empty,
        "head_bias": empty,
    }
    return read_knowledge(state)


def test_filters_by_hand():
    """Of 0, 1 and 5 the sums of distances are 6, 5 and 9."""
    rows = torch.tensor([[0.0], [1.0], [5.0]])
    assert distinct_filters(rows, 0.34).tolist() == [False, False, True]
    assert distinct_filters(rows, 0.67).tolist() == [True, False, True]
    assert distinct_filters(rows, 0.01).sum() == 1
    weight = nn.Parameter(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 9.0]]))
    form = Filters(0.34)
    stored = form.store([weight], form.shape([weight]), nothing)
    assert stored.values.tolist() == [0.0, 9.0]
    assert stored.flat([weight]).tolist() == [0, 0, 0, 0, 0, 9]
    assert stored.nbytes == 1 + 2 * 4


def test_rank_by_hand():
    """Singular values 3, 1 and 0 of ten inputs: energy 9, then 10 of 10."""
    weight = torch.zeros(3, 10)
    weight[0, 0], weight[1, 1] = 3.0, 1.0
    assert rank_for(weight, 0.89) == 1
    assert rank_for(weight, 0.91) == 2
    assert rank_for(weight, 1.0) == 2
    # Two factors of a square of full rank have more numbers than the square.
    assert rank_for(torch.eye(4), 1.0) == 0


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9, 0.99])
def test_low_rank_holds_the_energy_asked_for_and_no_more(energy):
    draws = torch.Generator().manual_seed(0)
    start = torch.randn(30, 40, generator=draws)
    weight = nn.Parameter(start.clone())
    form = LowRank(energy)
    stored = form.store([weight], form.shape([weight]), nothing)
    rank = int(stored.ranks[0]) or 30
    values = torch.linalg.svdvals(start).square()
    assert values[:rank].sum() >= (energy - 1e-6) * values.sum()
    if stored.ranks[0]:
        assert values[: rank - 1].sum() < energy * values.sum()
        error = (weight - start).square().sum() / start.square().sum()
        assert error.item() <= 1 - energy + 1e-6
    flat = stored.flat([weight]).view_as(weight)
    torch.testing.assert_close(flat, weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORMS)
def test_it_answers_as_the_model_that_was_stored(tiny_model, tiny_task, name):
    """Up to rounding; of bytes up to half a scale a weight."""
    model, task = tiny_model(), tiny_task(0)
    knowledge = take(model, task, FORMS[name])
    body = body_of(knowledge, tiny_model)
    pairs = zip(
        prunable(model.body).values(), prunable(body).values(), strict=True
    )
    for was, found in pairs:
        bound = was.abs().max().item() / 254 if name == "int8" else 0
        assert (was - found).abs().max() <= bound + 1e-5
    if name != "int8":
        with torch.no_grad():
            expected = model(task.test.x)[:, :2]
        logits = knowledge.logits(body, task.test.x, 7)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_each_form_has_its_bytes(tiny_model, tiny_task):
    """99 weights: 3 rows of one, and 8 of 12."""
    found = {
        name: take(tiny_model(), tiny_task(0), form).nbytes - WHOLE
        for name, form in FORMS.items()
    }
    count = round(0.25 * 99)
    assert found["magnitude"] == 13 + 4 * count
    assert found["int8"] == 13 + count + 2 * 4
    assert found["filters"] == 2 + 4 * (1 * 1 + 2 * 12)
    assert found["int8"] < found["magnitude"] / 2
    assert found["filters"] < found["magnitude"] + 4


@pytest.mark.parametrize("name", ["int8", "filters", "low-rank"])
def test_states_come_back(tiny_model, tiny_task, tmp_path, name):
    knowledge = take(tiny_model(), tiny_task(0), FORMS[name])
    save_state(tmp_path / "state", knowledge.state_dict())
    other = read_knowledge(load_state(tmp_path / "state"))
    assert type(other) is type(knowledge)
    assert other.nbytes == knowledge.nbytes
    weights = list(prunable(tiny_model().body).values())
    assert torch.equal(other.flat(weights), knowledge.flat(weights))


@pytest.mark.parametrize("name", ["magnitude", "filters"])
def test_pruned_weights_stay_zero_while_others_are_tuned(
    tiny_model, tiny_task, name
):
    before = take(tiny_model(), tiny_task(0), FORMS[name], epochs=0)
    after = take(tiny_model(), tiny_task(0), FORMS[name], epochs=3)
    assert torch.equal(before.mask, after.mask)
    assert not torch.equal(before.values, after.values)


def test_low_rank_is_tuned_around_its_matrices(tiny_model, tiny_task):
    before = take(tiny_model(), tiny_task(0), FORMS["low-rank"], epochs=0)
    after = take(tiny_model(), tiny_task(0), FORMS["low-rank"], epochs=3)
    assert torch.equal(before.values, after.values)
    assert not torch.equal(before.head[0], after.head[0])


@pytest.mark.parametrize("name", FORMS)
def test_a_learner_keeps_its_tasks_in_that_form(tiny_model, tiny_task, name):
    options = FedKnowSettings(extractor=name, rho=0.25)
    assert form_of(options) == FORMS[name]
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)
    learner = FedKnow(tiny_model(), train, options)
    for number in range(3):
        report = learner.fit(tiny_task(number), Round(1, number))
        assert math.isfinite(report["loss"])
        kept = learner.end_task(tiny_task(number), Round(0, number))
        learner.load_state_dict(learner.state_dict())
    sizes = [k.nbytes for k in learner._restorer.knowledge.values()]
    assert kept["knowledge-bytes"] == sum(sizes)
