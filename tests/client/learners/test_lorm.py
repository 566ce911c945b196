"""LoRM: merges by hand, against least squares, and over tasks."""

import numpy as np
import pytest
import torch

from fedknow.client.learners import build_learner
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.lorm import FEATURES, trains_b
from fedknow.protocols.config import ConfigError, read_config
from fedknow.protocols.messages import Arrays
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate
from fedknow.strategies.lorm import Lorm as Server
from fedknow.strategies.lorm import merge, merge_low_rank, merge_tasks

SGD = {
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 0.0,
    "epochs": 1,
    "batch_size": 64,
    "channels_last": False,
}


def learner_of(model="mlp", sample=(1, 2, 2), **options):
    layout = {"name": model, "train": "lora", "lora_rank": 2}
    if model == "mlp":
        layout["hidden"] = 8
    learner = {"name": "lorm", **options}
    config = read_config({"model": layout, "train": SGD, "learner": learner})
    return build_learner(config, sample, 6)


def doubles(*shape, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draws, dtype=torch.float64)


def test_a_merge_by_hand():
    """W = 1 and 4 at inputs of energy 1 and 3: (1 + 12) / 4; without any, the mean stays."""
    column = [torch.tensor([[w]]).double() for w in (1.0, 4.0)]
    mean = torch.tensor([[2.5]]).double()
    grams = [torch.tensor([g]).double() for g in (1.0, 3.0)]
    assert merge(mean, column, grams).item() == pytest.approx(3.25)
    full = [gram.view(1, 1) for gram in grams]
    assert merge(mean, column, full).item() == pytest.approx(3.25)
    nothing = [torch.zeros(1).double()] * 2
    assert merge(mean, column, nothing).item() == 2.5


def test_tasks_by_hand():
    """Shares of two tasks in one input: 1/4 and 3/4."""
    tasks = [
        {
            "x.a": torch.tensor([[a]]),
            "x.b": torch.tensor([[b]]),
            "x.g": torch.tensor([g]),
        }
        for a, b, g in ((2.0, 1.0, 1.0), (4.0, 5.0, 3.0))
    ]
    a, b = merge_tasks(tasks, "x")
    assert a.tolist() == [[0.5], [3.0]]
    assert b.tolist() == [[1.0, 5.0]]


def test_a_merge_answers_as_all_do():
    """Eq. (1): least squares over all clients' inputs, by another way."""
    matrices = [doubles(3, 5, seed=i) for i in range(4)]
    x = [doubles(5, 7, seed=10 + i) for i in range(4)]
    grams = [part @ part.T for part in x]
    answers = torch.cat([w @ p for w, p in zip(matrices, x, strict=True)], 1)
    expected = torch.linalg.lstsq(torch.cat(x, 1).T, answers.T).solution.T
    merged = merge(doubles(3, 5, seed=9), matrices, grams)
    torch.testing.assert_close(merged, expected)


def test_factors_over_a_common_a_answer_as_all_do():
    """Eq. (2): least squares for B at the inputs that A sees."""
    a = doubles(2, 5, seed=8)
    factors = [doubles(3, 2, seed=i) for i in range(4)]
    x = [doubles(5, 7, seed=10 + i) for i in range(4)]
    grams = [part @ part.T for part in x]
    answers = torch.cat([b @ a @ p for b, p in zip(factors, x, strict=True)], 1)
    expected = torch.linalg.lstsq((a @ torch.cat(x, 1)).T, answers.T).solution.T
    merged = merge_low_rank(doubles(3, 2, seed=9), factors, grams, a)
    torch.testing.assert_close(merged, expected)


def test_tasks_with_inputs_of_their_own_are_not_forgotten():
    """Eq. (4): where tasks' inputs are orthogonal, each is answered by its own factors."""
    axes = torch.linalg.qr(doubles(6, 6)).Q
    tasks, x = [], []
    for t in range(3):
        span = axes[:, 2 * t : 2 * t + 2]
        x.append(span @ doubles(2, 9, seed=t))
        tasks.append(
            {
                "x.a": doubles(2, 6, seed=20 + t),
                "x.b": doubles(4, 2, seed=30 + t),
                "x.g": x[t] @ x[t].T,
            }
        )
    a, b = merge_tasks(tasks, "x")
    assert (a.shape, b.shape) == ((6, 6), (4, 6))
    for task, part in zip(tasks, x, strict=True):
        own = task["x.b"] @ task["x.a"] @ part
        torch.testing.assert_close(b @ (a @ part), own)


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_trains_one_factor(tiny_task, number):
    learner = learner_of()
    start = learner.send()
    # B begins as zeros, so that A has a gradient after B's round alone.
    for name in start:
        if ".b." in name:
            start[name] = torch.ones_like(start[name])
    learner.receive(start)
    learner.fit(tiny_task(1), Round(number, 1))
    moved = {n for n, v in learner.send().items() if not torch.equal(v, start[n])}
    trained = "b" if number == 1 else "a"
    assert trains_b(number) is (trained == "b")
    factors = {n for n in start if f".{trained}.weight" in n}
    assert moved == factors | {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in learner.trainable.values())
    head = (learner.send()["head.bias"] - start["head.bias"]).nonzero()
    assert head.flatten().tolist() == [2, 3]


@pytest.mark.parametrize("gram", ["diagonal", "full"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_what_is_sent_is_the_inputs_gram(gram, model):
    learner = learner_of(model, (1, 8, 8), gram=gram, patches=0)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(5, 1, 8, 8, generator=draws)
    y = torch.arange(5) % 2

    class Task:
        train = type("Split", (), {"x": x, "y": y})

    shared = learner.share(Task, Round(1, 1), False)
    layout = {n: ("float32", tuple(v.shape)) for n, v in shared.items()}
    assert layout == learner.shares(False) == learner.shares(True)
    learner.model.eval()
    with torch.no_grad():
        features = learner.body(x)
    expected = features.T @ features
    if gram == "diagonal":
        expected = expected.diagonal()
    else:
        rows, columns = torch.triu_indices(*expected.shape)
        expected = expected[rows, columns]
    torch.testing.assert_close(shared[FEATURES], expected)


@pytest.mark.parametrize("gram", ["diagonal", "full"])
def test_impossible_sums_are_refused(tiny_task, gram):
    learner = learner_of(gram=gram)
    shared = learner.share(tiny_task(0), Round(1, 1), False)
    arrays = {name: value.numpy() for name, value in shared.items()}
    learner.check_share(arrays)
    for name in arrays:
        with pytest.raises(ValueError, match="below 0"):
            learner.check_share(arrays | {name: -1 - abs(arrays[name])})


def test_factors_of_all_tasks_answer():
    """An adapter of a larger rank, against the sum that it stands for."""
    learner = learner_of()
    learner.model.eval()
    x = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    extra, change = {}, {}
    for name, adapter in learner.adapters.items():
        a = doubles(6, *adapter.a.weight.shape[1:]).float()
        b = doubles(len(adapter.b.weight), 6, seed=1).float()
        extra |= {f"{name}.a": a, f"{name}.b": b}
        change[name] = adapter.scale * (b @ a)
    learner.receive_extra(extra)
    [predictor] = learner.predictors(1)
    found = predictor(x)
    with torch.no_grad():
        for name, adapter in learner.adapters.items():
            adapter.layer.weight += change[name]
            adapter.b.weight.zero_()
    # Sums of factors in another order: processors round them differently.
    torch.testing.assert_close(found, learner.model(x), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit"):
        learner.receive_extra(extra | {f"{name}.a": torch.zeros(6, 1)})
    with pytest.raises(ValueError, match="not the model's"):
        learner.receive_extra({"x": torch.zeros(1)})


@pytest.mark.parametrize("changes", [["model=mlp"], ["model.neck=4"]])
def test_other_models_are_refused(changes):
    layout = ["model=mlp", "model.train=lora", "learner=lorm", *changes]
    if changes == ["model=mlp"]:
        layout.remove("model.train=lora")
    with pytest.raises(ConfigError, match=r"set model\.train = 'lora'"):
        build_learner(read_config({}, layout), (1, 2, 2), 6)


@pytest.mark.parametrize("gram", ["diagonal", "full"])
def test_a_run_begins_each_task_anew_and_answers_with_all(tmp_path, gram):
    tree = {
        "data": {
            "clients": 2,
            "tasks": 2,
            "classes_per_task": 2,
            "classes_max": 2,
            "scenario": "class-incremental",
            "samples": 0.3,
            "test_samples": 0.3,
        },
        "model": {"name": "mlp", "train": "lora", "lora_rank": 2, "hidden": 16},
        "train": {"rounds": 2, "epochs": 2, "batch_size": 8, "lr": 1e-2},
        "learner": {"name": "lorm", "gram": gram},
        "engine": {"backend": "inline"},
    }
    run = simulate(read_config(tree), tmp_path / "run", report=False)
    folder = RunFolder.open(run.folder)
    rounds = [e for e in folder.events() if e["event"] == "round"]
    sent = rounds[-1]["traffic"]
    assert sent["evaluate.extra"]
    assert np.nanmax(folder.accuracy()["global"]) > 0.5


def test_the_server_takes_up_where_it_was():
    learner = learner_of()
    servers = [Server(), Server()]
    arrays = Arrays((n, v.numpy()) for n, v in learner.send().items())
    for server in servers:
        server._names = list(learner.adapters)
        server._initial = dict(arrays)
    grams = {
        n: doubles(*shape) ** 2 for n, (_, shape) in learner.shares(True).items()
    }
    servers[0]._tasks.append(servers[0]._task_of(arrays, grams))
    servers[0]._current = servers[0]._task_of(arrays, grams)
    servers[1].load_state_dict(servers[0].state_dict())
    one, other = (server.extra_to_score() for server in servers)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert {len(one[f"{name}.a"]) for name in learner.adapters} == {4}
