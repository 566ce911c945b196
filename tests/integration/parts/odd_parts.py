"""Parts a user might bring along, most of them at fault, for the tests beside this folder."""

import os
import signal
from pathlib import Path

import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedknow.client.learners import Learner
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.protocols.messages import client_of


class Normed(nn.Module):
    """A small network with all that could carry something over from one client to the next.

    BatchNorm without momentum weighs by the number of batches it has seen, an integer that does
    not travel.
    """

    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], 4, 3),
            nn.BatchNorm2d(4, momentum=None),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x))


class Waits(FedKnow):
    """FedKNOW, but the first to come to task 1's round 2 tells its pid through the FIFO
    ``waiting``, and waits.

    It waits for a signal of whoever reads. Without the FIFO nobody waits.
    """

    def fit(self, task, round):
        if (task.task, round.number) == (1, 2):
            try:
                Path("waiting").rename("taken")  # one process gets it
            except FileNotFoundError:
                return super().fit(task, round)
            Path("taken").write_text(f"{os.getpid()}\n")
            signal.pause()
        return super().fit(task, round)


class Raises(Learner):
    """Fails in the one round of the one client that has the seed in the file ``odd``."""

    def fit(self, task, round):
        if Path("odd").exists() and int(Path("odd").read_text()) == round.seed:
            raise ValueError("out of ideas")
        return super().fit(task, round)


class Poisons(Raises):
    """One client sends NaN."""

    def fit(self, task, round):
        try:
            return super().fit(task, round)
        except ValueError:
            report = Learner.fit(self, task, round)
            with torch.no_grad():
                self.head.weight[0, 0] = torch.nan
            return report


class Reshapes(Raises):
    """One client sends a tensor of another shape."""

    odd = False

    def fit(self, task, round):
        self.odd = False
        try:
            return super().fit(task, round)
        except ValueError:
            self.odd = True
            return Learner.fit(self, task, round)

    def send(self):
        sent = super().send()
        return {**sent, "head.bias": sent["head.bias"][:-1]} if self.odd else sent


class ReturnsNone(FedAvg):
    """Forgets the return statement."""

    def aggregate_train(self, server_round, replies):
        if server_round == 3 and Path("odd").exists():
            return None
        return super().aggregate_train(server_round, replies)


class Divides(FedAvg):
    """Fails."""

    def aggregate_train(self, server_round, replies):
        if server_round == 3 and Path("odd").exists():
            1 / 0  # noqa: B018
        return super().aggregate_train(server_round, replies)


class Forgets(FedAvg):
    """Fails when it is asked what a checkpoint should hold."""

    def state_dict(self):
        raise KeyError("momentum")

    def load_state_dict(self, state):
        pass


class Ledger(FedAvg):
    """Tells of a round all numbers that each client answered with, by ``client/name``."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        arrays, _ = super().aggregate_train(server_round, replies)
        told = {}
        for reply in replies:
            client = client_of(reply.metadata.src_node_id)
            told |= {
                f"{client}/{name}": value
                for name, value in reply.content["metrics"].items()
            }
        return arrays, MetricRecord(told)


class Empties(FedAvg):
    """Gives a model with a parameter missing."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord(
            {name: arrays[name] for name in list(arrays)[1:]}
        ), metrics


class Refuses(FedAvg):
    """Cannot be made."""

    def __init__(self, **options):
        raise LookupError("no licence")


class RefusesToo(Learner):
    """Cannot be made."""

    def __init__(self, *parts):
        raise LookupError("no licence")


def no_model(shape, classes):
    """Cannot be built."""
    return nn.Linear(-1, classes)


def no_data(config):
    """Cannot be loaded."""
    raise LookupError("no licence")
