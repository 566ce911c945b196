"""The page of the command line, made from typer's commands."""

from __future__ import annotations

import re
from typing import Any

import typer.main
from markup import code, section, table

from fedknow.cli import app

__all__ = ["page"]


def page() -> str:
    """Make the page of all commands."""
    group: Any = typer.main.get_command(app)
    text = section(
        1,
        "Command line",
        "This page is made from the code when the site is built. "
        "On a terminal, `fedknow COMMAND --help` says the same.",
        _help(group.help),
        "`fedknow --install-completion` has the shell complete commands, options and "
        "presets.",
    )
    for name, command in group.commands.items():
        text += _command(name, command)
    return text


def _command(name: str, command: Any) -> str:
    arguments = [
        each for each in command.params if each.param_type_name == "argument"
    ]
    options = [
        each for each in command.params if each.param_type_name == "option"
    ]
    words = [_shown(each) for each in arguments]
    usage = " ".join(["fedknow", name, *words, "[OPTIONS]"])
    rows = [[_names(each), _default(each), each.help or ""] for each in options]
    heads = ["option", "default", "meaning"]
    options_table = table(heads, rows) if rows else ""
    return section(
        2, name, f"```text\n{usage}\n```", _help(command.help), options_table
    )


def _shown(argument: Any) -> str:
    text = str(argument.metavar or argument.name.upper())
    return text if argument.required else f"[{text}]"


def _names(option: Any) -> str:
    flags = ", ".join(
        f"`{each}`" for each in [*option.opts, *option.secondary_opts]
    )
    if option.is_flag:
        return flags
    return f"{flags} `{option.metavar or option.type.name.upper()}`"


def _default(option: Any) -> str:
    default = option.default
    if default is None or callable(default) or default in (False, ()):
        return ""
    return code(str(getattr(default, "value", default)))


def _help(text: str | None) -> str:
    """Give a command's text as Markdown, without marks of typer's own."""
    return re.sub(r"^\s*\x08\s*$", "", text or "", flags=re.M)
