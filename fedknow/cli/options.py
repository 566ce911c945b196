"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import typer

from fedknow.protocols.config import ExperimentConfig, read_config
from fedknow.simulations.presets import list_presets, load_preset

__all__ = [
    "CLIENT_TLS",
    "DATA_DIR",
    "EXPERIMENT",
    "INSECURE",
    "OUT",
    "QUIET",
    "SERVER",
    "SET",
    "TRACK",
    "Listed",
    "default_run_folder",
    "overrides",
    "read_experiment",
    "split_names",
]


def complete_preset(incomplete: str) -> list[str]:
    """Offer presets to a shell that completes an experiment."""
    return [name for name in list_presets() if name.startswith(incomplete)]


# Arguments are explained in the commands' texts: typer and click do not agree on how to show an
# argument's own help.
EXPERIMENT = typer.Argument(metavar="EXPERIMENT", autocompletion=complete_preset)
SET = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    help="Change one setting; may be given many times. `fedknow show` prints them all.",
)
DATA_DIR = typer.Option(
    "--data-dir",
    metavar="DIR",
    help="Folder with `cifar100/*.parquet`, `omniglot/*.parquet` as on the Hugging Face hub. "
    "Without it `FEDKNOW_DATA` is used; `digits` needs neither.",
)
OUT = typer.Option(
    "--out",
    metavar="DIR",
    help="Run folder.  [default: runs/NAME-LEARNER-seedN]",
    show_default=False,
)
SERVER = typer.Option(
    "--server", metavar="HOST:PORT", help="Where the server listens."
)
CLIENT_TLS = typer.Option(
    "--tls",
    metavar="DIR",
    help="`clients/NNN/` of a folder that `fedknow certs` made.",
)
INSECURE = typer.Option(
    "--insecure",
    help="Without TLS although the address is not on this machine alone.",
)
TRACK = typer.Option(
    "--track",
    metavar="NAME,NAME",
    help="Trackers that follow the run (`fedknow list trackers`), as `tracking.to`; may be "
    "given many times.",
)
QUIET = typer.Option(
    "--quiet", "-q", help="Print nothing but errors and where the report is."
)


class Listed(StrEnum):
    """The kinds of parts that ``fedknow list`` lists."""

    learners = "learners"
    strategies = "strategies"
    models = "models"
    datasets = "datasets"
    devices = "devices"
    trackers = "trackers"
    presets = "presets"


def overrides(
    changes: Sequence[str] | None,
    data_dir: Path | None,
    track: Sequence[str] | None = None,
) -> list[str]:
    """Return all changes of an experiment as ``key=value``, in their order."""
    texts = list(changes or [])
    # A JSON string is a TOML string, so no folder's name can be taken for a number.
    if data_dir is not None:
        texts.append(f"data.dir={json.dumps(str(data_dir))}")
    if track:
        texts.append(f"tracking.to={json.dumps(','.join(track))}")
    return texts


def read_experiment(
    experiment: str,
    changes: Sequence[str] | None,
    data_dir: Path | None,
    track: Sequence[str] | None = None,
) -> ExperimentConfig:
    """Read a preset by its name, else a TOML file, with the changes applied."""
    # A preset's name has neither.
    is_file = experiment.endswith(".toml") or os.sep in experiment
    read = read_config if is_file else load_preset
    return read(experiment, overrides(changes, data_dir, track))


def split_names(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def default_run_folder(config: ExperimentConfig) -> Path:
    """Return the folder of a run without ``--out``."""
    # A learner of the user's own has a colon in its name.
    learner = re.sub(r"[^A-Za-z0-9._-]", "-", config.learner.name)
    return Path("runs") / f"{config.name}-{learner}-seed{config.seed}"
