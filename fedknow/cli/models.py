"""Commands that use a run's model: export, evaluate, predict."""

from __future__ import annotations

import csv
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.output import out
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

if TYPE_CHECKING:
    from fedknow.api.deployed import DeployedModel

__all__ = ["evaluate", "export", "predict"]


class Format(StrEnum):
    """Formats of an exported model."""

    safetensors = "safetensors"
    onnx = "onnx"
    torchscript = "torchscript"


RUN = typer.Argument(metavar="RUN")
CLIENT = typer.Option(
    "--client",
    metavar="N",
    min=0,
    help="The model of client N (from 0), with its own head, and not the global one.",
)
BEST = typer.Option("--best", help="The model that the callback KeepBest kept.")
DATA = typer.Option(
    "--data",
    metavar="PATH",
    help="An .npz file with `x` (and `y`), a picture, or a folder of pictures.",
)
CLASSES = typer.Option(
    "--classes",
    metavar="N,N",
    help="Labels to choose among, such as those of one task.  [default: all]",
    show_default=False,
)


def export(
    run: Annotated[Path, RUN],
    to: Annotated[
        Format, typer.Option("--to", help="The format.")
    ] = Format.safetensors,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="[default: model.* in the run folder]"
        ),
    ] = None,
    client: Annotated[int | None, CLIENT] = None,
    best: Annotated[bool, BEST] = False,
) -> None:
    """Write a run's model to a file that other programs load.

    `safetensors` holds the weights by name. `onnx` and `torchscript` hold the whole
    computation: images from 0 to 1 in, logits out, for any batch size.

    Example:

    - `fedknow export runs/digits-fedknow-seed0 --to onnx --client 3`
    """
    with explained(None, extra="export"):
        name = "model" if client is None else f"model-client{client}"
        path = _deployed(run, client, best).export(file or run / name, to.value)
        out.print(f"Model: {escape(str(path))}", highlight=False, soft_wrap=True)


def evaluate(
    run: Annotated[Path, RUN],
    data: Annotated[Path, DATA],
    client: Annotated[int | None, CLIENT] = None,
    best: Annotated[bool, BEST] = False,
    classes: Annotated[str, CLASSES] = "",
) -> None:
    """Score a run's model on labelled data of your own.

    Labels are `y` of an .npz file, or the names of the sub-folders that pictures lie in.

    Example:

    - `fedknow evaluate runs/digits-fedknow-seed0 --data mine.npz`
    """
    with explained(None, extra="sim"):
        from fedknow.api.pictures import read_samples

        model = _deployed(run, client, best)
        samples = read_samples(data, model.shape, model.class_names)
        if samples.y is None:
            raise ConfigError(
                f"{data}: has no labels: give `y` in an .npz file, or pictures in folders "
                f"named as the classes: {', '.join(model.class_names[:10])}"
            )
        scores = model.evaluate(samples.x, samples.y, _labels(classes))
        count = counted(scores.samples, "sample")
        out.print(f"accuracy {100 * scores.accuracy:.2f} % of {count}")
        for label, row in enumerate(scores.confusion):
            # Classes without samples have no share.
            if row.sum():
                share = 100 * row[label] / row.sum()
                name = escape(scores.class_names[label])
                out.print(
                    f"  {name}: {share:.1f} % of {row.sum()}", highlight=False
                )


def predict(
    run: Annotated[Path, RUN],
    data: Annotated[Path, DATA],
    client: Annotated[int | None, CLIENT] = None,
    best: Annotated[bool, BEST] = False,
    classes: Annotated[str, CLASSES] = "",
) -> None:
    """Print the class that a run's model gives each sample, as CSV.

    Example:

    - `fedknow predict runs/digits-fedknow-seed0 --data pictures/ > predictions.csv`
    """
    with explained(None, extra="sim"):
        from fedknow.api.pictures import read_samples

        model = _deployed(run, client, best)
        samples = read_samples(data, model.shape, model.class_names)
        labels = model.predict(samples.x, _labels(classes))
        # By a CSV writer and without rich, as names may hold commas and other programs read
        # this.
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["sample", "label", "class"])
        for name, label in zip(samples.names, labels, strict=True):
            table.writerow([name, label, model.class_names[label]])


def _deployed(run: Path, client: int | None, best: bool) -> DeployedModel:
    from fedknow.api.runs import load_run  # imports PyTorch

    return load_run(run).deployed(client, best)


def _labels(text: str) -> list[int] | None:
    if not text:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--classes {text}: give numbers with commas, for example 0,1,2"
        ) from None
