"""Descriptions of the parts of an experiment on a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedknow.protocols.descriptions import Description, Setting

__all__ = ["print_description", "print_list"]


def print_list(console: Console, lines: Mapping[str, str]) -> None:
    """Print names, which never wrap, each with a line about it."""
    console.print(_pairs(lines), highlight=False)


def print_description(
    console: Console, name: str, description: Description
) -> None:
    """Print the description of one part of an experiment."""
    console.print(Text(f"{name}: {description.summary}", "bold"), highlight=False)
    if description.facts:
        console.print(
            Padding(_pairs(description.facts), (1, 0, 0, 0)), highlight=False
        )
    if description.section:
        key = f"{description.section}.NAME"
        title = "No settings of its own"
        if description.settings:
            title = f"Settings (--set {key}=VALUE)"
        console.print(Text(f"\n{title}", "bold"), highlight=False)
    for setting in description.settings:
        # As text: brackets in a default are no markup.
        console.print(Text(_assignment(setting)), highlight=False)
        for text in _explanations(setting):
            console.print(Padding(Text(text), (0, 0, 0, 4)), highlight=False)
    if description.text:
        console.print(Text(description.text), highlight=False, soft_wrap=True)


def _pairs(lines: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    # Names stay whole, so that they can be copied.
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(Text(name), Text(text))
    return table


def _assignment(setting: Setting) -> str:
    if setting.default is None:
        return f"  {setting.name} (must be set)"
    # An empty default stands for an option that is off.
    if not setting.default:
        return f"  {setting.name} (not set)"
    return f"  {setting.name} = {setting.default}"


def _explanations(setting: Setting) -> list[str]:
    """Return a setting's meaning, its values and those searched."""
    paragraphs = []
    if setting.meaning:
        paragraphs.append(setting.meaning)
    if setting.allowed:
        paragraphs.append(f"Values: {setting.allowed}")
    if setting.searched:
        paragraphs.append(f"Searched: {setting.searched}")
    return paragraphs
