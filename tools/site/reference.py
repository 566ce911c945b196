"""The pages of the reference that are made from the code.

``mkdocs`` calls :func:`pages` through ``tools/site/hooks.py``. To read one page::

    python tools/site/reference.py events
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import commands
from markup import attribute_texts, code, listed, prose, section, table
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import fedknow
from fedknow.client.data import list_datasets
from fedknow.client.descriptions import (
    describe_dataset,
    describe_learner,
    describe_model,
)
from fedknow.client.learners import list_learners
from fedknow.client.models import list_models
from fedknow.protocols import messages, work
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.descriptions import (
    Description,
    allowed_values,
    documented_parameters,
    toml,
)
from fedknow.server.run import checkpoint, events, folder
from fedknow.simulations.fleet.devices import FLEETS, shipped_profiles
from fedknow.simulations.presets import list_presets, load_preset
from fedknow.strategies import describe_strategy, list_strategies

__all__ = ["PAGES", "pages"]

MADE = "This page is made from the code when the site is built.\n"


def parts(
    title: str,
    about: str,
    names: dict[str, str],
    describe: Callable[[str], Description],
) -> str:
    """Make a page with a section for each part of one kind."""
    overview = table(
        ["name", "in a line"],
        [[f"[`{name}`](#{anchor(name)})", line] for name, line in names.items()],
    )
    sections = [part(name, describe(name)) for name in names]
    return section(1, title, about, MADE, overview) + "".join(sections)


def anchor(heading: str) -> str:
    """Give the anchor of a heading, as Python-Markdown makes it."""
    kept = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    return re.sub(r"[-\s]+", "-", kept)


def part(name: str, described: Description) -> str:
    """Make the section of one part."""
    rows = [
        [
            f"`{described.section}.{setting.name}`",
            "must be set" if setting.default is None else code(setting.default),
            setting.allowed,
            setting.searched,
            setting.meaning,
        ]
        for setting in described.settings
    ]
    heads = ["setting", "default", "values", "searched", "meaning"]
    settings = table(heads, rows) if rows else ""
    return section(2, name, described.summary, listed(described.facts), settings)


def learners() -> str:
    """Make the page of the learners."""
    about = "A learner is the method on a client. Set it with `--set learner=NAME`."
    return parts("Learners", about, list_learners(), describe_learner)


def strategies() -> str:
    """Make the page of the strategies."""
    about = (
        "A strategy is the method on the server. Set it with `--set strategy=NAME`. "
        "Any other Flower strategy goes by `module:Class`."
    )
    return parts("Strategies", about, list_strategies(), describe_strategy)


def models() -> str:
    """Make the page of the models."""
    about = "A model is a body and a head. Set it with `--set model=NAME`."
    return parts("Models", about, list_models(), describe_model)


def data_sets() -> str:
    """Make the page of the data sets."""
    about = (
        "Set a data set with `--set data.name=NAME`. "
        "[The guide](../how-to/add-a-data-set.md) has the layouts and the rules for images."
    )
    return parts("Data sets", about, list_datasets(), describe_dataset)


def presets() -> str:
    """Make the page of the presets."""
    text = section(
        1, "Presets", "A preset is an experiment that is shipped under a name.", MADE
    )
    for name, line in list_presets().items():
        complete = load_preset(name, []).to_toml()
        text += section(2, name, line, f"```toml\n{complete.strip()}\n```")
    return text


def devices() -> str:
    """Make the page of the devices."""
    rows = [
        [
            f"`{name}`",
            profile.about,
            f"{profile.speed / 1e9:,.0f}",
            f"{profile.room / 1e9:.1f} of {profile.memory / 1e9:.1f}",
            "" if profile.busy is None else f"{profile.busy:g} / {profile.idle:g}",
        ]
        for name, profile in shipped_profiles().items()
    ]
    heads = ["name", "device", "Gflop/s", "GB to train in", "watts busy / idle"]
    fleets = [
        [f"`{name}`", ", ".join(f"{count} {device}" for device, count in mix.items())]
        for name, mix in FLEETS.items()
    ]
    about = (
        "A profile says how fast a device trains, its memory and its power. "
        "Compare speeds only between devices of one kind, because their sources differ."
    )
    text = section(1, "Devices", about, MADE, table(heads, rows))
    text += section(2, "Whole fleets", table(["name", "devices"], fleets))
    sources = [
        [f"`{name}`", quantity, source]
        for name, profile in shipped_profiles().items()
        for quantity, source in profile.source.items()
    ]
    return text + section(2, "Sources", table(["device", "number", "from"], sources))


def configuration() -> str:
    """Make the page of the configuration."""
    about = (
        "An experiment is a preset or a TOML file. Change any setting with "
        "`--set key=value`. Unknown keys and impossible values are refused, and the "
        "message names valid ones. For a file of your own, begin with "
        "`fedknow show EXPERIMENT > mine.toml`."
    )
    text = section(1, "Configuration", about, MADE)
    inner = []
    rows = []
    for name, setting in ExperimentConfig.model_fields.items():
        kind = setting.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((name, kind))
        else:
            rows.append(setting_row(name, setting, {}))
    text += section(2, "At the top", table(SETTING_HEADS, rows))
    for name, kind in inner:
        texts = attribute_texts(kind)
        fields = kind.model_fields.items()
        rows = [setting_row(f"{name}.{key}", each, texts) for key, each in fields]
        document = prose(inspect.getdoc(kind) or "")
        text += section(2, name, document, table(SETTING_HEADS, rows))
    return text


SETTING_HEADS = ["key", "default", "values", "meaning"]


def setting_row(key: str, setting: Any, texts: dict[str, str]) -> list[str]:
    """Make the row of one setting."""
    default = setting.default
    shown = "" if default is PydanticUndefined else toml(default)
    if default in ("", {}):
        shown = "" if default == "" else "{}"
    values = allowed_values(setting)
    if any(mark in values for mark in ("[", "Union", "<class")):
        values = ""  # a type of Python's says nothing to a reader
    return [
        f"`{key}`",
        code(shown),
        values,
        prose(texts.get(key.rpartition(".")[2], "")),
    ]


def event_kinds() -> str:
    """Make the page of the events."""
    about = (
        "Each line of `metrics.jsonl` is one event, as JSON. "
        "[Callbacks](api.md) get the same events as objects."
    )
    document = (inspect.getdoc(events) or "").partition("\n\n")[2]
    text = section(1, "Events", about, MADE, prose(document))
    for name, kind in events.KINDS.items():
        text += section(2, name, f"Class `{kind.__name__}`. {first_line(kind)}")
        text = text.rstrip() + "\n\n" + fields_table(kind)
    text += section(2, "Virtual time", first_line(events.VirtualTime))
    return text.rstrip() + "\n\n" + fields_table(events.VirtualTime)


def fields_table(kind: type) -> str:
    """Make the table of a dataclass's fields and of what its docstring says of them."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        document = (base.__doc__ or "").replace("Attributes\n", "Parameters\n")
        meanings |= documented_parameters(_Documented(document))
    rows = [
        [f"`{each.name}`", code(str(each.type)), meanings.get(each.name, "")]
        for each in dataclasses.fields(kind)
        if not each.name.startswith("_")
    ]
    return table(["field", "type", "meaning"], rows) + "\n"


class _Documented:
    """Carries a docstring to a function that reads an object's."""

    def __init__(self, text: str) -> None:
        self.__doc__ = text


def first_line(documented: object) -> str:
    """Give the first line of a docstring as Markdown."""
    return prose((inspect.getdoc(documented) or "").partition("\n")[0])


def message_kinds() -> str:
    """Make the page of the messages."""
    about = prose((inspect.getdoc(messages) or "").partition("\n\n")[2])
    text = section(1, "Messages", about, MADE)
    text += section(2, "Message", first_line(messages.Message))
    text += fields_table(messages.Message)
    text += section(
        2,
        "Work and reports",
        "Work is a request to a client, and a report is its answer. "
        "Tasks count from 0 and are positions in the client's own order. "
        "Node ids are `client + 2`.",
    )
    for kind in (
        work.Position,
        work.TrainWork,
        work.EndTaskWork,
        work.ScoreWork,
        work.TrainReport,
        work.EndTaskReport,
        work.ScoreReport,
        work.TaskScores,
    ):
        text += section(3, kind.__name__, first_line(kind)) + fields_table(kind)
    rows = [[f"`{name}`"] for name in work.COSTS]
    note = "Every report has these costs. All are floats."
    return text + section(2, "Costs", note, table(["metric"], rows))


def run_folder() -> str:
    """Make the page of the run folder."""
    document = inspect.getdoc(folder) or ""
    rows = [
        [f"`{name}`", meaning]
        for name, meaning in re.findall(r"^    (\S+)\s{2,}(.+)$", document, re.M)
    ]
    rows.append(["`report.html`, `plots/`", "the report, which needs no network"])
    about = "A run folder holds everything that a run leaves behind."
    after = document.rpartition("\n\n")[2]
    text = section(
        1, "Run folder", about, MADE, table(["entry", "holds"], rows), prose(after)
    )
    about = prose((inspect.getdoc(checkpoint) or "").partition("\n\n")[2])
    text += section(2, "Checkpoints", about)
    arrays = prose(inspect.getdoc(folder.RunFolder.accuracy) or "")
    arrays = arrays.partition("\n\nRaises")[0]
    text += section(2, "accuracy.npz", f"```text\n{arrays}\n```")
    return text + section(2, "metrics.jsonl", "See [events](events.md).")


def public_names() -> str:
    """Make the page of the Python interface; mkdocstrings fills it."""
    about = (
        "These names are imported from `fedknow`. Each is loaded when it is first used, "
        "so `import fedknow` is fast."
    )
    text = section(1, "Python interface", about)
    names = [name for name in fedknow.__all__ if not name.startswith("_")]
    for name in sorted(names, key=str.lower):
        target = getattr(fedknow, name)
        path = f"{target.__module__}.{name}"
        text += f"::: {path}\n    options:\n      heading_level: 2\n\n"
    return text


PAGES: dict[str, Callable[[], str]] = {
    "command-line": commands.page,
    "configuration": configuration,
    "events": event_kinds,
    "run-folder": run_folder,
    "messages": message_kinds,
    "learners": learners,
    "strategies": strategies,
    "models": models,
    "data-sets": data_sets,
    "devices": devices,
    "presets": presets,
    "api": public_names,
}
"""All pages that are made, by their names below ``docs/reference/``."""


def pages() -> dict[str, str]:
    """Make all pages: their paths below ``docs/`` and their texts."""
    return {f"reference/{name}.md": make() for name, make in PAGES.items()}


if __name__ == "__main__":
    print(PAGES[sys.argv[1]]())
