"""AFCL and STSA: one solution for every split, and sums computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedknow.client.learners import build_learner, resolve
from fedknow.client.learners.frames.closed_form import factor, triangle
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.stsa import class_sums
from fedknow.client.models import build_model
from fedknow.protocols.config import ConfigError, ModelConfig, read_config
from fedknow.protocols.messages import Arrays
from fedknow.simulations.simulate import simulate
from fedknow.strategies.closed_form import Afcl, Stsa, light_gram, solve

CLASSES, WIDTH = 6, 12
FROZEN = {"name": "mlp", "train": "head", "hidden": WIDTH}


def learner_of(name="afcl", model=FROZEN, **options):
    config = read_config({"model": model, "learner": {"name": name, **options}})
    return build_learner(config, (1, 2, 2), CLASSES)


def server_of(kind=Afcl, **options):
    server = kind(**options)
    server._is_new = False
    server.reset(WIDTH, CLASSES)
    return server


def features_and_labels(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=draws, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (count,), generator=draws)


def joint(x, y, ridge):
    """Solve the ridge regression in one place, Eq. (2), by another way."""
    targets = nn.functional.one_hot(y, CLASSES).double()
    wide = torch.cat([x, ridge**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    zeros = torch.zeros(WIDTH, CLASSES, dtype=torch.float64)
    return torch.linalg.lstsq(wide, torch.cat([targets, zeros])).solution


@pytest.mark.parametrize(("name", "kind"), [("afcl", Afcl), ("stsa", Stsa)])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_split_in_any_order_gives_the_joint_solution(name, kind, data):
    count = data.draw(st.integers(1, 60))
    x, y = features_and_labels(count, data.draw(st.integers(0, 9)))
    parts = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    owner = torch.tensor(parts)
    # A client that is missing now comes last: any order covers it.
    order = data.draw(st.permutations(range(5)))
    ridge = data.draw(st.sampled_from([1e-3, 1.0, 100.0]))
    client, server = learner_of(name), server_of(kind, ridge=ridge)
    for part in order:
        members = owner == part
        if members.any():
            server.add(client.sums(x[members], y[members], Round(1, 0)))
    torch.testing.assert_close(
        server.solution(), joint(x, y, ridge), rtol=1e-6, atol=1e-6
    )


def test_solution_by_hand():
    # Two samples of one feature: x = 1 of class 0, x = 2 of class 1; gamma = 5.
    # W = (1 + 4 + 5)^-1 (1, 2).
    gram = torch.tensor([[5.0]], dtype=torch.float64)
    moment = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert solve(gram, moment, 5.0).tolist() == [[0.1, 0.2]]


def test_halves_and_factors_by_hand():
    matrix = torch.tensor([[1.0, 2.0], [2.0, 3.0]])
    assert triangle(matrix).tolist() == [1.0, 2.0, 3.0]
    x, _ = features_and_labels(3)
    r = factor(x)
    assert r.shape == (3, WIDTH)
    torch.testing.assert_close(r.T @ r, x.T @ x)


@pytest.mark.parametrize(("count", "is_low_rank"), [(6, True), (7, False)])
def test_the_smaller_form_travels(count, is_low_rank):
    sums = learner_of().sums(*features_and_labels(count), Round(1, 0))
    assert (len(sums["factor"]) > 0) is is_low_rank
    numbers = sums["factor"].numel() + sums["gram"].numel()
    assert numbers == min(count * WIDTH, WIDTH * (WIDTH + 1) // 2)


def test_class_sums_by_hand():
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    sums = class_sums(x, torch.tensor([3, 3, 5, 3]), 2)
    assert sums["sums"].tolist() == [[3.0], [8.0], [4.0]]
    assert sums["classes"].tolist() == [3, 3, 5]
    assert sums["counts"].tolist() == [2, 1, 1]


def test_light_gram_by_hand():
    # One class in two groups: s = 3 over 2 samples and s = 8 over 1. N = 3, K = 2:
    # A = 2, B = 1 / 3; G = 2 (9 / 2 + 64) - 121 / 3.
    sums = torch.tensor([[3.0], [8.0]], dtype=torch.float64)
    labels, counts = torch.tensor([0, 0]), torch.tensor([2, 1])
    moment = torch.tensor([[11.0], [0.0]], dtype=torch.float64)
    gram = light_gram(sums, labels, counts, moment)
    assert gram.item() == pytest.approx(137 - 121 / 3)


def test_light_gram_is_exact_where_each_sample_is_a_group():
    x, y = features_and_labels(40)
    sums = class_sums(x, y, 40)
    moment = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
    moment.index_add_(0, sums["classes"], sums["sums"])
    gram = light_gram(sums["sums"], sums["classes"], sums["counts"], moment)
    torch.testing.assert_close(gram, x.T @ x)


def test_light_gram_has_the_right_expectation():
    x, y = features_and_labels(60)
    mean = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for seed in range(400):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        sums = class_sums(x[order], y[order], 3)
        moment = torch.zeros(CLASSES, WIDTH, dtype=torch.float64)
        moment.index_add_(0, sums["classes"], sums["sums"])
        mean += (
            light_gram(sums["sums"], sums["classes"], sums["counts"], moment)
            / 400
        )
    exact = x.T @ x
    assert (mean - exact).norm() < 0.05 * exact.norm()
    assert torch.linalg.eigvalsh(mean).min() > 0


def test_no_right_digit_is_refused():
    gram = torch.diag(torch.tensor([1e10, 0.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"raise learner\.ridge to"):
        solve(gram, torch.zeros(2, 1, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("name", ["afcl", "stsa"])
@pytest.mark.parametrize(
    "model", [{"name": "mlp"}, FROZEN | {"neck": 4}, FROZEN | {"train": "lora"}]
)
def test_a_trained_body_is_refused(name, model):
    with pytest.raises(ConfigError, match="the features of a frozen network"):
        learner_of(name, model)


def test_a_task_is_summed_once_and_sent_once(tiny_task):
    client = learner_of()
    task = tiny_task(0)
    client.fit(task, Round(1, 0))
    state = client.state_dict()
    client.load_state_dict({})
    client.load_state_dict(state)
    first = client.share(task, Round(1, 0), ended=False)
    assert first["moment"].sum() != 0
    client.fit(task, Round(2, 0))
    assert client.share(task, Round(2, 0), ended=False) == {}


def test_random_features_by_hand():
    config = ModelConfig(name="linear", train="head", random_features=5)
    model = build_model(config, (1, 2, 2), 3, seed=0)
    x = torch.randn(2, 1, 2, 2)
    matrix = model.body.frozen[1].matrix
    torch.testing.assert_close(model.body(x), (x.flatten(1) @ matrix).relu())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    trained = ModelConfig(name="mlp", random_features=5)
    with pytest.raises(ConfigError, match="stand behind a frozen network"):
        build_model(trained, (1, 2, 2), 3, seed=0)


@pytest.mark.parametrize("learner", ["afcl", "stsa"])
def test_a_split_over_clients_changes_no_head(learner, tmp_path):
    """One client in each round of a task, and the others when it is over, the last one too."""
    heads, scores = {}, {}
    for clients in (1, 3):
        config = read_config(
            {
                "data": {
                    "tasks": 2,
                    "clients": clients,
                    "scenario": "class-incremental",
                    "partition": "dirichlet",
                },
                "model": FROZEN | {"hidden": 64, "random_features": 80},
                "learner": learner,
                "strategy": {"fraction": 0.4},
                "train": {"rounds": 2},
                "engine": {"backend": "inline"},
            }
        )
        folder = tmp_path / str(clients)
        result = simulate(resolve(config), folder, report=False)
        heads[clients] = result.arrays["head.weight"]
        scores[clients] = np.nanmean(result.accuracy["global"][:, -1])
    np.testing.assert_allclose(heads[3], heads[1], rtol=1e-5, atol=1e-6)
    assert min(scores.values()) > 0.8


def test_a_clients_own_head_is_left_out():
    client, server = learner_of(), server_of()
    sent = Arrays((n, v.numpy()) for n, v in client.send().items())
    server.begin_round(0, sent)
    assert server._solved(sent) is None
    x, y = features_and_labels(9)
    sums = client.sums(x, y, Round(1, 0))
    server.collect(0, {0: Arrays((n, v.numpy()) for n, v in sums.items())})
    solved = server._solved(sent)
    np.testing.assert_allclose(
        solved["head.weight"].T, joint(x, y, 1.0), rtol=1e-5, atol=1e-6
    )
    assert not solved["head.bias"].any()
    # Nothing new came since.
    assert server._solved(sent) is None


def test_arrays_of_a_message_are_summed():
    client, server = learner_of(), server_of()
    x, y = features_and_labels(20)
    sums = client.sums(x, y, Round(1, 0))
    arrays = Arrays((name, value.numpy()) for name, value in sums.items())
    server.collect(0, {1: arrays})
    torch.testing.assert_close(server.solution(), joint(x, y, 1.0))
    twin = server_of()
    twin.load_state_dict(server.state_dict())
    assert torch.equal(twin.solution(), server.solution())


# --- what hostile clients could share


def sums_of(learner, count=40):
    x, y = features_and_labels(count)
    sums = learner.sums(x, y, Round(1, 0))
    return {name: value.numpy() for name, value in sums.items()}


HOSTILE = {
    "gram": [
        lambda a: -a,
        lambda a: a * 1e12,
        lambda a: a[:-1],
        lambda a: np.full_like(a, 1e200),
    ],
    "factor": [lambda a: a * 1e9, lambda a: np.full_like(a, 1e160)],
    "moment": [lambda a: np.full_like(a, -1e200)],
    "sums": [lambda a: a[1:], lambda a: np.full_like(a, 1e200)],
    "classes": [lambda a: a + CLASSES, lambda a: a - CLASSES, lambda a: a[1:]],
    "counts": [lambda a: a * 0, lambda a: -a, lambda a: a[1:]],
}


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 40), ({}, 4), ({"name": "stsa", "light": True}, 40)],
)
def test_only_sums_that_samples_have_are_taken(options, count):
    learner = learner_of(**options)
    honest = sums_of(learner, count)
    learner.check_share(honest)
    for name, array in honest.items():
        for spoil in HOSTILE[name] if array.size else ():
            with pytest.raises(ValueError, match=r"."):
                learner.check_share({**honest, name: spoil(array)})


# --- sums under masks


@pytest.mark.parametrize("count", [0, 3, 40])
def test_both_forms_are_laid_out_as_one(count):
    """Samples, few or many, and none at all."""
    learner = learner_of()
    x, y = features_and_labels(count)
    shared = learner.sums(x, y, Round(1, 0)) if count else {}
    sums = learner.as_sums(shared)
    layout = learner.sum_layout()
    assert list(layout) == list(learner.shares(ended=True))
    assert {name: tuple(sums[name].shape) for name in sums} == {
        name: summand.shape for name, summand in layout.items()
    }
    torch.testing.assert_close(sums["gram"], triangle(x.T @ x))
    server, twin = server_of(), server_of()
    server.add(sums)
    if count:
        twin.add(shared)
    torch.testing.assert_close(server.solution(), twin.solution())
    learner.check_sum({n: v.numpy() for n, v in sums.items()}, 1)


@pytest.mark.parametrize("ridge", [1e-6, 0.3, 1.0, 3.0, 4096.0])
def test_units_keep_their_proportion_to_the_ridge(ridge):
    layout = learner_of(ridge=ridge).sum_layout()
    assert ridge / 2 < layout["gram"].unit * 2**32 <= ridge
    root = layout["moment"].unit * 2**32
    assert ridge / 4 < root**2 <= ridge


def test_rows_of_the_light_form_are_no_sums():
    learner = learner_of("stsa", light=True)
    assert learner.sum_layout() == {}
    assert learner.no_sums == "set learner.light = false"
    plain = learner_of("stsa")
    assert plain.sum_layout()
    assert not plain.no_sums


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("gram", lambda a: -a, "below 0"),
        ("gram", lambda a: a * 1e12, "squares add up"),
        ("gram", lambda a: np.full_like(a, 1e200), "gram: a number of 1.0e"),
        ("moment", lambda a: a - 1e17, "moment: a number"),
    ],
)
def test_only_sums_that_clients_can_have_are_taken(name, spoil, words):
    learner = learner_of()
    sums = learner.as_sums(learner.sums(*features_and_labels(40), Round(1, 0)))
    honest = {n: v.numpy() for n, v in sums.items()}
    learner.check_sum(honest, 3)
    with pytest.raises(ValueError, match=words):
        learner.check_sum({**honest, name: spoil(honest[name])}, 3)


def test_a_sum_that_rounding_made_indefinite_is_taken():
    learner = learner_of()
    layout = learner.sum_layout()
    zeros = {n: np.zeros(s.shape) for n, s in layout.items()}
    rounded = zeros["gram"] - 0.5 * layout["gram"].unit
    learner.check_sum({**zeros, "gram": rounded}, 1)
    with pytest.raises(ValueError, match="below 0"):
        learner.check_sum({**zeros, "gram": rounded * 1000}, 1)
