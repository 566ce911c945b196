"""The Flower app under Flower itself: the same numbers as our own grids, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, read_config
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower_app"
CHANGES = [
    "data.tasks=2",
    "train.rounds=2",
    "train.epochs=1",
    "evaluation.global_model=true",
]
BASE = {
    "data": {"name": "digits", "clients": 2},
    "model": "mlp",
    "train": {"lr": 1e-3},
    "learner": "fedknow",
    "engine": {"backend": "inline"},
}  # the example's pyproject.toml, in which CHANGES are made

SIMULATION = """
import sys
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from fedknow.client.flower_app import app as client_app
from fedknow.server.flower_app import run_on_flower

settings = {"data.clients": 2, "data.tasks": 2, "train.rounds": 2, "train.epochs": 1,
            "train.lr": 1e-3, "model.name": "mlp", "learner.name": "fedknow", "out": sys.argv[1],
            "evaluation.global_model": True, "start.weights": sys.argv[2], "start.without": "head"}
app = ServerApp()

@app.main()
def main(grid, context):
    run_on_flower(grid, settings, context.run_id)

ray = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 * 2**20}
backend = {"client_resources": {"num_cpus": 1}, "init_args": ray}
run_simulation(app, client_app, 2, backend_config=backend)
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory, numbers):
    place = tmp_path_factory.mktemp("inline") / "run"
    return numbers(simulate(read_config(BASE, CHANGES), place).folder)


@pytest.fixture(scope="module")
def own_weights(tmp_path_factory):
    """Weights for Flower's simulation to start from: clients cannot draw them from the seed."""
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    model = build_model(ModelConfig(name="mlp"), (1, 8, 8), 10, seed=99)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def environment(tmp_path):
    quiet = {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_HOME": str(tmp_path / "flwr"),
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    (tmp_path / "flwr").mkdir()
    return os.environ | quiet


def test_flowers_simulation_gives_our_numbers(
    tmp_path, environment, own_weights, expected, numbers
):
    """From weights of one's own, which the server alone reads."""
    start = [f"start={own_weights}", "start.without=head"]
    config = read_config(BASE, [*CHANGES, *start])
    started = numbers(simulate(config, tmp_path / "inline").folder)
    assert started["parameters"] != expected["parameters"]
    place = tmp_path / "run"
    command = [sys.executable, "-c", SIMULATION, str(place), str(own_weights)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert numbers(place) == started


@pytest.mark.slow
def test_flwr_run_gives_our_numbers(tmp_path, environment, expected, numbers):
    app = shutil.copytree(EXAMPLE, tmp_path / "app")
    changes = " ".join([*CHANGES, f'out="{tmp_path / "run"}"'])
    command = ["flwr", "run", str(app), "--stream", "--run-config", changes]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=280
        )
        assert "Report: " in done.stdout, done.stdout + done.stderr
        assert numbers(tmp_path / "run") == expected
    finally:
        _end_superlink(tmp_path / "flwr")


def _end_superlink(home):
    """``flwr run`` leaves a SuperLink behind; end the one that has this home, with its children."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(home).encode() in command and b"flower-superlink" in command:
            os.killpg(os.getpgid(int(process.name)), signal.SIGTERM)
