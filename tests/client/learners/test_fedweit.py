"""FedWEIT: the composition and a step of Eq. (3) against the formulas, what is kept back, sent and
dropped."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedweit import FedWeit, FedWeitSettings, sent_units
from fedknow.client.learners.frames.learner import Round
from fedknow.client.learners.frames.sparse import pack, packed_bytes, unpack
from fedknow.client.models import SplitModel
from fedknow.protocols.config import TrainConfig

SGD = TrainConfig(
    epochs=1,
    batch_size=8,
    optimizer="sgd",
    lr=0.1,
    weight_decay=0.0,
    channels_last=False,
)
ADAM = TrainConfig(epochs=4, batch_size=8, lr=0.01)
NAME = "1.weight"
BASE = np.array([[0.5, -1.0], [0.25, 0.75]])
HEAD = np.array([[1.0, 0.5], [-0.5, 1.5], [0.7, -0.3], [0.2, 0.9]])
X = np.array([[1.0, 0.5], [-0.5, 2.0], [2.0, -1.0]])
Y = np.array([2, 3, 3])


def linear(**settings):
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False)),
        nn.Linear(2, 4, bias=False),
    )
    with torch.no_grad():
        model.body[1].weight.copy_(torch.tensor(BASE))
        model.head.weight.copy_(torch.tensor(HEAD))
    return FedWeit(model, SGD, FedWeitSettings(**settings))


def task(number=1):
    split = Split(
        torch.tensor(X, dtype=torch.float32).view(-1, 1, 1, 2), torch.tensor(Y)
    )
    return TaskData(number, (2, 3), (0, 1, 2, 3), split, split)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def entry(mask, adaptive, borrowed=None):
    return {
        "mask": {NAME: tensor(mask)},
        "adaptive": pack({NAME: tensor(adaptive)}),
        "borrowed": pack({} if borrowed is None else {NAME: tensor(borrowed)}),
        "buffers": {},
    }


def test_one_step_by_hand():
    """All terms at once: a past task to retain, adaptive parameters to thin out, another client's
    to borrow."""
    m0, a0, b_then, a_then = (
        np.array([[0.4], [-0.3]]),
        BASE.T * 0.2,
        BASE - 0.1,
        BASE.T * 0.3,
    )
    m1, a1, other, alpha = (
        np.array([[0.2], [1.0]]),
        np.array([[0.3, -0.2], [0.1, 0.4]]),
        BASE[::-1] * 0.5,
        0.7,
    )
    lam1, lam2 = 0.05, 0.8
    learner = linear(sparsity=lam1, retention=lam2)
    kept = learner.local_parameters()
    learner.load_state_dict(
        {
            "kept": kept,
            "tasks": {"0": entry(m0, a0), "1": entry(m1, a1)},
            "base_then": {NAME: tensor(b_then)},
            "adaptive_then": {"0": pack({NAME: tensor(a_then)})},
            "others": pack({NAME: tensor(other)[None]}),
            "attention": {NAME: tensor([alpha])},
        }
    )
    learner.fit(task(), Round(1, 0))

    theta = BASE * sigmoid(m1) + a1 + alpha * other
    e = np.exp(X @ theta.T @ HEAD.T) * np.array([0, 0, 1, 1])
    error = (e / e.sum(1, keepdims=True) - np.eye(4)[Y]) / len(Y)
    g = (error @ HEAD).T @ X
    moved = (BASE - b_then) * sigmoid(m0) + a0 - a_then
    base = BASE - 0.1 * (g * sigmoid(m1) + 2 * lam2 * moved * sigmoid(m0))
    slope = (g * BASE).sum(1, keepdims=True) * sigmoid(m1) * (1 - sigmoid(m1))

    state = learner.state_dict()
    assert learner.body[1].weight.detach().numpy() == pytest.approx(
        base, rel=1e-5
    )
    assert learner.head.weight.detach().numpy() == pytest.approx(
        HEAD - 0.1 * error.T @ (X @ theta.T), rel=1e-5
    )
    assert state["tasks"]["1"]["mask"][NAME].numpy() == pytest.approx(
        m1 - 0.1 * slope, rel=1e-5
    )
    adaptive = [
        unpack(state["tasks"][number]["adaptive"])[NAME].numpy()
        for number in ("0", "1")
    ]
    assert adaptive[0] == pytest.approx(
        a0 - 0.1 * (lam1 * np.sign(a0) + 2 * lam2 * moved), rel=1e-5
    )
    assert adaptive[1] == pytest.approx(
        a1 - 0.1 * (lam1 * np.sign(a1) + g), rel=1e-5
    )
    assert state["attention"][NAME].item() == pytest.approx(
        alpha - 0.1 * (g * other).sum(), rel=1e-5
    )
    assert state["tasks"]["0"]["mask"][NAME].numpy() == pytest.approx(
        m0
    )  # past masks stand still


def test_a_task_is_predicted_with_its_own_parameters():
    learner = linear()
    thetas = [
        BASE * sigmoid(m) + a + b
        for m, a, b in ((0.5, 0.1, 0.0), (-0.5, -0.2, 0.3))
    ]
    learner.load_state_dict(
        {
            "tasks": {
                "0": entry(np.full((2, 1), 0.5), np.full((2, 2), 0.1)),
                "1": entry(
                    np.full((2, 1), -0.5),
                    np.full((2, 2), -0.2),
                    np.full((2, 2), 0.3),
                ),
            }
        }
    )

    def losses(theta):
        z = (X @ theta.T @ HEAD.T)[:, 2:]
        return (np.log(np.exp(z).sum(1)) - z[range(3), Y - 2]).mean()

    def scored():
        return [
            loss for *_, loss in learner.score([task().test] * 3, [(2, 3)] * 3, 2)
        ]

    assert scored() == pytest.approx(
        [losses(thetas[0]), losses(thetas[1]), losses(BASE)], rel=1e-5
    )
    learner.load_local_parameters(
        learner.local_parameters()
    )  # the purely global model
    assert scored() == pytest.approx([losses(BASE)] * 3, rel=1e-5)


def test_closed_masks_leave_the_adaptive_parameters_alone():
    learner = linear()
    adaptive = np.array([[0.3, -0.2], [0.1, 0.4]])
    for base in (BASE, BASE * 100):
        learner.load_state_dict(
            {"tasks": {"0": entry(np.full((2, 1), -1e4), adaptive)}}
        )
        learner.receive({f"body.{NAME}": tensor(base)})
        assert learner._weights_of(0)[NAME].detach().numpy() == pytest.approx(
            adaptive
        )


def test_a_task_starts_from_the_shared_base(tiny_model, tiny_task):
    learner = FedWeit(tiny_model(), SGD, FedWeitSettings(mask=1.0))
    learner.begin(tiny_task(0), Round(1, 0))
    for name, base in learner.body.named_parameters():
        assert torch.allclose(
            learner._weights_of(0)[name], base * torch.sigmoid(torch.tensor(1.0))
        )


def test_what_is_borrowed_is_others_and_own_is_left_out(tiny_model, tiny_task):
    learner = FedWeit(tiny_model(), ADAM, FedWeitSettings())
    everybody = {
        n: torch.stack([torch.full_like(p, float(c)) for c in range(4)])
        for n, p in learner._base.items()
    }
    learner.receive_extra(everybody)
    learner.begin(tiny_task(0), Round(1, 0, client=2))
    assert all(
        others.unique().tolist() == [0.0, 1.0, 3.0]
        for others in learner._others.values()
    )
    assert all(
        alpha.tolist() == [0.0] * 3 for alpha in learner._attention.values()
    )
    learner.fit(tiny_task(0), Round(1, 0, client=2))
    expected = {
        n: torch.tensordot(a.detach(), learner._others[n], 1)
        for n, a in learner._attention.items()
    }
    assert any(value.abs().max() > 0 for value in expected.values())
    learner.end_task(tiny_task(0), Round(0, 0, client=2))
    assert all(
        torch.equal(learner._tasks[0].borrowed[n], value)
        for n, value in expected.items()
    )
    assert learner._others == learner._attention == {}
    with pytest.raises(ValueError, match="1 tensor do not fit"):
        learner.receive_extra({"1.weight": torch.zeros(2, 3)})


def test_small_adaptive_parameters_are_dropped_and_the_rest_is_shared(
    tiny_model, tiny_task
):
    learner = FedWeit(tiny_model(), ADAM, FedWeitSettings(sparsity=0.02))
    learner.fit(tiny_task(0), Round(1, 0))
    before = {name: a.clone() for name, a in learner._tasks[0].adaptive.items()}
    assert learner.share(tiny_task(0), Round(1, 0), ended=False) == {}
    report = learner.end_task(tiny_task(0), Round(0, 0))
    shared = learner.share(tiny_task(0), Round(0, 0), ended=True)
    assert {
        n: (str(a.numpy().dtype), tuple(a.shape)) for n, a in shared.items()
    } == learner.shares(ended=True)
    for name, a in shared.items():
        assert torch.equal(
            a,
            torch.where(
                before[name].abs() > 0.02, before[name], torch.tensor(0.0)
            ),
        )
    nonzero = sum(int((a != 0).sum()) for a in shared.values())
    assert 0 < nonzero < sum(a.numel() for a in shared.values())
    bits = sum(-(-a.numel() // 8) for a in shared.values())
    masks, base = 4 * (3 + 3 + 8 + 8), 4 * (3 + 3 + 96 + 8)
    assert report["knowledge-bytes"] == base + masks + 4 * nonzero + bits


def test_retention_keeps_past_weights_where_they_were(tiny_model, tiny_task):
    def drift(retention):
        learner = FedWeit(
            tiny_model(), ADAM, FedWeitSettings(retention=retention, sparsity=0.0)
        )
        learner.fit(tiny_task(0), Round(1, 0))
        learner.end_task(tiny_task(0), Round(0, 0))
        then = learner._weights_of(0)
        learner.fit(tiny_task(1), Round(1, 1))
        return sum(
            float((w - then[name]).detach().square().sum())
            for name, w in learner._weights_of(0).items()
        )

    assert drift(100.0) < 0.05 * drift(0.0)


def test_a_client_never_chosen_retains_the_shared_base_too():
    """It trains for itself when the task ends, yet B' is what it was sent, so an unmoved base
    costs nothing."""
    sent = np.array([[0.3, 0.0], [-0.6, 1.1]])
    learner = linear(sparsity=0.0, sent=0.5)

    def become(state):
        learner.load_state_dict(state)
        learner.receive({f"body.{NAME}": tensor(sent)})

    ends = []
    for chosen in (True, False):
        become({})
        if chosen:
            learner.fit(task(0), Round(1, 0))
            become(learner.state_dict())
        learner.end_task(task(0), Round(0, 0))
        state = learner.state_dict()
        assert (
            np.abs(unpack(state["tasks"]["0"]["adaptive"])[NAME].numpy()).max()
            > 0.01
        )  # trained either way
        assert state["base_then"][NAME].numpy() == pytest.approx(sent)
        become(state)
        learner.begin(task(1), Round(1, 0))
        assert learner._penalty().item() == 0.0
        ends.append(learner._weights_of(0)[NAME].detach().numpy())
    assert ends[0] == pytest.approx(ends[1])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(0.01, 1))
def test_units_with_the_largest_masks_are_sent(mask, fraction):
    there = (
        sent_units(
            torch.tensor(mask, dtype=torch.float64).view(-1, 1, 1), fraction
        )
        .flatten()
        .numpy()
    )
    assert there.sum() == max(1, int(np.ceil(fraction * len(mask))))
    assert min(np.array(mask)[there]) >= max(
        np.array(mask)[~there], default=-np.inf
    )


def test_units_that_are_not_sent_are_zero(tiny_model, tiny_task):
    learner = FedWeit(tiny_model(norm=True), ADAM, FedWeitSettings(sent=0.5))
    fresh = learner.send()
    assert all(
        (value != 0).all() for name, value in fresh.items() if "weight" in name
    )
    learner.fit(tiny_task(0), Round(1, 0))
    sent = learner.send()
    assert fresh.keys() == sent.keys()
    for name, units in (
        ("body.0.weight", 2),
        ("body.2.weight", 4),
        ("body.2.bias", 4),
    ):
        whole = (
            sent[name].flatten(1) if sent[name].dim() > 1 else sent[name][:, None]
        )
        assert int((whole != 0).all(1).sum()) == units
        assert int((whole == 0).all(1).sum()) == len(whole) - units
        assert not torch.signbit(
            sent[name][sent[name] == 0]
        ).any()  # a negative zero would travel
    assert (sent["body.3.running_var"] != 0).all()


@given(st.lists(st.sampled_from([0.0, 0.5, -2.0]), max_size=40))
def test_packed_tensors_come_back(values):
    tensors = {"a": torch.tensor(values).view(-1, 1), "b": torch.zeros(2, 3)}
    packed = pack(tensors)
    back = unpack(packed)
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    assert (
        packed_bytes(packed)
        == 4 * sum(v != 0 for v in values) + -(-len(values) // 8) + 1
    )


def test_state_comes_back_and_nothing_leaks(tiny_model, tiny_task):
    def ends(between):
        learner = FedWeit(
            tiny_model(norm=True, dropout=0.3), ADAM, FedWeitSettings()
        )
        arrays = learner.send()
        state = {}
        for number in range(3):
            everybody = {
                n: torch.full((2, *p.shape), 0.01 * number)
                for n, p in learner._base.items()
            }
            for message in (1, 2, 0):
                between(learner)
                learner.load_state_dict(state)
                learner.receive(arrays)
                if message == 1 and number:
                    learner.receive_extra(everybody)
                if message:
                    learner.fit(
                        tiny_task(number), Round(message, 10 * number + message)
                    )
                    arrays = learner.send()
                else:
                    learner.end_task(tiny_task(number), Round(0, number))
                state = learner.state_dict()
        tests = [tiny_task(number) for number in range(3)]
        scores = learner.score(
            [test.test for test in tests], [test.classes for test in tests], 64
        )
        return arrays, scores

    def somebody_else(learner):
        learner.load_state_dict({})
        learner.fit(tiny_task(1, seed=5), Round(1, 9))
        learner.end_task(tiny_task(1, seed=5), Round(0, 9))
        learner.load_local_parameters(learner.local_parameters())

    (alone, scores), (after_others, others_scores) = (
        ends(lambda learner: None),
        ends(somebody_else),
    )
    assert all(
        torch.equal(value, after_others[name]) for name, value in alone.items()
    )
    assert scores == others_scores
