"""The pages of the reference that are made from the code.

``mkdocs`` calls :func:`pages` through ``tools/site/hooks.py``. To read one page::

    python tools/site/reference.py events
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Mapping
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

SETTING_HEADS = ["setting", "default", "meaning"]
MADE = "This page is made from the code when the site is built.\n"


def parts(
    title: str,
    intro: str,
    names: dict[str, str],
    describe: Callable[[str], Description],
) -> str:
    """Make a page with a section for each part of one kind."""
    overview = table(
        ["name", "in a line"],
        [[f"[`{name}`](#{anchor(name)})", line] for name, line in names.items()],
    )
    sections = [part(name, describe(name)) for name in names]
    return section(1, title, intro, MADE, overview) + "".join(sections)


def anchor(heading: str) -> str:
    """Give the anchor of a heading, as Python-Markdown makes it."""
    plain_text = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
    return re.sub(r"[-\s]+", "-", plain_text)


def explained(meaning: str, values: str, searched: str = "") -> str:
    """Join the texts of a setting: narrow screens have three columns."""
    texts = [meaning, f"Values: {values}." if values not in ("", "text") else ""]
    texts.append(f"Searched: {searched}." if searched else "")
    return " ".join(text for text in texts if text)


def part(name: str, described: Description) -> str:
    """Make the section of one part."""
    rows = [
        [
            f"`{described.section}.{setting.name}`",
            "must be set" if setting.default is None else code(setting.default),
            explained(setting.meaning, setting.allowed, setting.searched),
        ]
        for setting in described.settings
    ]
    settings = table(SETTING_HEADS, rows) if rows else ""
    return section(2, name, described.summary, listed(described.facts), settings)


def learners() -> str:
    """Make the page of the learners."""
    intro = (
        "A learner is the method on a client. Set it with `--set learner=NAME`."
    )
    return parts("Learners", intro, list_learners(), describe_learner)


def strategies() -> str:
    """Make the page of the strategies."""
    intro = (
        "A strategy is the method on the server. Set it with `--set strategy=NAME`. "
        "Any other Flower strategy goes by `module:Class`."
    )
    return parts("Strategies", intro, list_strategies(), describe_strategy)


def models() -> str:
    """Make the page of the models."""
    intro = "A model is a body and a head. Set it with `--set model=NAME`."
    return parts("Models", intro, list_models(), describe_model)


def data_sets() -> str:
    """Make the page of the data sets."""
    intro = (
        "Set a data set with `--set data.name=NAME`. "
        "[The guide](../how-to/add-a-data-set.md) has the layouts and the rules for images."
    )
    return parts("Data sets", intro, list_datasets(), describe_dataset)


def presets() -> str:
    """Make the page of the presets."""
    text = section(
        1,
        "Presets",
        "A preset is an experiment that is shipped under a name.",
        MADE,
    )
    for name, line in list_presets().items():
        complete = load_preset(name, []).to_toml()
        text += section(2, name, line, f"```toml\n{complete.strip()}\n```")
    return text


def counted(mix: Mapping[str, int]) -> str:
    """Write how many devices of each kind a fleet has."""
    return ", ".join(f"{count} {device}" for device, count in mix.items())


def devices() -> str:
    """Make the page of the devices."""
    rows = [
        [
            f"`{name}`",
            profile.about,
            f"{profile.speed / 1e9:,.0f}",
            f"{profile.memory_limit / 1e9:.1f} of {profile.memory / 1e9:.1f}",
            ""
            if profile.busy is None
            else f"{profile.busy:g} / {profile.idle:g}",
        ]
        for name, profile in shipped_profiles().items()
    ]
    heads = ["name", "device", "Gflop/s", "GB to train in", "watts busy / idle"]
    fleets = [[f"`{name}`", counted(mix)] for name, mix in FLEETS.items()]
    intro = (
        "A profile says how fast a device trains, its memory and its power. "
        "Compare speeds only between devices of one kind, because their sources differ."
    )
    text = section(1, "Devices", intro, MADE, table(heads, rows))
    text += section(2, "Whole fleets", table(["name", "devices"], fleets))
    sources: list[list[str]] = []
    for name, profile in shipped_profiles().items():
        pairs = profile.source.items()
        sources += [[f"`{name}`", quantity, source] for quantity, source in pairs]
    return text + section(
        2, "Sources", table(["device", "number", "from"], sources)
    )


def configuration() -> str:
    """Make the page of the configuration."""
    intro = (
        "An experiment is a preset or a TOML file. Change any setting with "
        "`--set key=value`. Unknown keys and impossible values are refused, and the "
        "message names valid ones. For a file of your own, begin with "
        "`fedknow show EXPERIMENT > mine.toml`."
    )
    text = section(1, "Configuration", intro, MADE)
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
        explained(prose(texts.get(key.rpartition(".")[2], "")), values),
    ]


def event_kinds() -> str:
    """Make the page of the events."""
    intro = (
        "Each line of `metrics.jsonl` is one event, as JSON. "
        "[Callbacks](api.md) get the same events as objects."
    )
    document = (inspect.getdoc(events) or "").partition("\n\n")[2]
    text = section(1, "Events", intro, MADE, prose(document))
    for name, kind in events.KINDS.items():
        text += section(2, name, f"Class `{kind.__name__}`. {first_line(kind)}")
        text = text.rstrip() + "\n\n" + fields_table(kind)
    text += section(2, "Virtual time", first_line(events.VirtualTime))
    return text.rstrip() + "\n\n" + fields_table(events.VirtualTime)


def fields_table(kind: type) -> str:
    """Make the table of a dataclass's fields, with their documented meaning."""
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
    intro = prose((inspect.getdoc(messages) or "").partition("\n\n")[2])
    text = section(1, "Messages", intro, MADE)
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
    intro = "A run folder holds everything that a run leaves behind."
    closing = document.rpartition("\n\n")[2]
    text = section(
        1,
        "Run folder",
        intro,
        MADE,
        table(["entry", "holds"], rows),
        prose(closing),
    )
    intro = prose((inspect.getdoc(checkpoint) or "").partition("\n\n")[2])
    text += section(2, "Checkpoints", intro)
    arrays = prose(inspect.getdoc(folder.RunFolder.accuracy) or "")
    arrays = arrays.partition("\n\nRaises")[0]
    text += section(2, "accuracy.npz", f"```text\n{arrays}\n```")
    return text + section(2, "metrics.jsonl", "See [events](events.md).")


def public_names() -> str:
    """Make the page of the Python interface; mkdocstrings fills it."""
    intro = (
        "These names are imported from `fedknow`. Each is loaded when it is first used, "
        "so `import fedknow` is fast."
    )
    text = section(1, "Python interface", intro)
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
