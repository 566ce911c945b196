"""The built-in strategies by name, and the search for a user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedknow.protocols.config import ConfigError, closest
from fedknow.protocols.installed import find_installed, list_installed
from fedknow.protocols.plugins import check_maker, is_reference, load_object
from fedknow.strategies.central_privacy import GaussianMean
from fedknow.strategies.closed_form import Afcl, Stsa
from fedknow.strategies.fedasync import FedAsync
from fedknow.strategies.fedbuff import FedBuff
from fedknow.strategies.fedprotip import FedProtip
from fedknow.strategies.fedweit import FedWeit
from fedknow.strategies.flcn import Flcn
from fedknow.strategies.fot import Fot
from fedknow.strategies.guarded import (
    AdaptiveClipping,
    FixedClipping,
    QFedAvg,
)
from fedknow.strategies.joint import JointCentral
from fedknow.strategies.lander import Lander
from fedknow.strategies.loci import Loci
from fedknow.strategies.lorm import Lorm
from fedknow.strategies.robust import (
    Bulyan,
    CentredClipping,
    Krum,
    MultiKrum,
    select_repeatedly,
)
from fedknow.strategies.semisync import SemiSync
from fedknow.strategies.target import Target
from fedknow.strategies.unsuited import PORTING, is_of_old_interface

__all__ = [
    "BUILTIN",
    "DEFAULTS",
    "OBJECTS",
    "Builtin",
    "find_strategy",
    "list_strategies",
]


@dataclass(frozen=True)
class Builtin:
    """A strategy with a name, and the defaults that suit our experiments.

    Attributes
    ----------
    strategy : callable
        Makes the strategy.
    summary : str
        One line about it.
    defaults : mapping
        Options that are set unless the user sets them.
    wrapper : callable, optional
        Wraps the strategy; options that are the wrapper's own go to it.
    """

    strategy: Callable[..., Strategy]
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Callable[..., Strategy] | None = None


DEFAULTS = {
    # The experiment scores every client itself, on every task. One client is enough to start.
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}

# No file can hold these. A user who needs one subclasses the strategy and names the class.
OBJECTS = (
    "strategy",
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
    "selection_rule",
    "accountant",
)

BUILTIN = {
    "fedavg": Builtin(
        flower.FedAvg,
        "weighted mean of the clients' parameters (McMahan et al. 2017)",
    ),
    "fedprox": Builtin(
        flower.FedProx,
        "FedAvg, clients pulled towards the global model by proximal_mu (Li et al. 2020)",
    ),
    "fedasync": Builtin(
        FedAsync,
        "each answer is mixed into the model as it arrives (Xie et al. 2019)",
    ),
    "fedbuff": Builtin(
        FedBuff,
        "asynchronous, a step from every so many answers (Nguyen et al. 2022)",
    ),
    "semisync": Builtin(
        SemiSync, "rounds end at a deadline, and who is late counts in the next"
    ),
    "flcn": Builtin(
        Flcn,
        "FedAvg with importance weights from proxy data, for the learner flcn (Yao and Sun 2020)",
    ),
    "fedweit": Builtin(
        FedWeit,
        "sparse bases and everybody's adaptive parameters, for the learner fedweit "
        "(Yoon et al. 2021)",
    ),
    "fot": Builtin(
        Fot,
        "FedAvg orthogonal to past tasks' inputs, for the learner fot (Bakman et al. 2024)",
    ),
    "fedprotip": Builtin(
        FedProtip,
        "the same, and features to guess tasks by, for the learner fedprotip (Cha et al. 2025)",
    ),
    "joint-central": Builtin(
        JointCentral,
        "training on all data in one place, for the learner joint-central",
    ),
    "target": Builtin(
        Target,
        "FedAvg and images made of the model, for the learner target (Zhang et al. 2023)",
    ),
    "lander": Builtin(
        Lander,
        "the same, near an anchor for each class, for the learner lander (Tran et al. 2024)",
    ),
    "loci": Builtin(
        Loci,
        "each task's knowledge mixed with that of like tasks, for the learner loci (Luopan et al. "
        "2025)",
    ),
    "lorm": Builtin(
        Lorm,
        "low-rank adapters merged in closed form, for the learner lorm (Salami et al. 2025)",
    ),
    "afcl": Builtin(
        Afcl,
        "a ridge regression of the clients' sums, for the learner afcl (Tang et al. 2025)",
    ),
    "stsa": Builtin(
        Stsa,
        "the same on random features or class sums, for the learner stsa (Guan et al. 2026)",
    ),
    "fedavgm": Builtin(
        flower.FedAvgM, "FedAvg with server momentum (Hsu et al. 2019)"
    ),
    "fedadam": Builtin(flower.FedAdam, "Adam on the server (Reddi et al. 2021)"),
    "fedadagrad": Builtin(
        flower.FedAdagrad, "Adagrad on the server (Reddi et al. 2021)"
    ),
    "fedyogi": Builtin(flower.FedYogi, "Yogi on the server (Reddi et al. 2021)"),
    "fedmedian": Builtin(
        flower.FedMedian,
        "median of each parameter, robust to outliers (Yin et al. 2018)",
    ),
    "fedtrimmedavg": Builtin(
        flower.FedTrimmedAvg,
        "mean without the extreme shares beta of each parameter (Yin et al. 2018)",
    ),
    "krum": Builtin(
        Krum,
        "the one client nearest to the others (Blanchard et al. 2017)",
    ),
    "multikrum": Builtin(
        MultiKrum,
        "mean of the clients nearest to the others (Blanchard et al. 2017)",
    ),
    "bulyan": Builtin(
        Bulyan,
        "Krum's choice, then a trimmed mean (El Mhamdi et al. 2018)",
        # Flower's own rule scores once, where the paper scores anew after each choice.
        {"selection_rule": select_repeatedly},
    ),
    "centred-clipping": Builtin(
        CentredClipping,
        "mean of the clients' changes, each clipped to a radius (Karimireddy et al. 2021)",
    ),
    "qfedavg": Builtin(
        QFedAvg,
        "fairness: clients with a high loss count for more (Li et al. 2020)",
        # Flower's default names a metric that clients here do not send.
        {"train_loss_key": "loss"},
    ),
    "dp-gaussian": Builtin(
        GaussianMean,
        "central differential privacy: clipped changes, noise, and epsilon (McMahan et al. 2018)",
    ),
    "dp-fixed-clipping": Builtin(
        flower.FedAvg,
        "FedAvg with central differential privacy, updates clipped to clipping_norm",
        wrapper=FixedClipping,
    ),
    "dp-adaptive-clipping": Builtin(
        flower.FedAvg,
        "FedAvg with central differential privacy, clipped to a quantile of the updates' norms",
        wrapper=AdaptiveClipping,
    ),
}


def list_strategies() -> dict[str, str]:
    """List the names of strategies, with one line about each.

    Those of installed packages are among them.
    """
    lines = {name: builtin.summary for name, builtin in BUILTIN.items()}
    return lines | list_installed("strategy", BUILTIN)


def find_strategy(name: str) -> Callable[..., Any]:
    """Find the strategy of an installed package or of ``module:Class``.

    Raises
    ------
    ConfigError
        If there is none, or it does not make a strategy.
    """
    if is_reference(name):
        maker = load_object(name, "strategy.name")
    else:
        maker = _installed(name)
    is_class = isinstance(maker, type)
    # A class must be a strategy; a function may make one.
    is_other_class = is_class and not issubclass(maker, Strategy)
    if not callable(maker) or is_other_class:
        # Flower's older strategies have another interface, for which there is advice.
        porting = (
            f"; {PORTING}" if is_class and is_of_old_interface(maker) else ""
        )
        raise ConfigError(
            f"strategy.name = {name!r}: neither a class derived from "
            f"flwr.serverapp.strategy.Strategy nor a function that makes one{porting}"
        )
    return check_maker(
        maker, name, "strategy.name", Strategy, "flwr.serverapp.strategy.Strategy"
    )


def _installed(name: str) -> Any:
    part = find_installed("strategy", name, "strategy.name")
    if part is None:
        names = list_strategies()
        raise ConfigError(
            f"strategy.name = {name!r}: no such strategy{closest(name, names)}; "
            f"there are: {', '.join(names)}, or your own as module:Class"
        )
    return part
