"""pfl-research's side of ``pfl_race.py``.

Its own FederatedAveraging runs on the same data, model and settings.

Runs in an environment of its own that has `pfl` and not us; with more than one process under
``torchrun``, as pfl asks for. Prints the seconds of each round and the accuracy at the end.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
import parts
import torch
from _common import give, spent
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import get_default_device
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Mean cross-entropy."""
        self.train(not eval)
        return F.cross_entropy(self.model(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor, eval: bool = True) -> dict[str, Any]:
        """Accuracy and loss."""
        self.train(not eval)
        z = self.model(x)
        right = int((z.argmax(1) == y).sum())
        return {
            "loss": Weighted(
                F.cross_entropy(z, y, reduction="sum").item(), len(y)
            ),
            "accuracy": Weighted(right, len(y)),
        }


class Rounds(TrainingProcessCallback):
    """Notes when each round ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def after_central_iteration(
        self,
        aggregate_metrics: Metrics,
        model: PyTorchModel,
        *,
        central_iteration: int,
    ) -> tuple[bool, Metrics]:
        """Note the time after each round; pfl calls this."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="its name in parts.py")
    parser.add_argument("--shape", type=int, nargs=3, required=True)
    parser.add_argument("--users", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="not pfl's way; to see what it would bring",
    )
    parser.add_argument("--no-dropout", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train, and give the times."""
    args = read_options()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  pfl draws users from the global generator
    shape = tuple(args.shape)
    images, labels = parts.like_images(shape, args.users * args.samples + 10_000)
    form = torch.channels_last if args.channels_last else torch.contiguous_format
    x = normalised(images).contiguous(memory_format=form).to(get_default_device())
    y = torch.from_numpy(labels).to(get_default_device())
    cut = args.users * args.samples
    network = Classifier(
        getattr(parts, args.model)(shape, 10, not args.no_dropout)
    ).to(memory_format=form)
    rounds = train(network, users_of(x[:cut], y[:cut], args.samples), args)
    if int(os.environ.get("RANK", "0")) == 0:
        accuracy = accuracy_of(network, x[cut:], y[cut:])
        give(spent(rounds.ends) | {"accuracy": accuracy})
    # pfl leaves its group open, and a process may abort on the way out.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def users_of(x: Tensor, y: Tensor, samples: int) -> FederatedDataset:
    """Return the users; each has so many samples."""
    pairs = zip(x.split(samples), y.split(samples), strict=True)
    users = {
        user: PyTorchTensorDataset(pair, user_id=str(user))
        for user, pair in enumerate(pairs)
    }
    sampler = get_user_sampler("random", list(users))
    return FederatedDataset(users.__getitem__, sampler)


def train(
    network: Classifier, federated: FederatedDataset, args: argparse.Namespace
) -> Rounds:
    """Train with pfl's FederatedAveraging, and return when rounds ended."""
    parameters = list(network.parameters())
    model = PyTorchModel(
        network, torch.optim.SGD, torch.optim.SGD(parameters, 1.0)
    )
    rounds = Rounds()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=args.rounds + 1,
            # In the first round only, which is warm-up.
            evaluation_frequency=args.rounds + 1,
            train_cohort_size=args.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            federated, federated, postprocessors=[WeightByDatapoints()]
        ),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=0.1, local_batch_size=10
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=1000),
        callbacks=[rounds],
    )
    return rounds


def accuracy_of(network: Classifier, x: Tensor, y: Tensor) -> float:
    """Return the accuracy on test samples."""
    batches = zip(x.split(1000), y.split(1000), strict=True)
    test = [network.metrics(a, b)["accuracy"] for a, b in batches]
    return sum(part.overall_value for part in test) / len(test)


def normalised(images: np.ndarray) -> Tensor:
    """Mean 0 and variance 1 a channel."""
    x = torch.from_numpy(images).float() / 255
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


if __name__ == "__main__":
    main()
