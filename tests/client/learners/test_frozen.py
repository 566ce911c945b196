"""Parameters that are frozen, unused, tied or of a kind that no learner trains: one matrix over
all learners."""

import numpy as np
import pytest
import torch
from torch import nn

from fedknow.client.learners import build_learner, learner_class, list_learners
from fedknow.client.learners.baselines import FedPer, Finetune
from fedknow.client.learners.frames.learner import LearnerSettings, Round
from fedknow.client.learners.frames.rehearsal import Replay, columns
from fedknow.client.learners.joint import JointCentral
from fedknow.client.models import SplitModel
from fedknow.protocols.config import ConfigError, TrainConfig, read_config
from fedknow.simulations.simulate import simulate
from fedknow.strategies.subspaces import project, restrict

TRAIN = TrainConfig(
    epochs=2,
    batch_size=6,
    optimizer="adamw",
    lr=0.01,
    weight_decay=0.1,
    clip_norm=1.0,
)
MOVES_ALL = {"weight_decay": 0.1, "lr": 0.01, "epochs": 1}


def layered():
    """Layers with a ReLU after each, the first frozen and the second's bias; what every method can
    take."""
    body = nn.Sequential(
        nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8), nn.ReLU()
    )
    body[0].requires_grad_(False)
    body[3].bias.requires_grad_(False)
    return SplitModel(body, nn.Linear(8, 6))


class Loose(nn.Module):
    """A body with a layer it never uses, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.never = (
            nn.Linear(4, 8),
            nn.Linear(8, 8),
            nn.Linear(3, 2),
        )
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.first(x.flatten(1)).relu()).relu()


class Tied(nn.Module):
    """A body that uses one weight twice."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.two = (
            nn.Linear(4, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )
        self.two.weight = self.one.weight

    def forward(self, x):
        x = self.one(self.first(x.flatten(1)).relu()).relu()
        return self.two(x).relu()


def frozen_head():
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 6)
    )
    model.head.weight.requires_grad_(False)
    return model


MODELS = {
    "layered": layered,
    "loose": lambda: SplitModel(Loose(), nn.Linear(8, 6)),
    "tied": lambda: SplitModel(Tied(), nn.Linear(8, 6)),
    "frozen head": frozen_head,
}
FROZEN = [
    name for name in list_learners() if learner_class(name).needs_frozen_body
]
"""Learners that take a body which is frozen as a whole, and no other."""
ADAPTED = [
    name for name in list_learners() if learner_class(name).model_train == "lora"
]
"""Learners that take adapters, and no other layers."""
REFUSED = (
    {("agscl", "loose"), ("agscl", "tied"), ("fot", "tied")}
    | {("fedprotip", "tied")}
    | {(name, model) for name in FROZEN + ADAPTED for model in MODELS}
)
NEEDED = (
    {(name, "head") for name in FROZEN + ADAPTED}
    | {(name, "body") for name in ADAPTED}
    | {
        (name, "body")
        for name in (
            "fedrep",
            "fedweit",
            "fedknow",
            "fedknow-plus",
            "fot",
            "fedprotip",
            "loci",
        )
    }
    | {
        ("fedrep", "head"),
        ("co2l", "head"),
    }
)
"""Parts that a method has to train."""


def make(name, model="layered", train=TRAIN, **options):
    torch.manual_seed(3)
    kind = learner_class(name)
    return kind(MODELS[model](), train, kind.Settings(**options))


def values(learner):
    return {
        name: value.detach().clone()
        for name, value in learner.model.named_parameters()
    }


def fit(learner, task, round):
    if not isinstance(learner, JointCentral):
        return learner.fit(task, round)
    head = columns(task.head, 6).expand(
        len(task.train), -1
    )  # its server trains, on everybody's samples
    return learner.fit_on(
        Replay(task.train.x, task.train.y, head), len(task.train), task, round
    )


def live_through(learner, tiny_task, tasks=2):
    """Several tasks of two rounds; the client is saved and loaded between two."""
    for task in range(tasks):
        for number in (1, 2):
            fit(
                learner,
                tiny_task(task),
                Round(number, 10 * task + number, proximal_mu=0.1),
            )
            state, sent = learner.state_dict(), learner.send()
            learner.load_state_dict({})
            learner.load_state_dict(state)
            learner.receive(sent)
        learner.end_task(tiny_task(task), Round(0, 10 * task))


def names_in(tree):
    """All keys of nested mappings."""
    for key, value in tree.items():
        yield key
        if isinstance(value, dict):
            yield from names_in(value)


def models_of(learner):
    """The learner's model, and whatever models it works with besides."""
    return [
        part for part in vars(learner).values() if isinstance(part, SplitModel)
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", list_learners())
def test_a_frozen_or_unused_parameter_never_moves(tiny_task, name, model):
    if (name, model) in REFUSED:
        with pytest.raises(
            ConfigError, match=f"learner.name = '{name}' cannot train this model"
        ):
            make(name, model)
        return
    learner = make(name, model)
    before = values(learner)
    still = {
        n for n, p in learner.model.named_parameters() if not p.requires_grad
    }
    live_through(learner, tiny_task)
    for part in models_of(learner):
        after = dict(part.named_parameters())
        assert all(torch.equal(after[n], before[n]) for n in still)
    assert not still & (learner.send() | learner.local_parameters()).keys()
    kept = set(names_in(learner.state_dict()))
    assert not {n for n in still if n in kept or n.removeprefix("body.") in kept}
    assert [
        n for n, p in learner.model.named_parameters() if not p.requires_grad
    ] == [n for n in before if n in still]
    if model == "loose":
        now = values(learner)
        assert all(
            torch.equal(now[n], before[n]) for n in before if ".never." in n
        )
    moved = {
        n
        for n, value in values(learner).items()
        if not torch.equal(value, before[n])
    }
    assert moved == {n for n in before if n not in still and ".never." not in n}


@pytest.mark.parametrize(
    "options",
    [
        {"post_aggregation": "extra-epoch"},
        {"restore_from": 0.5},
        {"path": "full"},
    ],
)
def test_fedknows_other_ways_leave_frozen_and_unused_parameters_alone(
    tiny_task, options
):
    learner = make("fedknow", "loose", **options)
    before = values(learner)
    live_through(learner, tiny_task)
    now = values(learner)
    assert all(
        torch.equal(now[n], before[n])
        for n in before
        if ".never." in n or ".frozen." in n
    )
    assert not torch.equal(now["body.first.weight"], before["body.first.weight"])


def test_knowledge_is_of_what_is_trained_alone(tiny_task):
    """Layered: the one matrix to train has 96 entries, of which rho = 0.5 are kept; what is frozen
    is not kept."""
    learner = make("fedknow", "layered", rho=0.5)
    learner.fit(tiny_task(0), Round(1, 0))
    learner.end_task(tiny_task(0), Round(0, 0))
    knowledge = learner.state_dict()["knowledge"]["0"]
    assert (len(knowledge["values"]), knowledge["whole"]) == (48, {})


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_head_is_refused_where_the_server_sets_it(name):
    model = layered().requires_grad_(False)
    kind = learner_class(name)
    with pytest.raises(ConfigError, match="parameters of its head are frozen"):
        kind(model, TRAIN, kind.Settings())


@pytest.mark.parametrize("part", ["body", "head"])
@pytest.mark.parametrize("name", list_learners())
def test_a_part_frozen_as_a_whole_is_trained_around_or_refused(
    tiny_task, name, part
):
    torch.manual_seed(3)
    model = layered()
    getattr(model, part).requires_grad_(False)
    kind = learner_class(name)
    if (name, part) in NEEDED:
        with pytest.raises(
            ConfigError, match=f"learner.name = '{name}' cannot train this model"
        ):
            kind(model, TRAIN, kind.Settings())
        return
    learner = kind(model, TRAIN, kind.Settings())
    before = values(learner)
    live_through(learner, tiny_task)
    now = values(learner)
    assert all(
        torch.equal(now[n], before[n]) for n in before if n.startswith(f"{part}.")
    )


def test_tied_weights_travel_once(tiny_task):
    learner = make("finetune", "tied")
    assert "body.one.weight" in learner.send()
    assert "body.two.weight" not in learner.send() | learner.local_parameters()
    sent = {
        name: torch.full_like(value, 0.5)
        for name, value in learner.send().items()
    }
    learner.receive(sent)
    assert learner.model.body.two.weight is learner.model.body.one.weight
    assert float(learner.model.body.two.weight.detach().min()) == 0.5


# --- together, with the halves on the server
# --------------------------------------------------------------------------

BUILT = []


def registered(shape, classes):
    """A model with a frozen and an unused layer, and how it was when it was built."""
    channels, height, width = shape
    model = SplitModel(
        nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * width, 4), Loose()
        ),
        nn.Linear(8, classes),
    )
    BUILT.append(
        (model, {n: p.detach().clone() for n, p in model.named_parameters()})
    )
    return model


@pytest.mark.parametrize(
    ("learner", "strategy"),
    [
        ("fot", ""),
        ("target", ""),
        ("flcn", ""),
        ("fedweit", ""),
        ("joint-central", ""),
        ("fedavg", "fedadam"),
        ("fedavg", "fedyogi"),
        ("fedavg", "fedavgm"),
    ],
)
def test_it_moves_neither_here_nor_on_the_server(tmp_path, learner, strategy):
    BUILT.clear()
    changes = [
        f"model={__name__}:registered",
        f"learner={learner}",
        *([f"strategy={strategy}"] if strategy else []),
        *(
            [
                "learner.samples=8",
                "learner.generator_steps=2",
                "learner.student_steps=2",
            ]
            if learner == "target"
            else []
        ),
    ]
    data = {
        "clients": 2,
        "tasks": 2,
        "classes_per_task": 2,
        "classes_max": 2,
        "samples": 0.05,
        "test_samples": 0.2,
    }
    train = MOVES_ALL | {"rounds": 2}
    config = read_config(
        {"data": data, "train": train, "engine": {"backend": "inline"}}, changes
    )
    result = simulate(config, tmp_path / "run", report=False)
    assert not [name for name in result.arrays if ".frozen." in name]
    moved = set()
    for model, before in BUILT:
        for name, parameter in model.named_parameters():
            if ".frozen." in name:
                assert torch.equal(parameter, before[name])
            elif ".never." in name:
                assert torch.allclose(
                    parameter, before[name], rtol=1e-6, atol=1e-8
                )
            elif not torch.equal(parameter, before[name]):
                moved.add(name)
    assert {"body.1.weight", "body.2.first.weight", "head.weight"} <= moved


@pytest.mark.parametrize(
    ("free", "weight"),
    [(slice(0, 5), True), (slice(5, 6), False), (slice(0, 6), True)],
)
def test_a_partly_frozen_layers_update_is_orthogonal_too(free, weight):
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(
        torch.randn(6, 3, dtype=torch.float64, generator=generator)
    )
    update = torch.zeros(4, 6, dtype=torch.float64)
    size = free.stop - free.start
    rows = torch.randn(4, size, dtype=torch.float64, generator=generator)
    update[:, free] = project(rows, restrict(basis, size, weight))
    assert torch.allclose(
        update @ basis, torch.zeros(4, 3, dtype=torch.float64), atol=1e-12
    )
    assert update.any() == (size > 3)


# --- frozen elsewhere
# -------------------------------------------------------------------------------------------------


def test_frozen_parameters_that_differ_are_noticed():
    first, second = make("finetune"), make("finetune")
    assert first.entries.frozen_digest == second.entries.frozen_digest != ""
    torch.manual_seed(4)
    assert (
        Finetune(layered(), TRAIN, LearnerSettings()).entries.frozen_digest
        != first.entries.frozen_digest
    )
    assert (
        FedPer(MODELS["tied"](), TRAIN, LearnerSettings()).entries.frozen_digest
        == ""
    )


class OwnDraw(nn.Module):
    """A frozen weight from a generator that the seed does not reach."""

    def __init__(self):
        super().__init__()
        drawn = np.random.default_rng().standard_normal(64).astype(np.float32)
        self.weight = nn.Parameter(torch.from_numpy(drawn), requires_grad=False)

    def forward(self, x):
        return x.flatten(1) * self.weight


def own_draw(shape, classes):
    return SplitModel(OwnDraw(), nn.Linear(64, classes))


def test_a_client_with_other_frozen_parameters_says_so(tmp_path):
    changes = [
        f"model={__name__}:own_draw",
        "learner=fedavg",
        "data.clients=2",
        "data.tasks=2",
        "train.rounds=1",
    ]
    config = read_config({"engine": {"backend": "inline"}}, changes)
    with pytest.raises(
        Exception,
        match="the frozen parameters of this client's model are not the server's",
    ):
        simulate(config, tmp_path / "run", report=False)


# --- what no learner can train
# ----------------------------------------------------------------------------------------


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(64, dtype=torch.complex64))

    def forward(self, x):
        return (x.flatten(1) * self.w).real


def complex_model(shape, classes):
    return SplitModel(Complex(), nn.Linear(64, classes))


def half_model(shape, classes):
    return SplitModel(nn.Flatten(), nn.Linear(64, classes)).half()


def double_model(shape, classes):
    return SplitModel(nn.Flatten(), nn.Linear(64, classes)).double()


def frozen_model(shape, classes):
    return SplitModel(nn.Flatten(), nn.Linear(64, classes)).requires_grad_(False)


def lazy_model(shape, classes):
    model = SplitModel(
        nn.Sequential(nn.Flatten(), nn.LazyLinear(8)), nn.LazyLinear(classes)
    )
    model.body.never = nn.LazyLinear(3)
    model.body.forward = lambda x: model.body[1](model.body[0](x))
    return model


def lent_head(shape, classes):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    model = SplitModel(body, nn.Linear(classes, classes))
    model.head.bias = body[1].bias
    return model


@pytest.mark.parametrize(
    ("model", "named", "remedy"),
    [
        ("complex_model", "parameter body.w is complex64", "view_as_complex"),
        (
            "half_model",
            "parameter head.weight is float16",
            "build the model in float32",
        ),
        (
            "double_model",
            "parameter head.weight is float64",
            "build the model in float32",
        ),
        (
            "frozen_model",
            "all parameters are frozen",
            "leave at least those of the head free",
        ),
        (
            "lazy_model",
            "body.never.weight has no shape yet",
            "give the module its size",
        ),
        (
            "lent_head",
            "head.bias is also body.1.bias",
            "give the head a parameter of its own",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_there_is_a_folder(
    tmp_path, model, named, remedy
):
    config = read_config(
        {"engine": {"backend": "inline"}},
        [f"model={__name__}:{model}", "learner=fedavg"],
    )
    with pytest.raises(ConfigError) as refused:
        simulate(config, tmp_path / "run", report=False)
    assert named in str(refused.value)
    assert remedy in str(refused.value)
    assert not (tmp_path / "run").exists()


def frozen_half(shape, classes):
    """Frozen parameters of any dtype do no harm: nobody sets, sends or averages them."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = (
                nn.Linear(64, 16).to(torch.bfloat16).requires_grad_(False)
            )
            self.top = nn.Linear(16, 8)

        def forward(self, x):
            return self.top(
                self.backbone(x.flatten(1).to(torch.bfloat16)).float()
            ).relu()

    return SplitModel(Body(), nn.Linear(8, classes))


def frozen_body(shape, classes):
    model = frozen_half(shape, classes)
    model.body.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in list_learners()
        if name not in ("agscl", "fot", "fedprotip", *ADAPTED)
    ],
)
def test_a_frozen_backbone_may_have_another_dtype(name):
    model = "frozen_body" if name in FROZEN else "frozen_half"
    config = read_config({}, [f"model={__name__}:{model}", f"learner={name}"])
    learner = build_learner(config, (1, 8, 8), 4)
    assert not [
        n for n in learner.send() | learner.local_parameters() if "backbone" in n
    ]
