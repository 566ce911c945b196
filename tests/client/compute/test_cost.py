"""What work costs: counts that a person can check, and the same whatever was counted before."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedknow.client.compute import cost
from fedknow.client.compute.cost import Cost, Meter, costs
from fedknow.client.compute.sizes import module_bytes, tensor_bytes
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners import LEARNERS, build_learner
from fedknow.client.learners.baselines import FedPer, Finetune
from fedknow.client.learners.fedknow.linearization import Linearization
from fedknow.client.learners.frames.extra_work import each
from fedknow.client.learners.frames.learner import LearnerSettings, Round
from fedknow.client.models import build_model
from fedknow.client.together import Start, price
from fedknow.protocols.config import ModelConfig, TrainConfig, read_config
from fedknow.protocols.work import COSTS

CLASSES = 10
BATCH = 4


def cnn6_layers(n):
    """Of the 6-layer CNN at n samples of 3x32x32: a forward pass of each layer, 2 x outputs x
    inputs of each output."""
    convolutions = [
        (3, 32, 32),
        (32, 32, 32),
        (32, 64, 16),
        (64, 64, 16),
        (64, 128, 8),
        (128, 128, 8),
    ]
    body = [
        2 * n * (side * side * out) * (9 * inputs)
        for inputs, out, side in convolutions
    ]
    return [*body, 2 * n * 1024 * (128 * 4 * 4)], 2 * n * CLASSES * 1024


@pytest.fixture(scope="module")
def cnn6():
    return build_model(ModelConfig(name="cnn6"), (3, 32, 32), CLASSES, 0)


def task(
    number=0, samples=BATCH, shape=(3, 32, 32), classes=tuple(range(CLASSES))
):
    draws = torch.Generator().manual_seed(number)

    def split(count):
        labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
        return Split(torch.randn(count, *shape, generator=draws), labels)

    return TaskData(
        number, classes, classes, split(samples), split(samples), False
    )


def test_a_step_of_the_six_layer_cnn_by_hand(cnn6):
    """Forward, gradients by weights, gradients by inputs but those of the first layer, whose
    inputs are images."""
    learner = Finetune(
        cnn6, TrainConfig(batch_size=BATCH, epochs=3), LearnerSettings()
    )
    with learner.meter.message():
        learner.fit(task(), Round(1, 0))
    body, head = cnn6_layers(BATCH)
    cost = learner.meter.cost
    assert cost.flops == 3 * (3 * (sum(body) + head) - body[0])
    size = module_bytes(cnn6)
    assert (cost.gradients, cost.moments) == (
        size,
        2 * size + 4 * len(list(cnn6.parameters())),
    )  # Adam, and its clocks
    with learner.meter.message():
        learner.score([task().test], [range(CLASSES)], 256)
    assert learner.meter.cost.flops == sum(body) + head


def test_pullback_and_pushforward_by_hand(cnn6):
    """J^T c is the backward pass; J u takes for each layer a pass with the weights' step, and one
    with the inputs'."""
    body, _ = cnn6_layers(BATCH)
    meter, model = Meter(), cnn6.body.train()
    at_body = Linearization(model, task().train.x)
    out = torch.empty(at_body.size)
    expected = 2 * sum(body) - body[0]  # of either
    with meter.message(), meter.part():
        at_body.pullback(torch.ones_like(at_body.features), out, forward=True)
    assert meter.cost.flops == expected
    with meter.message(), meter.part():
        at_body.pushforward(out)
    assert meter.cost.flops == expected


def test_what_training_keeps_for_the_backward_pass_by_hand():
    """x [5, 3] -> h [5, 7] -> relu -> z [5, 2]: h, relu(h) and z, and on the way back what
    replaces them."""
    first, second, x = nn.Linear(3, 7), nn.Linear(7, 2), torch.randn(5, 3)
    meter = Meter()
    with meter.message(), meter.part():
        second(F.relu(first(x))).sum().backward()
    weights = 4 * sum(
        p.numel() for p in (*first.parameters(), *second.parameters())
    )
    # At most: the hidden layer's output before and after ReLU, the gradients by both, and those
    # by the weights.
    assert (
        4 * 5 * 7 * 2 <= meter.cost.peak <= 4 * (5 * 7 * 4 + 5 * 2 * 2) + weights
    )
    assert meter.cost.flops == 2 * 5 * (3 * 7 * 2 + 7 * 2 * 3)
    with meter.message(), meter.part(), torch.no_grad():
        second(F.relu(first(x)))
    assert meter.cost == Cost(
        2 * 5 * (3 * 7 + 7 * 2), 4 * 5 * 7 * 2
    )  # h and relu(h) at once


def product(meter, n, key=None):
    with meter.part(key):
        torch.ones(n, n) @ torch.ones(n, n)


def test_a_key_is_counted_once_and_charged_each_time():
    meter = Meter()
    with meter.message():
        product(meter, 2, "small")
        product(meter, 9, "small")  # it said that it costs the same
        product(meter, 2)
    assert meter.cost == Cost(3 * 16, 3 * 16)
    with meter.message():
        assert meter.charge("small")
        assert not meter.charge("large")
    assert meter.cost == Cost(16, 48)


def test_parts_within_are_apart():
    meter = Meter()
    for inner in (
        2,
        3,
    ):  # the second time the outer part's cost is known, and the inner one's is not
        with meter.message(), meter.part("outer"):
            kept = torch.ones(4, 4) @ torch.ones(4, 4)
            product(meter, inner)
            with meter.free():
                product(meter, 50)
            meter.add(memory=1000)
        assert meter.cost == Cost(
            2 * 4**3 + 2 * inner**3, 1064 + 3 * 4 * inner**2
        )
        del kept
    with meter.message():
        torch.ones(4, 4) @ torch.ones(4, 4)  # in no part
    assert meter.cost == Cost()


def test_a_failure_leaves_the_meter_as_it_was():
    meter = Meter()
    with (
        pytest.raises(RuntimeError, match="no more"),
        meter.message(),
        meter.part("key"),
        meter.part(),
    ):
        raise RuntimeError("no more")
    with meter.message():
        product(meter, 2, "key")
    assert meter.cost == Cost(16, 48)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_counting_changes_no_number(tiny_model, tiny_task):
    def trained(meter):
        learner = FedPer(
            tiny_model(dropout=0.5, norm=True),
            TrainConfig(batch_size=8),
            LearnerSettings(),
        )
        with meter(learner):
            learner.fit(tiny_task(0), Round(1, 3))
        return learner.model.state_dict()

    @contextmanager
    def counting(learner):
        learner.meter.part = lambda key=None: Meter.part(learner.meter)
        with learner.meter.message(), learner.meter.part():
            yield

    @contextmanager
    def silent(learner):
        with learner.meter.free():
            yield

    counted, plain = trained(counting), trained(silent)
    assert all(torch.equal(value, plain[name]) for name, value in counted.items())


SMALL = {
    "model": {"name": "cnn", "channels": 4, "hidden": 16},
    "train": {"batch_size": 8, "epochs": 2},
}


def career(build, always=False, count=3):
    """Costs of a client's work in some tasks; ``build`` gives the learner for each message."""
    state, found, extra, arrays = {}, [], {}, build().send()
    tasks = [task(t, 20, (1, 8, 8), (2 * t, 2 * t + 1)) for t in range(count)]

    def fit(learner, data):
        learner.fit(data, Round(1, data.task))

    def end(learner, data):
        with learner.meter.part():
            learner.end_task(data, Round(0, data.task))
            learner.share(data, Round(0, data.task), True)

    def score(learner, data):
        learner.score(
            [t.test for t in tasks[: data.task + 1]],
            [t.head for t in tasks[: data.task + 1]],
            16,
        )

    for data in tasks:
        for work in (fit, end, score):
            learner = build()
            if always:
                learner.meter.part = lambda key=None, meter=learner.meter: (
                    Meter.part(meter)
                )
            learner.load_state_dict(state)
            learner.receive(arrays)
            if data.task and extra:
                learner.receive_extra(extra)
            with learner.meter.message():
                work(learner, data)
            found.append(learner.meter.cost)
            if work is not score:
                state, arrays = learner.state_dict(), learner.send()
    return found


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in LEARNERS
        if name not in ("fedavg", "joint-central", "joint-central-equal")
    ],
)
def test_keys_tell_all_that_a_cost_depends_on(name):
    """What is charged is what is counted when everything is counted, and whatever the process
    counted before."""
    train = LEARNERS[name].model_train
    config = read_config(SMALL | {"learner": name}, [f"model.train={train}"])

    def build():
        return build_learner(config, (1, 8, 8), 6)

    one = build()
    found = career(lambda: one)
    assert found == career(build)
    assert found == career(build, always=True)
    assert all(cost.flops > 0 for cost in found[::3] + found[2::3])


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 1, "select": "batch"},
        {"path": "full"},
        {"integrator": "bounded", "tolerance": 0.01},
        {"integrator": "bounded", "restore_from": 0.5},
        {"integrator": "surrogate"},
        {"integrator": "online"},
        {"integrator": "online", "k": 2},
        {"restore_from": 0.5},
        {"restore_from": 0.5, "path": "full"},
        {"integrator": "sum"},
        {"post_aggregation": "extra-epoch"},
        {"every": 2},
        {"extractor": "low-rank"},
        {"extractor": "filters", "infer_task": "energy"},
        {"k": 1, "candidates": 1},
        {"k": 2, "candidates": 1, "select": "batch"},
    ],
)
def test_keys_of_fedknow(options):
    config = read_config(SMALL | {"learner": {"name": "fedknow", **options}})
    count = 5 if "candidates" in options else 3
    one = build_learner(config, (1, 8, 8), 2 * count)
    found = career(lambda: one, count=count)
    assert found == career(
        lambda: build_learner(config, (1, 8, 8), 2 * count),
        always=True,
        count=count,
    )


def test_samples_learned_from_when_a_task_ends():
    """Those of a scratch copy's fine-tuning, and of a client's training that was never chosen; 0
    without such work."""
    for name, trained, never in (
        ("fedknow", 3 * 20, 3 * 20 + 2 * 20),
        ("fedper", 0, 2 * 20),
        ("ewc", 20, 20 + 2 * 20),
    ):
        for done, expected in ((True, trained), (False, never)):
            learner = build_learner(
                read_config(SMALL | {"learner": name}), (1, 8, 8), 2
            )
            data = task(0, 20, (1, 8, 8), (0, 1))
            for _ in range(2):  # counted, then charged
                learner.load_state_dict({})
                if done:
                    learner.fit(data, Round(1, 0))
                with learner.meter.message():
                    learner.end_task(data, Round(0, 0))
                    assert learner.meter.samples == expected
                assert learner.meter.cost.samples == expected


def test_a_flag_that_changes_a_step_makes_another_kind_of_step(
    tiny_model, tiny_task
):
    class Twice(Finetune):
        def gradient(self, batch):
            if self.twice:
                super().gradient(batch)
            return super().gradient(batch)

    learner, flops = (
        Twice(tiny_model(), TrainConfig(epochs=1), LearnerSettings()),
        [],
    )
    for learner.twice in (False, True):
        with learner.meter.message():
            learner.fit(tiny_task(0), Round(1, 0))
        flops.append(learner.meter.cost.flops)
    assert flops[1] == 2 * flops[0]


def test_clients_trained_at_once_cost_what_one_by_one_does(tiny_model, tiny_task):
    train = TrainConfig(epochs=3, batch_size=8, optimizer="sgd")
    learner, other = (
        Finetune(tiny_model(), train, LearnerSettings()) for _ in range(2)
    )
    for samples in (20, 5, 16):
        data = tiny_task(0, samples)
        with learner.meter.message():
            learner.fit(data, Round(1, 0))
        assert price(other, Start({}, data, Round(1, 0))) == learner.meter.cost


def test_the_sum_of_what_is_needed():
    found = costs(
        Cost(flops=10, peak=70, gradients=30, moments=60),
        weights=30,
        knowledge=5,
        replay=2,
    )
    assert tuple(found) == COSTS
    assert list(found.values()) == [10, 30 + 90 + 40 + 5 + 2, 30, 90, 40, 5, 2]
    assert all(isinstance(value, float) for value in found.values())
    assert (
        tensor_bytes(
            {
                "a": torch.ones(3),
                "b": [torch.ones(2, dtype=torch.int64), 7],
                "c": "x",
            }
        )
        == 28
    )


def test_what_is_asked_for_without_a_meter_is_charged_to_the_message_under_way():
    meter = Meter()
    with meter.message():
        for n in each((2, 2), "loop", 2):
            torch.ones(n, n) @ torch.ones(n, n)
        with cost.free():
            torch.ones(9, 9) @ torch.ones(9, 9)
        with cost.declared():
            torch.ones(9, 9) @ torch.ones(9, 9)
            cost.add(flops=5)
    assert meter.cost.flops == 2 * 16 + 5
    with cost.part("nothing"), cost.free(), cost.declared():  # without a message
        cost.add(flops=7)
    assert meter.cost.flops == 2 * 16 + 5


def leave_by_error(meter, loop):
    with meter.message(), meter.part():
        for _ in loop:
            raise RuntimeError("no more")


def test_a_loop_that_an_error_leaves_ends_its_part():
    meter = Meter()
    for n in (2, 3):
        loop = each((n, n), "loop")
        with pytest.raises(RuntimeError, match="no more"):
            leave_by_error(meter, loop)
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        assert not meter.parts
        del loop
    with meter.message():
        product(meter, 2)
    assert meter.cost.flops == 16
