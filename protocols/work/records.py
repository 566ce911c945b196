"""Reading of the records of a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedknow.protocols.messages import (
    ARRAYS,
    EXTRA,
    KEPT,
    Arrays,
    Config,
    Metrics,
    Record,
)

__all__ = ["find_arrays", "find_parameters", "merge_settings", "other_records"]


def merge_settings(content: Mapping[str, Record]) -> dict[str, Any]:
    """Put a message's config records together; the earlier record wins.

    Parameters
    ----------
    content : mapping
        Records by name, as in a message.

    Returns
    -------
    dict
        All their settings.
    """
    settings: dict[str, Any] = {}
    for record in content.values():
        if isinstance(record, Config):
            # Earlier records stand last in the union, so that their values win.
            settings = {**record, **settings}
    return settings


def find_arrays(content: Mapping[str, Record], name: str) -> Arrays | None:
    """Find the arrays of a name; a record of another type is not for us."""
    record = content.get(name)
    return record if isinstance(record, Arrays) else None


def find_parameters(content: Mapping[str, Record]) -> Arrays:
    """Find the model's parameters.

    A strategy may give their record another name, so that the earliest arrays stand in.
    """
    named = find_arrays(content, ARRAYS)
    if named is not None:
        return named
    # Flower's strategies let users name the record, so it may have any name.
    records = (
        record for record in content.values() if isinstance(record, Arrays)
    )
    return next(records, Arrays())


def other_records(
    content: Mapping[str, Record], parameters: Arrays
) -> dict[str, Arrays | Metrics]:
    """Gather the records that are no part of the project's own messages."""
    records: dict[str, Arrays | Metrics] = {}
    for name, record in content.items():
        is_ours = record is parameters or name in (EXTRA, KEPT)
        if isinstance(record, Metrics) or (
            isinstance(record, Arrays) and not is_ours
        ):
            records[name] = record
    return records
