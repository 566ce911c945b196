"""The protocol's driver, its tables, and the streams of publications."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import fedknow

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def _reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import one another by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def entry(*accuracies: float, candidates: int = 3) -> dict:
    runs = [
        {
            "seed": 2001 + place,
            "accuracy": accuracy,
            "accuracy_global": None,
            "forgetting": 1 - accuracy,
            "samples": 2000.0,
            "knowledge_bytes": 1500.0,
            "flops": 3e12,
        }
        for place, accuracy in enumerate(accuracies)
    ]
    tried = [{"accuracy": 0.5, "settings": {}}]
    return {
        "learner": "er",
        "settings": {"memory": 0.5},
        "candidates": candidates,
        "tried": tried,
        "runs": runs,
    }


def measured(**methods: dict) -> dict:
    about = {"command": "python x.py", "cpu": "C", "cores": 2}
    return {"about": about, "methods": methods, "failures": {}}


def test_the_driver_runs_what_the_page_says() -> None:
    page = (ROOT / "docs" / "adr" / "0013-fewer-runs-more-streams.md").read_text(
        "utf-8"
    )
    protocol = load("protocol")
    for name, stream in protocol.STREAMS.items():
        (row,) = (
            line for line in page.splitlines() if line.startswith(f"| `{name}` |")
        )
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[2] == str(stream.candidates)
        assert cells[3] == f"2001 to {2000 + stream.seeds}"
        assert set(stream.methods) >= set(protocol.COMMON)
    assert protocol.SEARCH_SEED == 1000
    assert protocol.FIRST_SEED == 2001


def test_the_driver_lists_its_streams(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["protocol.py", "--list"])
    load("protocol").main()
    assert capsys.readouterr().out.startswith('digits {"preset": "digits"')


def test_a_method_names_what_differs_from_its_defaults() -> None:
    method = load("protocol").method
    assert method("er", {"memory": 0.1, "keep": "ring"}) == "er"
    assert method("er", {"memory": 0.5}) == "er@memory=0.5"
    assert method("co2l", {"flip": False, "distill": 1.0}) == "co2l@flip=false"


def test_each_stream_shuffles_its_classes() -> None:
    config = load("protocol").experiment("digits", "", 2001)
    assert config.data.class_order == "shuffled"
    assert config.engine.backend == "inline"
    assert config.seed == 2001


def test_a_streams_table_is_ranked_and_corrected() -> None:
    tables = load("_protocol_tables")
    text = tables.protocol(
        measured(
            fedknow=entry(0.7, 0.71, 0.72),
            er=entry(0.8, 0.81, 0.82),
            mas=entry(0.6, 0.7, 0.5),
            gone=entry(),
        )
    )
    rows = [line.split("|")[1:-1] for line in text.splitlines()[2:5]]
    assert [row[0].strip() for row in rows] == ["`er`", "`fedknow`", "`mas`"]
    er = [cell.strip() for cell in rows[0]]
    # 1.96 would be wrong for three seeds: t(0.975, 2) = 4.30.
    assert er[1:7] == ["81.0 ± 2.5", "–", "19.0 ± 2.5", "2", "1.5 kB", "3,000"]
    assert er[9:] == ["+10.0 ± 0.0", "< 0.001", "-10.0 ± 0.0", "< 0.001"]
    assert [cell.strip() for cell in rows[1][9:]] == ["–"] * 4
    assert "Seeds: 3. No run failed." in text


def test_memory_and_seconds_stand_in_the_table_where_runs_have_them() -> None:
    old, new = entry(0.7, 0.71), entry(0.6, 0.61)
    for place, run in enumerate(new["runs"]):
        run |= {"peak_memory_mb": 1200.0 + 200 * place, "seconds": 30.0 + place}
    # Older results have seconds alone.
    for run in old["runs"]:
        run["seconds"] = 12.0
    text = load("_protocol_tables").protocol(measured(fedknow=old, er=new))
    rows = [line.split("|")[1:-1] for line in text.splitlines()[2:4]]
    cells = [[cell.strip() for cell in row[7:9]] for row in rows]
    assert cells == [["–", "12"], ["1,300", "30"]]


def test_the_driver_collects_memory_and_seconds() -> None:
    figures = set(load("protocol").FIGURES)
    assert {"seconds", "peak_memory_mb", "client_memory_bytes"} <= figures


def test_costs_are_of_a_fresh_process_each(tmp_path: Path, monkeypatch) -> None:
    costs = load("data_costs")
    path = tmp_path / "costs.json"
    monkeypatch.setattr(
        sys, "argv", ["data_costs.py", "digits", "--out", str(path)]
    )
    monkeypatch.setattr(costs, "PRESETS", ("digits",))
    asked = []

    def answer(command, **environment):
        asked.append((command[2:5], environment))
        figures = dict.fromkeys(costs.KEPT, 2.0)
        return figures | {"peak_memory_mb": 500.0, "cpu_seconds": 1.0}

    monkeypatch.setattr(costs, "measure", answer)
    costs.main()
    assert [words for words, _ in asked] == [
        ["digits", "--learner", "fedavg"],
        ["digits", "--learner", "fedknow"],
    ]
    caches = {environment["FEDKNOW_CACHE"] for _, environment in asked}
    assert len(caches) == 2
    text = load("_protocol_tables").data_costs(json.loads(path.read_text()))
    assert "| `digits` | `fedknow` | 500 | 0.0 | 2 | 1 |" in text
    assert "Seeds, loads at the end: digits 2001, " in text


def test_costs_of_a_run_are_measured(monkeypatch, tmp_path: Path) -> None:
    costs = load("data_costs")
    short = costs.experiment("digits", "", 2001)
    short = fedknow.experiment(
        short,
        train={"rounds": 1, "epochs": 1},
        data={"tasks": 1, "classes_per_task": 2, "clients": 2},
    )
    monkeypatch.setattr(costs, "experiment", lambda *_: short)
    figures = costs.run("digits", "fedavg", "", 2001)
    # A process with PyTorch in it takes more than 100 MB.
    assert figures["peak_memory_mb"] > 100
    assert figures["client_memory_bytes"] > 0
    assert figures["seconds"] > 0
    assert figures["cpu_seconds"] > 0


def test_settings_are_listed_with_what_was_tried() -> None:
    tables = load("_protocol_tables")
    text = tables.chosen_settings(
        measured(er=entry(0.5), variant=entry(0.5, candidates=0))
    )
    assert "| `er` | 1 of 3 | 50.0 | `memory=0.5` |" in text
    assert "variant" not in text


def test_ranks_are_over_the_streams_that_were_measured(tmp_path: Path) -> None:
    tables = load("_protocol_tables")
    assert tables.rank_table(tmp_path) == "Not measured yet."
    for name, extra in (("a", {}), ("b", {"mas": entry(1.0)})):
        stream = measured(er=entry(0.5), fedknow=entry(0.7), **extra)
        (tmp_path / f"protocol_{name}.json").write_text(json.dumps(stream))
    text = tables.rank_table(tmp_path)
    assert "| `fedknow` | 1.00 |" in text
    assert "mas" not in text
    assert "Streams: a, b." in text


def test_published_figures_stand_beside_ours() -> None:
    row = {
        "case": "split, lwf",
        "published": 99.57,
        "published_spread": 0.02,
        "accuracy": [99.0, 99.2, 99.1],
        "difference": -0.47,
    }
    about = {"command": "python x.py", "cpu": "C", "cores": 2}
    text = load("_protocol_tables").published(
        {"about": about, "results": {"table": [row]}}
    )
    assert "| split, lwf | 99.57 ± 0.02 | 99.1 ± 0.2 | -0.5 |" in text


# --- streams of publications


@pytest.fixture
def mnist():
    """Images with a pixel for each digit."""
    streams = load("_mnist_streams")
    labels = torch.arange(1200) % 10
    images = torch.zeros(1200, 1, 28, 28)
    images[torch.arange(1200), 0, 0, labels] = 1
    return streams.Mnist((images, labels), (images[:100], labels[:100]))


def test_permutations_move_each_pixel_and_keep_all(mnist) -> None:
    stages = load("_mnist_streams").permutations(mnist, 0)
    assert len(stages) == 20
    assert len(stages[0].train) == len(set(stages[0].train.tolist())) == 1000
    images = mnist.train[0]
    moved = [stage.change(images) for stage in stages[:2]]
    for each in moved:
        assert torch.equal(each.flatten(1).sum(1), images.flatten(1).sum(1))
    assert not torch.equal(*moved)
    # The same for all images of a task.
    assert len(moved[0].flatten(1).argmax(1).unique()) == 10


def test_rotations_grow_from_none_to_half_a_turn(mnist) -> None:
    streams = load("_mnist_streams")
    stages = streams.rotations(mnist, 0)
    assert len(stages) == 20
    corner = torch.zeros(1, 1, 28, 28)
    corner[0, 0, 4:8, 4:8] = 1
    places = [
        stage.change(corner)[0, 0].nonzero().float().mean(0) for stage in stages
    ]
    turned = [float(torch.atan2(*(place - 13.5))) for place in places]
    steps = -np.diff(np.unwrap(turned))
    # Each angle is drawn within its twentieth of half a turn.
    assert abs(steps.sum()) == pytest.approx(np.pi * 19 / 20, abs=0.35)
    assert (np.sign(steps) == np.sign(steps.sum())).all()


def test_split_has_two_digits_a_task(mnist) -> None:
    stages = load("_mnist_streams").split(mnist, 0)
    assert [stage.classes for stage in stages] == [
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9),
    ]
    for stage in stages:
        assert set(mnist.train[1][stage.train].tolist()) == set(stage.classes)


def test_a_learner_learns_a_published_stream(mnist) -> None:
    published = load("published")
    small = published.PUBLICATIONS["split"].train.model_copy(update={"epochs": 3})
    publication = published.Publication(
        load("_mnist_streams").split, 16, small, published._pytorchs
    )
    published.PUBLICATIONS["small"] = publication
    case = published.Case("small", "small", "er", 0.01, 100.0)
    assert published.accuracy(case, mnist, 0) > 0.9
