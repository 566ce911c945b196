"""Docstrings are reStructuredText in part; the site's pages are Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from markup import prose

__all__ = ["Roles"]


class Roles(griffe.Extension):
    """Writes roles such as ``:class:`` as code."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of an object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = prose(obj.docstring.value)
