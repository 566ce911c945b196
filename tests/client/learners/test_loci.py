"""Loci: a step and a mix by hand, and tasks that find those like them."""

import random

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.learner import Diverged, Round
from fedknow.client.learners.loci import CLASSES, Loci, LociSettings
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate
from fedknow.strategies.loci import Loci as Server
from fedknow.strategies.loci import distance, mix, nearest
from fedknow.strategies.paired import Setup

SGD = TrainConfig(
    epochs=1,
    batch_size=64,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    channels_last=False,
)
X = np.array([[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0]])
Y = np.array([0, 1, 1])


def learner_of(train=SGD, classes=2, seed=0, **options):
    """Two inputs, two features, no nonlinearity."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    model = SplitModel(body, nn.Linear(2, classes))
    learner = Loci(model, train, LociSettings(**options))
    learner.work_on(SampleSpec("image", (1, 1, 2), "float32"))
    return learner


def task_of(x, y, number=0):
    classes = (2 * number, 2 * number + 1)
    x = torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 1, 2)
    split = Split(x, 2 * number + torch.as_tensor(y))
    return TaskData(number, classes, tuple(range(2 * number + 2)), split, split)


def server_of(learner):
    options = learner.strategy_options(learner.settings)
    server = Server(**options)
    server.prepare(Setup(None, learner, None))
    return server


def arrays_of(tensors):
    return Arrays((name, value.numpy()) for name, value in tensors.items())


def tensors_of(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_a_step_by_hand():
    """Both models' steps from their formulas, at T = 2 and lambda = 2/3."""
    learner = learner_of()
    w = {n: v.numpy() for n, v in learner.local_parameters().items()}
    v = {
        "body.1.weight": np.array([[1.0, 0.0], [0.0, 1.0]]),
        "head.weight": np.array([[2.0, 0.0], [0.0, 1.0]]),
        "head.bias": np.array([0.25, -0.25]),
    }
    # 2.25 > 0.25, -0.75 < 1.75, 4.25 > -1.25: the last one is told wrongly.
    learner.receive_extra({n: torch.tensor(a).float() for n, a in v.items()})
    learner.fit(task_of(X, Y), Round(1, 0))
    assert learner.counts() == {"trust": pytest.approx(2 / 3), "violated": 0}

    def logits(m):
        return X @ m["body.1.weight"].T @ m["head.weight"].T + m["head.bias"]

    def moved(m, error):
        features = X @ m["body.1.weight"].T
        return {
            "body.1.weight": m["body.1.weight"]
            - 0.5 * (error @ m["head.weight"]).T @ X,
            "head.weight": m["head.weight"] - 0.5 * error.T @ features,
            "head.bias": m["head.bias"] - 0.5 * error.sum(0),
        }

    z, u = logits(w), logits(v)
    plain = softmax(z) - np.eye(2)[Y]
    distilled = (softmax(z / 2) - softmax(u / 2)) / 2
    expected = moved(w, (plain + 2 / 3 * distilled) / 3)
    for name, value in learner.local_parameters().items():
        assert value.numpy() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    expected = moved(v, (softmax(u) - np.eye(2)[Y]) / 3)
    for name, value in learner.state_dict()["v"].items():
        assert value.numpy() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_the_first_round_is_plain_training_of_two_equal_models():
    learner = learner_of()
    learner.fit(task_of(X, Y), Round(1, 0))
    for name, value in learner.state_dict()["v"].items():
        assert torch.equal(value, learner.local_parameters()[name])
    assert learner.counts()["trust"] == 0


def drawn_task(number, client, turn=0.0):
    """Two classes that a direction tells apart; each client has samples of its own."""
    generator = torch.Generator().manual_seed(10 * number + client)
    x = torch.randn(24, 2, generator=generator)
    direction = torch.tensor([np.cos(turn), np.sin(turn)]).float()
    return task_of(x, (x @ direction > 0).long(), number)


@settings(deadline=None, max_examples=20)
@given(turn=st.floats(0, 6), seed=st.integers(0, 99))
def test_no_step_hurts_a_past_task(turn, seed):
    learner = learner_of(classes=4, seed=seed, rho=0.5)
    learner.fit(drawn_task(0, 0), Round(1, seed))
    learner.end_task(drawn_task(0, 0), Round(0, seed))
    [knowledge] = learner._past.values()
    task = drawn_task(1, 1, turn)
    start = learner.local_parameters()
    answers = knowledge.logits(learner._v_body, task.train.x, 64).clone()
    # The gradient that would keep the answers, by autograd on functions of the weights.
    body = start["body.1.weight"].clone().requires_grad_()
    flat = task.train.x.flatten(1)
    z = F.linear(flat @ body.T, start["head.weight"], start["head.bias"])[:, :2]
    loss = -((answers / 2).softmax(1) * (z / 2).log_softmax(1)).sum(1).mean()
    [restored] = torch.autograd.grad(loss, body)
    learner.fit(task, Round(1, seed))
    step = start["body.1.weight"] - learner.local_parameters()["body.1.weight"]
    size = float(step.norm() * restored.norm())
    assert float((step * restored).sum()) >= -1e-4 * size - 1e-7


def test_what_is_sent_has_the_rows_of_the_task_and_little_of_past_bodies():
    learner = learner_of(classes=4, rho=0.25)
    task = drawn_task(1, 0)
    learner.fit(task, Round(1, 0))
    sent = learner.share(task, Round(1, 0), False)
    assert sent[CLASSES].tolist() == [2, 3]
    assert not sent["head.weight"][:2].any()
    assert sent["head.weight"][2:].all()
    assert sent["body.1.weight"].all()
    assert "v" in learner.state_dict()
    learner.end_task(task, Round(0, 0))
    pruned = learner.share(task, Round(0, 0), True)
    # One of four weights.
    assert pruned["body.1.weight"].count_nonzero() == 1
    assert "v" not in learner.state_dict()
    for shared, ended in ((sent, False), (pruned, True)):
        layout = learner.shares(ended)
        assert layout.keys() == shared.keys()
        learner.check_share(arrays_of(shared))


def test_a_client_goes_on_from_its_state():
    """One learner object goes on; the other served somebody else in between."""
    task, later = drawn_task(0, 0), drawn_task(1, 0)
    first, second = learner_of(classes=4), learner_of(classes=4)
    received = {n: v + 0.1 for n, v in first.local_parameters().items()}
    for number, each in enumerate((task, task, later, later)):
        if number == 2:
            first.end_task(task, Round(0, 5))
        second.load_state_dict({})
        second.receive_extra(received)
        second.fit(drawn_task(0, 9), Round(1, 9))
        second.load_state_dict(first.state_dict())
        for learner in (first, second):
            if number == 3:
                learner.receive_extra(received)
            learner.fit(each, Round(number, number))
        found, expected = second.state_dict(), first.state_dict()
        for part in ("kept", "v"):
            for name, value in expected[part].items():
                assert torch.equal(found[part][name], value)


# --- the server


def entries(body, rows, classes=(0, 1), width=4):
    weight, bias = torch.zeros(width, 2), torch.zeros(width)
    weight[list(classes)] = torch.tensor(rows, dtype=torch.float32)
    bias[list(classes)] = 0.5
    return {
        "body.1.weight": torch.tensor(body, dtype=torch.float32),
        "head.weight": weight,
        "head.bias": bias,
        CLASSES: torch.tensor(classes),
    }


def test_a_mix_by_hand():
    """Zeros are held by nobody: 2 of 3 hold the first weight, 1 the last one."""
    centre = entries([[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [2.0, 2.0]])
    like = entries([[3.0, 0.0], [6.0, 0.0]], [[3.0, 5.0], [4.0, 0.0]])
    unlike = entries([[0.0, 5.0], [0.0, 0.0]], [[9.0, 9.0], [8.0, 8.0]], (1, 2))
    mixed = mix(centre, [like, unlike])
    assert mixed["body.1.weight"].tolist() == [[2.0, 3.5], [4.5, 4.0]]
    # The row of class 0 is that of two, the row of class 1 of all three; 2 is not asked for.
    assert mixed["head.weight"][0].tolist() == [2.0, 3.0]
    assert mixed["head.weight"][1].tolist() == [5.0, 5.5]
    assert not mixed["head.weight"][2:].any()
    assert mixed["head.bias"].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_distances_by_hand():
    """Two classes with logits 0 and log 3: 1/4 and 3/4."""
    u = torch.tensor([[0.0, np.log(3.0)]]).float()
    assert distance(u, u) == pytest.approx(
        -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    )
    assert distance(u, -u) == pytest.approx(
        -(0.75 * np.log(0.25) + 0.25 * np.log(0.75))
    )
    assert nearest({3: 0.5, 1: 0.5, 2: float("nan"), 0: 0.1}, 3) == [0, 1, 3]
    assert nearest({3: 0.5, 2: float("nan")}, 7) == [3, 2]


def drawn(seed, count, classes=(0, 1)):
    generator = np.random.default_rng(seed)
    return {
        client: arrays_of(
            entries(
                generator.normal(size=(2, 2)),
                generator.normal(size=(2, 2)),
                classes,
            )
        )
        for client in range(count)
    }


def mixed_of(server, extras):
    # As the experiment does before each hook.
    random.seed(7)
    server.collect(0, extras)
    return [server.extra(0, client) for client in extras]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), count=st.integers(2, 6))
def test_among_all_of_one_task_it_is_flowers_mean(seed, count):
    extras = drawn(seed, count)
    server = server_of(learner_of(classes=4, peers=count - 1))
    records = []
    for arrays in extras.values():
        named = {n: a for n, a in arrays.items() if n != CLASSES}
        records.append(
            RecordDict(
                {
                    "arrays": ArrayRecord(
                        {n: torch.tensor(a) for n, a in named.items()}
                    ),
                    "metrics": MetricRecord({"num-examples": 1}),
                }
            )
        )
    mean = aggregate_arrayrecords(records, "num-examples").to_torch_state_dict()
    for mixed in mixed_of(server, extras):
        for name, array in mixed.items():
            assert array == pytest.approx(mean[name].numpy(), rel=1e-5, abs=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**20), count=st.integers(2, 5), peers=st.integers(0, 3)
)
def test_those_that_are_not_near_change_nothing(seed, count, peers):
    extras = drawn(seed, count)
    server = server_of(learner_of(classes=4, peers=peers))

    def first_without(dropped):
        others = {c: a for c, a in extras.items() if c not in dropped}
        return [array.tobytes() for array in mixed_of(server, others)[0].values()]

    expected = first_without([])
    idle = [c for c in range(1, count) if first_without([c]) == expected]
    assert len(idle) == max(0, count - 1 - peers)
    assert first_without(idle) == expected


def test_without_peers_a_client_gets_its_own_back():
    extras = drawn(3, 3)
    for mixed, arrays in zip(
        mixed_of(server_of(learner_of(classes=4, peers=0)), extras),
        extras.values(),
        strict=True,
    ):
        for name, array in mixed.items():
            assert np.array_equal(array, arrays[name])


@pytest.mark.parametrize("seed", range(5))
def test_like_tasks_find_each_other(seed):
    """Of six clients three tell samples apart by one axis, and three the other way."""
    train = SGD.model_copy(update={"epochs": 30})
    extras = {}
    for client in range(6):
        task = drawn_task(0, client, np.pi * (client % 2))
        learner = learner_of(train, 4, seed)
        learner.fit(task, Round(1, client))
        extras[client] = arrays_of(learner.share(task, Round(1, client), False))
    server = server_of(learner_of(train, 4, seed, peers=2))
    for client, mixed in enumerate(mixed_of(server, extras)):
        like = [extras[peer] for peer in range(client % 2, 6, 2)]
        for name in ("body.1.weight", "head.weight"):
            mean = np.mean([arrays[name] for arrays in like], 0)
            assert mixed[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)


def end(server, extras):
    replies = [
        Message("train.end_task", client, "", content={EXTRA: arrays})
        for client, arrays in extras.items()
    ]
    server.aggregate_end_task(0, Arrays(), replies)


def test_past_knowledge_is_a_candidate_and_a_task_begins_anew():
    extras, ended = drawn(5, 1), drawn(6, 1)
    server = server_of(learner_of(classes=4, peers=1))
    mixed_of(server, extras)
    end(server, ended)
    assert server.extra(1, 0) is None
    [mixed] = mixed_of(server, extras)
    mean = (extras[0]["body.1.weight"] + ended[0]["body.1.weight"]) / 2
    assert mixed["body.1.weight"] == pytest.approx(mean)
    blind = server_of(learner_of(classes=4, peers=1, candidates=0))
    end(blind, ended)
    [mixed] = mixed_of(blind, extras)
    assert np.array_equal(mixed["body.1.weight"], extras[0]["body.1.weight"])


def test_a_server_goes_on_from_its_state():
    server, resumed = (server_of(learner_of(classes=4)) for _ in range(2))
    end(server, drawn(6, 3, (2, 3)))
    mixed_of(server, drawn(5, 2))
    resumed.load_state_dict(server.state_dict())
    for client in range(2):
        for name, array in server.extra(0, client).items():
            assert np.array_equal(resumed.extra(0, client)[name], array)
    for a, b in zip(
        mixed_of(server, drawn(8, 2)), mixed_of(resumed, drawn(8, 2)), strict=True
    ):
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert server.kept_bytes() == resumed.kept_bytes() > 0


# --- refused


def test_what_does_not_fit_is_refused():
    learner = learner_of()
    with pytest.raises(ValueError, match="does not fit the model"):
        learner.receive_extra({"body.1.weight": torch.zeros(2, 2)})
    for classes in ([], [0, 0], [5]):
        with pytest.raises(ValueError, match="class"):
            learner.check_share({CLASSES: np.array(classes, np.int64)})
    with pytest.raises(ConfigError, match="no weight matrices"):
        Loci(SplitModel(nn.Flatten(), nn.Linear(2, 2)), SGD, LociSettings())
    headless = learner_of().model
    headless.head = nn.Linear(2, 2, bias=False)
    with pytest.raises(ConfigError, match="needs a bias"):
        Loci(headless, SGD, LociSettings())
    with pytest.raises(ConfigError, match=r"learner\.name = 'loci'"):
        Server().prepare(Setup(None, nn.Flatten(), None))


def test_knowledge_that_is_no_number_is_named():
    learner = learner_of()
    broken = {n: v + float("inf") for n, v in learner.local_parameters().items()}
    learner.receive_extra(broken)
    with pytest.raises(Diverged, match="knowledge model"):
        learner.fit(task_of(X, Y), Round(1, 0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["privacy.secure=true"], r"privacy\.secure = true: learner loci"),
        (
            ["privacy.clip=1", "privacy.noise=1"],
            r"privacy\.clip = 1: learner loci",
        ),
        (["data.scenario=class-incremental"], "is not made for"),
    ],
)
def test_what_would_look_at_single_updates_is_refused(tmp_path, changes, reason):
    config = read_config(
        {"learner": "loci", "data": {"clients": 5, "tasks": 2}}, changes
    )
    with pytest.raises(ConfigError, match=reason):
        simulate(config, tmp_path / "run")


def test_knowledge_travels_both_ways_and_no_parameters(tmp_path):
    config = read_config(
        {
            "learner": "loci",
            "data": {"clients": 3, "tasks": 2, "classes_per_task": 2},
            "train": {"rounds": 2, "epochs": 1},
            "engine": {"backend": "inline"},
        },
        [],
    )
    run = RunFolder.open(simulate(config, tmp_path / "run").folder)
    [*_, last] = [e for e in run.events() if e["event"] == "round"]
    up, down = (last["traffic"]["train.extra"][way] for way in ("up", "down"))
    # The second of two rounds of each task; without zeros, which differ.
    assert 0.4 * up < down < 0.6 * up
    assert last["traffic"]["train"]["down"] < 0.01 * down
    assert last["metrics"]["trust"] > 0
