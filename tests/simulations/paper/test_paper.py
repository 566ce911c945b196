"""The paper's experiments: configurations, scaling, and the page beside the paper's values."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedknow.cli import app
from fedknow.client.data import Dataset
from fedknow.client.learners import list_learners
from fedknow.client.models import list_models
from fedknow.protocols.config import ConfigError
from fedknow.server.reports.groups import Group
from fedknow.server.reports.measures import size
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.contenders import plan
from fedknow.simulations.fleet.devices import assign, shipped_profiles
from fedknow.simulations.paper import (
    PaperRequest,
    experiments,
    mixed,
    run_paper,
    variants,
)
from fedknow.simulations.paper.effort import communication_hours, virtual_hours
from fedknow.simulations.paper.page import published_text
from fedknow.simulations.paper.protocol import paper_table

TINY = [
    "model=mlp",
    "model.hidden=8",
    "engine.backend=inline",
    "train.batch_size=8",
]


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of CIFAR-100: 20 classes of 20 and 10 images of noise around a level of their own."""

    def load(config: object) -> Dataset:
        rng = np.random.default_rng(0)

        def part(each: int) -> tuple[np.ndarray, np.ndarray]:
            y = np.repeat(np.arange(20), each)
            x = (
                rng.integers(0, 40, (len(y), 1, 4, 4))
                + (10 * y)[:, None, None, None]
            )
            return x.astype(np.uint8), y

        return Dataset.from_arrays("cifar100", *part(20), *part(10))

    monkeypatch.setattr("fedknow.client.data.benchmark.load_dataset", load)


def test_every_experiment_can_be_planned() -> None:
    table = paper_table()
    assert list(experiments()) == [
        "5.1",
        "5.1-pi",
        "5.2",
        "5.3",
        "5.4",
        "5.5",
        "5.6",
    ]
    for name, experiment in table["experiments"].items():
        for data in table["workloads"]:
            for variant in variants(name, data):
                assert variant.config == variant.paper
                for method in experiment["learners"]:
                    assert plan(variant.config, method, 0).train.rounds == 15
    assert {variant.config.model.name for variant in variants("5.6")} <= set(
        list_models()
    )


def test_the_papers_protocol() -> None:
    (cifar,) = variants("5.1")
    config = cifar.config
    assert (
        config.data.tasks,
        config.data.classes_per_task,
        config.data.clients,
    ) == (
        10,
        10,
        20,
    )
    assert (
        config.train.rounds,
        config.train.epochs,
        config.train.lr,
        config.train.optimizer,
    ) == (15, 8, 1e-3, "adam")
    assert (config.model.name, config.data.share) == ("cnn6", "disjoint")
    assert config.strategy.options == {"fraction": 0.4}
    assert [variant.config.data.clients for variant in variants("5.3")] == [
        50,
        100,
    ]
    assert {variant.config.data.share for variant in variants("5.3")} == {
        "overlapping"
    }
    mini = variants("5.3")[0].config
    assert (
        mini.train.optimizer,
        mini.train.lr,
        mini.train.weight_decay,
        mini.train.epochs,
    ) == ("sgd", 8e-4, 1e-5, 5)
    assert variants("5.4")[0].config.data.tasks == 80
    assert variants("5.1-pi")[0].config.data.clients == 30


@pytest.mark.parametrize(
    ("scale", "rounds", "epochs", "clients", "tasks"),
    [
        (1, 15, 8, 20, 10),
        (0.25, 8, 4, 20, 10),
        (0.1, 5, 3, 20, 10),
        (1 / 120, 1, 1, 20, 10),
        (1 / 1920, 1, 1, 5, 2),
    ],
)
def test_scale(
    scale: float, rounds: int, epochs: int, clients: int, tasks: int
) -> None:
    config = variants("5.1", scale=scale)[0].config
    assert (config.train.rounds, config.train.epochs) == (rounds, epochs)
    assert (config.data.clients, config.data.tasks) == (clients, tasks)


def test_values_belong_to_what_is_run() -> None:
    table = paper_table()
    assert set(table["values"]) == set(table["experiments"])
    for name, by_variant in table["values"].items():
        known = set(table["workloads"]) | set(
            table["experiments"][name].get("variants", {})
        )
        assert set(by_variant) <= known
        for by_method in by_variant.values():
            assert {method for method in by_method if method.islower()} <= set(
                table["experiments"][name]["learners"]
            )
            for value in by_method.values():
                assert len(value.get("tasks", [])) == len(
                    value.get("accuracy", [])
                )
                assert all(
                    len(value.get(key, [])) <= len(value.get("tasks", []))
                    for key in ("forgetting", "task_hours")
                )
                assert all(
                    0 <= forgotten < 1
                    for forgotten in value.get("forgetting", [])
                )
                assert len(value.get("hours_at_rates", range(8))) == 8
                assert all(0 < a <= 1 for a in value.get("accuracy", []))
    assert {
        method.partition("@")[0]
        for e in table["experiments"].values()
        for method in e["learners"]
    } <= set(list_learners())


def test_fleets_are_the_papers_testbeds() -> None:
    jetsons = {
        "jetson-nano": 8,
        "jetson-tx2": 2,
        "jetson-xavier-nx": 8,
        "jetson-agx-xavier": 2,
    }
    pis = {
        "raspberry-pi-4-2gb": 1,
        "raspberry-pi-4-4gb": 5,
        "raspberry-pi-4-8gb": 4,
    }
    for experiment, devices in (("5.1", jetsons), ("5.1-pi", jetsons | pis)):
        config = variants(experiment)[0].config
        assert (
            Counter(assign(config.fleet, config.data.clients, seed=0)) == devices
        )
        assert set(devices) <= set(shipped_profiles())
        assert (config.fleet.up, config.fleet.down) == (1e6, 1e6)


@pytest.mark.parametrize("experiment", ["5.1", "5.1-pi"])
@pytest.mark.parametrize("scale", [1 / 120, 0.003, 0.001, 0.0005])
def test_a_scaled_fleet_keeps_its_mix(experiment: str, scale: float) -> None:
    """Each kind is there, and no kind is further from its share than by the clients that others
    were owed."""
    (variant,) = variants(experiment, scale=scale)
    here, there = (
        Counter(assign(config.fleet, config.data.clients, seed=0))
        for config in (variant.config, variant.paper)
    )
    assert set(here) == set(there)
    ratio = here.total() / there.total()
    assert all(
        abs(here[kind] - ratio * count) <= 1 for kind, count in there.items()
    )


@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30),
    st.integers(1, 100),
)
def test_mixed(devices: list[str], clients: int) -> None:
    found = mixed(devices, clients)
    assert clients % len(found) == 0
    whole = Counter(devices)
    if clients % len(devices) == 0:
        assert found == devices
    elif clients >= len(whole):
        assert len(found) == clients
        assert set(found) == set(whole)
    else:
        assert len(found) == len(set(found)) == clients
        assert min(whole[kind] for kind in found) >= max(
            whole[kind] for kind in whole if kind not in found
        )


def test_the_fleet_goes_with_the_clients_that_are_asked_for() -> None:
    (variant,) = variants("5.1-pi", changes=["data.clients=10"])
    devices = Counter(assign(variant.config.fleet, 10, seed=0))
    assert devices["raspberry-pi-4-2gb"] == devices["jetson-agx-xavier"] == 1
    assert devices.total() == 10
    (own,) = variants(
        "5.1-pi", changes=["data.clients=2", 'fleet.devices=["jetson-nano"]']
    )
    assert own.config.fleet.devices == ["jetson-nano"]


def test_what_share_of_the_papers_training_is_run() -> None:
    (variant,) = variants("5.1", scale=0.1)
    assert variant.share == pytest.approx(5 / 15 * 3 / 8)
    assert str(variant) == (
        "cifar100: 12.5% of the paper's training (5 of 15 rounds, 3 of 8 epochs, "
        "20 of 20 clients, 10 of 10 tasks) on "
        "8 jetson-nano, 2 jetson-tx2, 8 jetson-xavier-nx, 2 jetson-agx-xavier"
    )
    assert variants("5.1", scale=1 / 1920)[0].share == pytest.approx(
        1 / 120 * 5 / 20 * 2 / 10
    )


def test_comparison_after_as_many_tasks() -> None:
    """Ours after ten tasks beside the paper's after ten; where the paper has no such value, it
    says after how many."""
    there = {
        "tasks": [1, 5, 20],
        "accuracy": [0.9, 0.7, 0.5],
        "forgetting": [0.2],
    }
    assert published_text(there, "accuracy", 5) == "70.0 %"
    assert published_text(there, "accuracy", 10) == "50.0 % after 20"
    assert published_text(there, "forgetting", 5) == "20.0 % after 20"
    assert published_text(there, "task_hours", 5) == "–"
    core50 = paper_table()["values"]["5.1"]["core50"]["fedknow"]
    assert published_text(core50, "accuracy", 10) == "50.0 % after 11"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"experiment": "5.7"}, r"experiment '5.7': there is none.*known: 5.1"),
        (
            {"experiment": "5.1", "data": "cifar10"},
            r"--data 'cifar10': there is none \(did you mean 'cifar100'\?\)",
        ),
        (
            {"experiment": "5.1", "scale": 0.0},
            r"--scale 0: give a number above 0",
        ),
        ({"experiment": "5.1", "scale": 1.5}, r"--scale 1.5: .*at most 1"),
        (
            {"experiment": "5.1", "changes": ["train.round=1"]},
            r"did you mean 'rounds'",
        ),
    ],
)
def test_errors(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        variants(**arguments)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small_cifar")
def test_links(tmp_path) -> None:
    """5.2 from the bytes of one run: half the rate, twice the hours; a run's own numbers stand on
    the page."""
    changes = [*TINY, "data.tasks=2", "data.clients=3"]
    outcome = run_paper(
        PaperRequest(
            "5.2", scale=0.001, learners=["fedknow", "fedavg"], changes=changes
        ),
        tmp_path,
    )
    assert outcome.failures == {}
    assert outcome.page == tmp_path / "paper.html"
    page = outcome.page.read_text()
    for text in (
        "FedKNOW paper, 5.2",
        "12.2",
        "read off its figures",
        "50 kB/s",
        "fedknow, paper",
        "<svg",
    ):
        assert text in page, text
    assert "http:" not in page
    assert "https:" not in page
    runs = json.loads((tmp_path / "cifar100/compare.json").read_text())["runs"]
    run = RunFolder.open(tmp_path / "cifar100/fedavg-seed0")
    assert (run.config.train.rounds, run.config.data.tasks) == (1, 2)
    hours = (
        runs["fedavg-seed0"]["bytes"] / 3 / 50_000 / 3600 * 15 * 10 / (1 * 2)
    )  # FedAvg sends nothing at a task's end
    assert f"{hours:,.3g}" in page
    assert f"{hours / 2:,.3g}" in page
    assert "66.8 %" in page  # the paper's accuracy, of 5.1, after as many tasks
    assert "31.0 % after 10" in page  # of fedavg, after two tasks, it has none
    for text in (
        "0.025%",
        "clients on jetson-nano</td><td>1</td><td>8</td>",
        "On the fleet",
        "3.16",
    ):
        assert text in page, text
    assert "model.hidden" in page  # what else is not the paper's
    assert sorted(path.name for path in (tmp_path / "plots").iterdir())[:1] == [
        "cifar100-accuracy.png"
    ]
    again = run_paper(
        PaperRequest(
            "5.2", scale=0.001, learners=["fedknow", "fedavg"], changes=changes
        ),
        tmp_path,
    )
    assert again.page == outcome.page


def test_command() -> None:
    refused = CliRunner().invoke(app, ["paper", "5.9"], env={"COLUMNS": "200"})
    assert refused.exit_code == 2
    assert "experiment '5.9': there is none" in refused.output


@pytest.mark.usefixtures("small_cifar")
def test_variants_side_by_side(tmp_path) -> None:
    changes = [*TINY, "data.tasks=2", "data.clients=3"]
    outcome = run_paper(
        PaperRequest(
            "5.3", "cifar100", scale=0.001, learners=["fedavg"], changes=changes
        ),
        tmp_path,
    )
    page = (tmp_path / "paper.html").read_text()
    assert outcome.failures == {}
    assert "these runs are on cifar100" in page
    assert all(
        text in page
        for text in (
            "50-clients",
            "100-clients",
            "3%",
            "6%",
            "Accuracy over virtual time",
        )
    )


@pytest.mark.usefixtures("small_cifar")
def test_what_is_kept_and_single_tasks(tmp_path) -> None:
    """5.5: bytes that a client keeps, the paper's hours of the tenth task, and its method that is
    not run here."""
    changes = [*TINY, "data.tasks=2", "data.clients=3"]
    outcome = run_paper(
        PaperRequest(
            "5.5", scale=0.001, learners=["fedknow@rho=0.1"], changes=changes
        ),
        tmp_path,
    )
    assert outcome.failures == {}
    (run,) = json.loads((tmp_path / "miniimagenet/compare.json").read_text())[
        "runs"
    ].values()
    page = outcome.page.read_text()
    assert run["knowledge_bytes"] > 0
    for text in (
        # The paper has values after one task and ten.
        '<th scope="row">fedknow@rho=0.1</th><td>1</td>',
        f"<td>94.0 %</td><td>–</td><td>–</td>"
        f'<td data-value="{run["knowledge_bytes"]}">{size(run["knowledge_bytes"])}</td>',
        '<th scope="row">FedWEIT, own parameters alone</th><td>10</td><td>–</td><td>46.3 %</td>',
        '<th scope="row">fedknow@rho=0.1, paper</th><td data-value="0.54">0.54</td>',
        '<th scope="row">FedWEIT, own parameters alone, paper</th><td data-value="0.13">0.13</td>',
    ):
        assert text in page, text


def test_virtual_hours_of_as_much_training() -> None:
    """A third of the rounds and half of the epochs: messages times 3, computing times 6, the end
    of a task once."""
    (variant,) = variants("5.1", changes=["train.rounds=5", "train.epochs=4"])

    def event(task: int, hours: float, computing: float) -> dict[str, float]:
        return {
            "task": task,
            "virtual_seconds": 3600 * hours,
            "computing_seconds": 3600 * computing,
        }

    run = SimpleNamespace(
        rounds=[event(0, 0.5, 0.1), event(0, 1.0, 0.25), event(1, 3.5, 1.0)],
        evaluations=[event(0, 1.5, 0.5), event(1, 4.0, 1.25)],
    )
    assert virtual_hours(run).tolist() == pytest.approx([1.5, 2.5])
    # task 1: 0.75 h of messages, 0.25 h of computing, 0.5 h at its end; task 2: 1.5, 0.5 and 0.5
    assert virtual_hours(run, variant).tolist() == pytest.approx(
        [3 * 0.75 + 6 * 0.25 + 0.5, 3 * 1.5 + 6 * 0.5 + 0.5]
    )
    assert np.isnan(
        virtual_hours(SimpleNamespace(rounds=[], evaluations=[{"task": 0}]))
    ).all()


def test_bytes_of_as_many_rounds() -> None:
    """Five of 15 rounds: the model 3 times, a task's end once, and 10 times what else the last
    round sent."""
    (variant,) = variants("5.1", changes=["train.rounds=5", "data.tasks=1"])
    sent = [5e9, 7e9, 8e9, 8.5e9, 9e9]
    run = SimpleNamespace(
        config=variant.config,
        rounds=[
            {"task": 0, "traffic": {"train.extra": {"down": bytes, "up": 0.0}}}
            for bytes in sent
        ],
        bytes_of={
            "train": 40e9,
            "train.end_task": 1e9,
        }.__getitem__,  # of these 30 GB are the model
    )
    group = Group("fedweit", [run])
    assert communication_hours(group, 1000) == pytest.approx(
        40e9 / 20 / 1e6 / 3600
    )
    assert communication_hours(group, 1000, variant) == pytest.approx(
        10 * (90e9 + 1e9 + 9e9 + 10 * 0.5e9) / 20 / 1e6 / 3600
    )


@pytest.mark.usefixtures("small_cifar")
def test_clients_out_of_memory_are_named(tmp_path) -> None:
    """A device too small for everything: the run that has others goes on, the one that has none is
    told as failed."""
    (tmp_path / "small.toml").write_text(
        "[thimble]\nabout = 'small'\npeak = 1e9\nmemory = 1e3\nbusy = 1.0\nidle = 1.0\n"
        "source = {peak = 'made up', memory = 'made up', busy = 'made up', idle = 'made up'}\n"
    )
    small = [
        *TINY,
        "data.tasks=2",
        f'fleet.profiles="{tmp_path / "small.toml"}"',
        "strategy.fraction=1.0",
    ]
    some = [
        *small,
        "data.clients=3",
        'fleet.devices=["jetson-nano", "thimble", "jetson-nano"]',
    ]
    outcome = run_paper(
        PaperRequest("5.1", scale=0.001, learners=["fedavg"], changes=some),
        tmp_path / "some",
    )
    assert outcome.failures == {}
    page = outcome.page.read_text()
    assert (
        '<th scope="row">fedavg</th><td>1</td><td>1</td>' in page
    )  # client 1, since task 1
    assert "thimble has room for 0 MB, &#39;train&#39; needs" in page
    assert "1 of 3" in page
    none = [*small, "data.clients=2", 'fleet.devices=["thimble"]']
    failed = run_paper(
        PaperRequest("5.1", scale=0.001, learners=["fedavg"], changes=none),
        tmp_path / "none",
    )
    assert "does not fit the fleet" in failed.failures["cifar100/fedavg-seed0"]
    assert failed.page is None
