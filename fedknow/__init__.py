"""fedknow: federated continual learning with signature task knowledge.

>>> import fedknow
>>> config = fedknow.experiment("digits", learner="gem")
>>> config.learner.name
'gem'
"""

from importlib import import_module
from pkgutil import extend_path
from typing import Any

# The folders (client, server, ...) lie beside this folder in the repository and are joined to
# this name when installed. Started from the repository's root, Python would see only this
# folder; this line finds the installed folders too.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

# Where each public name lies. It is imported when it is used: PyTorch alone takes seconds.
# Editors and type checkers read `__init__.pyi`, which a test holds to this table.
_HOMES = {
    "Callback": "fedknow.api.callbacks",
    "ComparedRuns": "fedknow.api.comparisons",
    "ConfigError": "fedknow.protocols.config",
    "Dataset": "fedknow.client.data",
    "EarlyStopping": "fedknow.api.callbacks",
    "ExperimentConfig": "fedknow.protocols.config",
    "FedknowError": "fedknow.protocols.errors",
    "KeepBest": "fedknow.api.callbacks",
    "Learner": "fedknow.client.learners",
    "LearnerSettings": "fedknow.client.learners",
    "LivePlot": "fedknow.api.live",
    "Run": "fedknow.api.runs",
    "SearchResult": "fedknow.api.sweeps",
    "SplitModel": "fedknow.client.models.split",
    "StopRun": "fedknow.api.callbacks",
    "compare": "fedknow.api.comparisons",
    "experiment": "fedknow.api.experiments",
    "list_learners": "fedknow.client.learners",
    "list_models": "fedknow.client.models",
    "load_run": "fedknow.api.runs",
    "search": "fedknow.api.sweeps",
    "simulate": "fedknow.api.simulation",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedknow' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    # From now on Python finds it without this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names for completion."""
    return sorted({*globals(), *_HOMES})
