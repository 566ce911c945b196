"""One part of each kind."""

import numpy as np
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedknow

NUMBER = 7


class Kindly(fedknow.Learner):
    """Plain training, shared kindly."""


class KindlyMean(FedAvg):
    """The mean, shared kindly."""


def kindly_net(shape, classes, width: int = 8):
    """Make a small network.

    Parameters
    ----------
    width : int
        Its hidden units.
    """
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(int(np.prod(shape)), width), nn.ReLU()
    )
    return fedknow.SplitModel(body, nn.Linear(width, classes))


def kindly_noise(config):
    """Make random images of four classes."""
    numbers = np.random.default_rng(0)
    x = numbers.integers(0, 256, (80, 1, 8, 8)).astype(np.uint8)
    y = np.arange(80) % 4
    return fedknow.Dataset.from_arrays("noise", x[:60], y[:60], x[60:], y[60:])


class KindlyFile:
    """Writes the last status to a file of the run folder."""

    def start(self, run):
        self.file = run.folder / "kindly.txt"

    def log(self, step, numbers, time):
        self.step = step

    def finish(self, status):
        self.file.write_text(f"{status} after {self.step} rounds")
