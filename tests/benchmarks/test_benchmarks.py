"""Each benchmark's quick form runs and gives figures; the page shows those of the results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ECHO = [
    "--clients",
    "3",
    "--rounds",
    "1",
    "--repeats",
    "1",
    "--workloads",
    "echo:100",
    "--engines",
    "inline",
]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import one another by name, and experiments name ``parts:...``."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("overhead.py", ["--quick", "--workloads", "mlp", "--processes", "1"]),
        ("small_models.py", ["--quick", "--backends", "inline"]),
        ("pfl_race.py", ["--quick", "--models", "dnn"]),
        ("engine_vs_flower.py", ECHO),
        ("numerics.py", ["--models", "mlp", "--repeats", "1"]),
        ("attacks.py", ["--quick"]),
        ("secure.py", ["--quick", "--rounds", "2"]),
        (
            "asynchronous.py",
            [
                "--data",
                "digits",
                "--clients",
                "20",
                "--rounds",
                "1",
                "--workers",
                "1",
            ],
        ),
        (
            "vmap_clients.py",
            ["--models", "linear", "--clients", "2", "--repeats", "1"],
        ),
    ],
)
def test_quick_form(script: str, options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = run(script, *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["about"]["command"].startswith(f"python benchmarks/{script}")
    assert set(found["about"]["versions"]) >= {"fedknow", "torch"}
    assert found.get("results") or found["cases"]
    assert tables().TABLES[script.removesuffix(".py")](found).count("|") > 10


def test_stacked_cohorts_learn() -> None:
    """What ``--device cuda`` times, here on the processor."""
    race = load("pfl_race")
    few, more = (
        race.simulated("dnn", 1, 1000, 5, rounds, vectorize="on", dropout=False)
        for rounds in (1, 30)
    )
    assert few["accuracy"] < 0.3 < 0.6 < more["accuracy"]
    assert more["seconds"] > 0


def test_the_page_shows_the_results() -> None:
    done = run("page.py", "--check")
    assert done.returncode == 0, done.stdout


def test_a_table_is_replaced_and_the_rest_is_left(tmp_path: Path) -> None:
    case = {
        "raw": 2.0,
        "ours": 2.2,
        "ratio": 1.104,
        "steps": 12000,
        "start": 0.5,
        "report": 1.0,
    }
    about = {
        "command": "python x.py",
        "cpu": "C",
        "cores": 2,
        "versions": {"torch": "2"},
        "load_at_end": 0.25,
    }
    (tmp_path / "overhead.json").write_text(
        json.dumps({"about": about, "results": {"mlp, 1": case}})
    )
    before = (
        "a\n<!-- overhead -->\nold\n<!-- /overhead -->\nb\n<!-- pfl_race -->\n<!-- "
        "/pfl_race -->\n"
    )
    after = page().render(before, tmp_path)
    assert "| mlp, 1 | 12000 | 2 | 2.2 | 1.1 | – | 0.5 | 1 |" in after
    assert (
        "`python x.py`. Machine: C, 2 cores. Versions: torch 2. Load at the end: 0.2"
        in after
    )
    assert "old" not in after
    assert after.endswith(
        "<!-- pfl_race -->\nNot measured yet.\n<!-- /pfl_race -->\n"
    )
    assert page().render(after, tmp_path) == after


def test_a_comparison_is_ranked_and_paired_by_seed() -> None:
    shown = ("accuracy", "accuracy_global", "forgetting", "forgetting_relative")

    def runs(learner: str, *accuracies: float) -> dict[str, dict[str, object]]:
        return {
            f"{learner}-seed{seed}": {
                "learner": learner,
                "seed": seed,
                **dict.fromkeys(shown, accuracy),
            }
            for seed, accuracy in enumerate(accuracies)
        }

    def group(accuracy: float) -> dict[str, object]:
        plain = {
            "samples": {"mean": 2000.0},
            "knowledge_bytes": {"mean": None},
            "bytes": {"mean": 3e6},
        }
        return {"accuracy": {"mean": accuracy}, **plain}

    found = {
        "learners": {
            "er": group(0.6),
            "fedknow@best": group(0.8),
            "local": group(0.5),
        },
        "runs": runs("fedknow", 0.7, 0.9)
        | runs("er", 0.6, 0.6)
        | runs("local", 0.5),
    }
    rows = tables().comparison(found).splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [
        "`fedknow`",
        "`er`",
        "`local`",
    ]
    # Differences 10 and 30: mean 20, standard deviation 14.1, and t = 12.706 with one degree of
    # freedom.
    assert rows[1].endswith(
        "| 60.0, 60.0 | 2 | 0 | 3 | +10.0, +30.0 | +10.0, +30.0 |"
    )
    assert rows[2].endswith("| 50.0 | 2 | 0 | 3 | +20.0 | +20.0 |")
    assert rows[0].endswith("| – | – |")


def test_tables_of_series() -> None:
    about = {"command": "python x.py", "cpu": "C", "cores": 2}
    row = {
        "learner": "l",
        "what": "bf16",
        "accuracy": [0.5, 0.01],
        "forgetting": [0.1, None],
        "seconds": [40, 2],
    }
    found = {"about": about, "results": {"table": [row | {"speedup": 1.5}]}}
    assert (
        "| l | bf16 | 50.0 ± 1.0 | 10.0 | 40.0 ± 2.0 | 1.5 |"
        in tables().precision(found)
    )
    found = {
        "about": about,
        "results": {"clients": [{"clients": 20, "seconds": 1.25, "runs": []}]},
    }
    assert tables().growth(found).splitlines()[2:5] == [
        "| clients | seconds |",
        "| --- | --- |",
        "| 20 | 1.25 |",
    ]


def page() -> ModuleType:
    return load("page")


def tables() -> ModuleType:
    return load("_tables")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"benchmark_{name}", BENCHMARKS / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(name: str) -> ModuleType:
    """Load a benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_readers_of_hostile_words_survive_them() -> None:
    """The short form of fuzz_doors.py."""
    fuzz = loaded("fuzz_doors")
    outcomes = fuzz.run(1500, 60.0, 7)
    assert outcomes.total() == 1500
    for way in fuzz.WAYS:
        assert any(key.startswith(way.__name__) for key in outcomes)
    assert outcomes["read_answer: refused"] > 0
    assert outcomes["read_invitation: ConfigError"] > 0


def test_honest_clients_finish_under_attack() -> None:
    """The short form of soak.py: every answer is right, whoever else connects."""
    soak = loaded("soak")
    figures = soak.run(soak.Soak(210, 4, 12, 0.05, 1000))
    assert figures["attacked"] < 20
    assert sum(figures["refusals"].values()) > 0
