"""FedKNOW's client: restored gradients, integrated steps, and the traps that must not come back."""

import copy
from dataclasses import replace

import pytest
import torch
from scipy.optimize import nnls
from torch.nn import functional as F

from fedknow.client.data.stream import Split
from fedknow.client.learners.fedknow import integrator as integrators
from fedknow.client.learners.fedknow import negative_transfer, selection
from fedknow.client.learners.fedknow.knowledge import Knowledge
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.restorer import (
    restored_cotangent,
    soft_labels,
)
from fedknow.client.learners.fedknow.settings import (
    FedKnowPlusSettings,
    FedKnowSettings,
)
from fedknow.client.learners.frames.learner import (
    Batch,
    Diverged,
    HeadSlice,
    Round,
)
from fedknow.client.learners.frames.scoring import logits
from fedknow.client.state import load_state, save_state
from fedknow.protocols.config import ConfigError, TrainConfig

TRAIN = TrainConfig(epochs=2, batch_size=8, lr=0.01, weight_decay=1e-2)
PAPER = {"margin": 0.0, "temperature": 2.0}
"""What a step of the paper has besides the defaults here, which are FedKNOW plus's."""


def learner(tiny_model, train=TRAIN, model=None, **settings):
    return FedKnow(
        model or tiny_model(),
        train,
        FedKnowPlusSettings(**({"rho": 0.3, "finetune_epochs": 2} | settings)),
    )


def live_through(client, tasks, rounds=2):
    """Train and end tasks one after another; the client's own body is the aggregate."""
    for task in tasks:
        for number in range(1, rounds + 1):
            client.receive(client.send())
            client.fit(task, Round(number, 17 * task.task + number))
        client.end_task(task, Round(0, 99 + task.task))
    return client


def test_cotangent_is_the_gradient_of_the_soft_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(
        5, 4, generator=generator, dtype=torch.float64, requires_grad=True
    )
    y = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    target = soft_labels(y, FedKnowSettings(temperature=2.0))
    loss = -(target * (z / 2.0).log_softmax(1)).sum(1).mean()
    (expected,) = torch.autograd.grad(loss, z)
    assert torch.allclose(restored_cotangent(z.detach(), target, 2.0), expected)


def test_cotangent_by_hand():
    # One sample, equal logits: softmax = (1/2, 1/2); the knowledge is sure of class 0; T = 2, B
    # = 1.
    cotangent = restored_cotangent(
        torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), 2.0
    )
    assert cotangent.tolist() == [[-0.25, 0.25]]


def test_soft_and_hard_labels_by_hand():
    logits = torch.tensor([[2.0, 0.0]])
    e = torch.e
    assert soft_labels(logits, FedKnowSettings(temperature=2.0))[
        0
    ].tolist() == pytest.approx([e / (1 + e), 1 / (1 + e)])
    assert soft_labels(logits, FedKnowSettings(labels="hard")).tolist() == [
        [1.0, 0.0]
    ]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    "choices",
    [{}, {"margin": 0.0}, {"path": "full"}, {"temperature": 2.0}, PAPER],
)
def test_step_equals_a_plain_reference_with_one_backward_a_loss(
    tiny_model, tiny_task, norm, dropout, choices
):
    """Compare the shared graph with losses differentiated one by one, and SciPy."""
    model = tiny_model(norm=norm, dropout=dropout).double()
    client = learner(tiny_model, model=model, **choices)
    tasks = [as_double(tiny_task(t)) for t in range(3)]
    live_through(client, tasks[:2])
    state = client.state_dict()
    current = tasks[2]
    client.begin(current, Round(1, 5))
    client.begin_epoch(0)
    model.train()
    head = HeadSlice(current.head, 6)
    index = torch.arange(8)
    batch = Batch(
        current.train.x[index], head.labels(current.train.y[index]), index, head
    )
    torch.manual_seed(1)
    client.gradient(batch)
    ours = torch.cat([p.grad.flatten() for p in model.body.parameters()])

    def gradient(loss_of):
        torch.manual_seed(1)  # the same dropout mask
        loss = loss_of(model(batch.x))
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, list(model.body.parameters()))
            ]
        )

    g = gradient(lambda z: F.cross_entropy(z[:, list(current.classes)], batch.y))
    rows = []
    hot, margin = choices.get("temperature", 1.0), choices.get("margin", 0.5)
    for past in (0, 1):
        teacher = tiny_model(seed=5, norm=norm).double()
        knowledge = Knowledge.from_state(state["knowledge"][str(past)])
        target = (knowledge.logits(teacher.body, batch.x, 4) / hot).softmax(1)
        classes = list(tasks[past].classes)
        rows.append(
            gradient(
                lambda z, c=classes, t=target: (
                    -(t * (z[:, c] / hot).log_softmax(1)).sum(1).mean()
                )
            )
        )
    signature = torch.stack(rows).numpy()
    towards = g.numpy() + margin * signature.sum(
        0
    )  # v >= margin is v = margin + w, w >= 0
    expected = towards + signature.T @ nnls(signature.T, -towards)[0]
    assert torch.allclose(ours, torch.from_numpy(expected), atol=1e-9)


def test_the_head_is_averaged_only_where_that_is_asked_for(tiny_model):
    assert not any(
        name.startswith("head.") for name in learner(tiny_model).send()
    )
    everything = learner(tiny_model, exchange="all")
    assert any(name.startswith("head.") for name in everything.send())
    assert everything.ends_task  # else nothing would be known


def as_double(task):
    return replace(
        task,
        train=Split(task.train.x.double(), task.train.y),
        test=Split(task.test.x.double(), task.test.y),
    )


def test_every_step_satisfies_every_signature_task(
    tiny_model, tiny_task, monkeypatch
):
    products = []

    def watched(g, signature):
        result = integrate(g, signature)
        lengths = signature.norm(dim=1) * g.norm()
        products.append(
            ((signature @ result.gradient) / lengths.clamp_min(1e-30))
            .min()
            .item()
        )
        return result

    integrate = integrators.integrate
    monkeypatch.setattr(integrators, "integrate", watched)
    live_through(
        learner(tiny_model, path="full"), [tiny_task(t) for t in range(3)]
    )
    assert (
        len(products) == 2 * 2 * 2 * 3
    )  # tasks 1 and 2, rounds, epochs, batches
    assert min(products) >= -1e-5


def flat(state, prefix=""):
    """A state as one level of copies."""
    out = {}
    for key, value in state.items():
        deeper = (
            flat(value, f"{prefix}{key}/")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
        out.update(
            {
                name: v.clone() if torch.is_tensor(v) else v
                for name, v in deeper.items()
            }
        )
    return out


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if torch.is_tensor(v) else v == b[k]
        for k, v in a.items()
    )


@pytest.mark.parametrize("kind", [{}, {"norm": True, "dropout": 0.5}])
def test_knowledge_is_bit_identical_after_later_tasks(
    tiny_model, tiny_task, kind
):
    client = live_through(
        learner(tiny_model, model=tiny_model(**kind)), [tiny_task(0)]
    )
    before = flat(client.state_dict()["knowledge"]["0"])
    assert ("whole/3.running_mean" in before) is bool(kind)
    live_through(client, [tiny_task(1), tiny_task(2)])
    assert same(flat(client.state_dict()["knowledge"]["0"]), before)


def test_a_step_changes_neither_task_nor_batch_nor_answers(tiny_model, tiny_task):
    """The authors' loop overwrote the task's index and drew new teacher outputs in every step."""
    client = live_through(
        learner(tiny_model, k=1, model=tiny_model(dropout=0.5)),
        [tiny_task(0), tiny_task(1)],
    )
    task = tiny_task(2)
    copies = task.task, task.train.x.clone(), task.train.y.clone()
    client.fit(task, Round(1, 1))
    before = flat(client.state_dict()["answers"])
    client.fit(task, Round(2, 2))
    assert (task.task, client.state_dict()["answers_task"]) == (copies[0], 2)
    assert torch.equal(task.train.x, copies[1])
    assert torch.equal(task.train.y, copies[2])
    assert same(flat(client.state_dict()["answers"]), before)


def test_answers_for_other_samples_are_not_used(tiny_model, tiny_task):
    client = live_through(learner(tiny_model), [tiny_task(0)])
    client.fit(tiny_task(1), Round(1, 1))
    client.fit(tiny_task(1, samples=26), Round(2, 2))  # more data arrived
    assert len(client.state_dict()["answers"]["0"]) == 26


def test_knowledge_survives_any_training_rate(tiny_model, tiny_task):
    """Fine-tuning has a rate of its own: Adam with SGD's 0.5 would make noise."""
    train = TrainConfig(
        epochs=5, batch_size=8, optimizer="sgd", lr=0.5, weight_decay=0.0
    )
    client = live_through(learner(tiny_model, train=train), [tiny_task(0)])
    knowledge, task = client._restorer.knowledge[0], tiny_task(0)
    right = (
        (
            knowledge.logits(tiny_model(seed=3).body, task.train.x, 64).argmax(1)
            == task.train.y
        )
        .float()
        .mean()
    )
    assert right == 1.0


def test_fine_tuning_that_diverges_is_said(tiny_model, tiny_task):
    client, task = learner(tiny_model), tiny_task(0)
    client.fit(task, Round(1, 1))
    task.train.x.fill_(float("nan"))
    with pytest.raises(Diverged, match="knowledge"):
        client.end_task(task, Round(0, 1))


def test_teacher_answers_are_constant_within_a_task(tiny_model, tiny_task):
    client = live_through(learner(tiny_model), [tiny_task(0)])
    client.fit(tiny_task(1), Round(1, 1))
    first = client.state_dict()["answers"]["0"].clone()
    for number in (2, 3):
        client.receive(
            {name: value + 0.1 for name, value in client.send().items()}
        )
        client.fit(tiny_task(1), Round(number, number))
        assert torch.equal(client.state_dict()["answers"]["0"], first)
    assert client.state_dict()["answers_task"] == 1


def test_other_tasks_rows_of_the_head_do_not_move(tiny_model, tiny_task):
    client = live_through(learner(tiny_model), [tiny_task(0)])
    rows = client.head.weight.detach()[[0, 1, 4, 5]].clone()
    client.fit(tiny_task(1), Round(1, 1))
    assert torch.equal(client.head.weight.detach()[[0, 1, 4, 5]], rows)
    assert not torch.equal(client.head.weight.detach()[[2, 3]], rows[:2])


def test_a_client_never_chosen_ends_the_task_with_knowledge(
    tiny_model, tiny_task
):
    client = learner(tiny_model)
    report = client.end_task(tiny_task(0), Round(0, 1))
    assert set(client.state_dict()["knowledge"]) == {"0"}
    assert report["knowledge-bytes"] > 0
    assert client.state_dict()["trained_task"] == 0
    # It joins only in task 2, having missed task 1 altogether: its end was announced all the same.
    client.end_task(tiny_task(1), Round(0, 2))
    client.fit(tiny_task(2), Round(1, 3))
    assert sorted(client.state_dict()["answers"]) == ["0", "1"]


def test_head_kept_by_the_client_survives_extraction(tiny_model, tiny_task):
    client = learner(tiny_model)
    client.fit(tiny_task(0), Round(1, 1))
    kept = client.local_parameters()
    client.receive(
        {name: torch.zeros_like(value) for name, value in client.send().items()}
    )
    client.end_task(tiny_task(0), Round(0, 1))
    assert all(
        torch.equal(value, kept[name])
        for name, value in client.local_parameters().items()
    )


def test_extraction_from_the_own_or_the_shared_model(tiny_model, tiny_task):
    for source, expect_zero in (("local", False), ("global", True)):
        client = learner(tiny_model, extract_from=source, finetune_epochs=0)
        client.fit(tiny_task(0), Round(1, 1))
        client.receive(
            {
                name: torch.zeros_like(value)
                for name, value in client.send().items()
            }
        )
        client.end_task(tiny_task(0), Round(0, 1))
        assert (
            bool((client.state_dict()["knowledge"]["0"]["values"] == 0).all())
            is expect_zero
        )


def test_at_most_k_signature_tasks_are_restored(tiny_model, tiny_task):
    client = live_through(learner(tiny_model, k=1), [tiny_task(0), tiny_task(1)])
    report = client.fit(tiny_task(2), Round(1, 1))
    # The first batch chooses among both; all of them are integrated with one.
    assert report["signature-tasks"] == 1
    every_batch = live_through(
        learner(tiny_model, k=1, select="batch"), [tiny_task(0), tiny_task(1)]
    )
    assert every_batch.fit(tiny_task(2), Round(1, 1))["signature-tasks"] == 1
    ignored = live_through(learner(tiny_model, integrator="off"), [tiny_task(0)])
    assert ignored.fit(tiny_task(1), Round(1, 1))["signature-tasks"] == 0
    assert (
        learner(tiny_model, k=10).fit(tiny_task(0), Round(1, 1)).keys()
        == report.keys()
    )


def test_signature_tasks_chosen_every_batch_come_from_all_past_tasks(
    tiny_model, tiny_task, monkeypatch
):
    offered = []
    choose = selection.most_dissimilar
    monkeypatch.setattr(
        selection,
        "most_dissimilar",
        lambda g, rows, k, form: (
            offered.append(len(rows := list(rows))) or choose(g, rows, k, form)
        ),
    )
    for select, times in (("batch", 2 * 3), ("round", 1)):
        offered.clear()
        client = live_through(
            learner(tiny_model, k=1, select=select), [tiny_task(0), tiny_task(1)]
        )
        offered.clear()
        client.fit(tiny_task(2), Round(1, 1))
        assert offered == [2] * times


@pytest.mark.parametrize("form", ["off", "first-epoch", "extra-epoch"])
def test_post_aggregation_turns_g_a_towards_g_b(
    tiny_model, tiny_task, monkeypatch, form
):
    calls = []
    closed_form = negative_transfer.integrate_one

    def watched(g_a, g_b):
        result = closed_form(g_a, g_b)
        calls.append(
            torch.dot(result, g_b).item()
            / max(float(result.norm() * g_b.norm()), 1e-30)
        )
        return result

    monkeypatch.setattr(negative_transfer, "integrate_one", watched)
    client = learner(tiny_model, post_aggregation=form)
    client.fit(tiny_task(0), Round(1, 1))
    assert not calls  # nothing was aggregated yet
    client.receive({name: -value for name, value in client.send().items()})
    client.fit(tiny_task(0), Round(2, 2))
    assert len(calls) == (0 if form == "off" else 3)
    assert 0 <= client.counts()["opposed"] <= 1
    assert all(cosine >= -1e-5 for cosine in calls)
    assert client.epochs == TRAIN.epochs + (form == "extra-epoch")


def test_g_b_is_the_gradient_at_the_model_before_aggregation(
    tiny_model, tiny_task, monkeypatch
):
    seen = []
    closed_form = negative_transfer.integrate_one

    def watched(g_a, g_b):
        seen.append(g_b.clone())
        return closed_form(g_a, g_b)

    monkeypatch.setattr(negative_transfer, "integrate_one", watched)
    whole = TRAIN.model_copy(update={"batch_size": 64, "epochs": 1})
    client = learner(tiny_model, train=whole, post_aggregation="first-epoch")
    task = tiny_task(0)
    client.fit(task, Round(1, 1))
    before = copy.deepcopy(client.model)
    client.receive({name: -value for name, value in client.send().items()})
    client.fit(task, Round(2, 2))
    loss = F.cross_entropy(before(task.train.x)[:, :2], task.train.y)
    parts = torch.autograd.grad(loss, list(before.body.parameters()))
    expected = torch.cat([part.flatten() for part in parts])
    (g_b,) = seen
    assert g_b.norm() > 0
    assert torch.allclose(g_b, expected, atol=1e-6)


def test_a_task_has_no_teacher_of_its_own(tiny_model, tiny_task):
    client = live_through(
        learner(tiny_model), [tiny_task(0), tiny_task(1), tiny_task(2)]
    )
    restorer = client._restorer
    assert restorer.tasks_before(1) == [0]
    assert restorer.tasks_before(3) == [0, 1, 2]


@pytest.mark.parametrize("post", ["off", "first-epoch"])
def test_state_round_trip_is_the_same_client(
    tiny_model, tiny_task, tmp_path, post
):
    client = live_through(
        learner(tiny_model, post_aggregation=post), [tiny_task(0), tiny_task(1)]
    )
    client.fit(tiny_task(2), Round(1, 1))
    body = client.send()
    save_state(tmp_path / "state.safetensors", client.state_dict())

    def go_on(other):
        other.receive(body)
        other.fit(tiny_task(2), Round(2, 2))
        other.end_task(tiny_task(2), Round(0, 3))
        return other

    fresh = learner(tiny_model, post_aggregation=post)
    fresh.fit(tiny_task(5 // 2), Round(1, 8))  # somebody else was here before
    fresh.load_state_dict(load_state(tmp_path / "state.safetensors"))
    a, b = go_on(fresh), go_on(client)
    assert all(
        torch.equal(value, a.send()[name]) for name, value in b.send().items()
    )
    theirs, ours = (x.state_dict()["knowledge"]["2"] for x in (a, b))
    assert torch.equal(theirs["values"], ours["values"])


def test_answers_for_past_tasks_drift_less_with_integration(
    tiny_model, tiny_task
):
    """After a third task, the model disagrees less with what the knowledge of the first two says
    of its samples."""

    def drift(integrator):
        client = live_through(
            learner(tiny_model, integrator=integrator),
            [tiny_task(0), tiny_task(1)],
        )
        current = tiny_task(2)
        for number in range(1, 9):
            client.fit(current, Round(number, number))
        z = logits(client, current.train.x, 64)
        # Another temperature, and teachers that are asked: with "off" they are not.
        state = client.state_dict() | {"answers": {}}
        client = learner(tiny_model, model=client.model, temperature=2.0)
        client.load_state_dict(state)
        client.begin(current, Round(9, 9))
        answers = client.state_dict()["answers"]
        losses = [
            -(answers[str(t)] * (z[:, [2 * t, 2 * t + 1]] / 2.0).log_softmax(1))
            .sum(1)
            .mean()
            .item()
            for t in (0, 1)
        ]
        return sum(losses)

    assert drift("qp") < drift("off")
    assert drift("sum") < drift("off")


@pytest.mark.parametrize(
    "fault", ["no weight matrices", "needs a bias", r"set model\.neck"]
)
def test_models_it_cannot_train_are_refused(tiny_model, fault):
    model = tiny_model()
    if fault == "no weight matrices":
        model.body = torch.nn.Flatten()
    elif fault == "needs a bias":
        model.head = torch.nn.Linear(8, 6, bias=False)
    else:
        model.body.requires_grad_(False)
    with pytest.raises(ConfigError, match=fault):
        FedKnow(model, TRAIN, FedKnowSettings())
