"""Devices: which there are, and that learners come to the same on another one.

There is no GPU where these tests run. In its stead stands a device that computes on the CPU and
refuses what a GPU refuses (``pretend.py``); what only a GPU can tell, its own arithmetic and
its speed, no test here tells.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedknow.client.compute.device import DeviceTransfer, find_device
from fedknow.client.edge.client import EdgeClient
from fedknow.client.node import Node
from fedknow.protocols.config import ConfigError, read_config

HERE = Path(__file__).parent.parent  # where pretend.py lies


def on_pretended_device(*options):
    """Run ``pretended.py``: PyTorch must know a device before the first gradient."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        *options,
        "pretended.py",
    ]
    done = subprocess.run(
        command,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_learners_on_another_device():
    on_pretended_device()


@pytest.mark.slow
def test_their_settings_on_another_device():
    on_pretended_device("-m", "slow")


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "mps", ""]
)
def test_names_that_are_none_are_refused(name):
    with pytest.raises(
        ConfigError,
        match=r"engine\.device = '.*': must be 'cpu', 'cuda', 'cuda:1' .* or 'auto'",
    ):
        read_config({}, [f"engine.device={name}"])
    with pytest.raises(ConfigError, match=r"--device = '.*': must be"):
        find_device(name, "--device")


@pytest.mark.parametrize(
    ("count", "name", "seen"),
    [
        (0, "cuda", "no GPU"),
        (2, "cuda:2", "'cuda:0', 'cuda:1'"),
        (1, "cuda:1", "'cuda:0'"),
    ],
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, count, name, seen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(
        ConfigError,
        match=rf"engine\.device = '{name}': torch .* sees {seen} here; set .* 'cpu'",
    ):
        find_device(name)


@pytest.mark.parametrize(
    ("count", "name", "device"),
    [
        (0, "cpu", "cpu"),
        (0, "auto", "cpu"),
        (1, "auto", "cuda"),
        (1, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
)
def test_devices_that_are_there(monkeypatch, count, name, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    assert find_device(name) == torch.device(device)


def test_one_gpu_of_a_machine_is_none_of_a_cluster():
    with pytest.raises(
        ConfigError,
        match=r"engine.device = 'cuda:1'.*engine.address = 'auto'.*set engine.device to 'cuda'",
    ):
        read_config({}, ["engine.device=cuda:1", "engine.address=auto"])


def test_nothing_crosses_on_the_cpu(tiny_task):
    border, state, data = (
        DeviceTransfer(torch.device("cpu")),
        {"kept": {"w": torch.zeros(2)}},
        tiny_task(0),
    )
    assert border.enter(state) is border.leave(state) is state
    assert border.enter_task(data) is data
    assert border.enter_split(data.test) is data.test


def test_whoever_builds_the_learner_looks_for_its_device(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"engine\.device = 'cuda'"):
        Node(read_config({}, ["engine.device=cuda"]), None)
    with pytest.raises(ConfigError, match="--device = 'cuda'"):
        EdgeClient("127.0.0.1:1", tmp_path, device="cuda")
