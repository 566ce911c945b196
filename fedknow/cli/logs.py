"""The log of servers and clients, as plain lines or as JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

__all__ = ["JsonFormatter", "LogFormat", "start_log"]

CLIENT = re.compile(r"\bclient (\d+)\b")
"""How our messages name the client that they are about."""


class LogFormat(StrEnum):
    """How log lines are written."""

    PLAIN = "plain"
    JSON = "json"


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object on one line.

    Parameters
    ----------
    context : mapping
        Further values of each object, such as the run.
    """

    def __init__(self, context: Mapping[str, Any]) -> None:
        super().__init__()
        self._context = dict(context)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        moment = datetime.fromtimestamp(record.created, UTC)
        message = record.getMessage()
        values: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **self._context,
        }
        client = CLIENT.search(message)
        if client is not None:
            values.setdefault("client", int(client[1]))
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False)


def start_log(
    log_format: LogFormat, is_quiet: bool, context: Mapping[str, Any]
) -> None:
    """Write the log to stderr.

    Parameters
    ----------
    log_format : LogFormat
    is_quiet : bool
        Write nothing below warnings.
    context : mapping
        Values of each JSON line.
    """
    handler = logging.StreamHandler()
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter(context))
    else:
        text = "%(asctime)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(text))
    # ``force``: a library may have set up the log before.
    logging.basicConfig(handlers=[handler], force=True)
    level = logging.WARNING if is_quiet else logging.INFO
    logging.getLogger("fedknow").setLevel(level)
