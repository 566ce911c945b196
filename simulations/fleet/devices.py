"""Device profiles: their speed, memory and power, and their clients."""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fedknow.protocols.config import ConfigError, FleetConfig, closest
from fedknow.protocols.seeds import generator
from fedknow.protocols.texts import counted

__all__ = [
    "FLEETS",
    "Profile",
    "assign",
    "describe_devices",
    "list_devices",
    "load_profiles",
    "read_profiles",
    "shipped_memory_limits",
    "shipped_profiles",
]

NUMBERS = ("peak", "efficiency", "memory", "reserved", "busy", "idle")

FLEETS: Mapping[str, Mapping[str, int]] = {
    "testbed-a": {
        "jetson-nano": 8,
        "jetson-tx2": 2,
        "jetson-xavier-nx": 8,
        "jetson-agx-xavier": 2,
    },
    "testbed-b": {
        "jetson-nano": 8,
        "jetson-tx2": 2,
        "jetson-xavier-nx": 8,
        "jetson-agx-xavier": 2,
        "raspberry-pi-4-2gb": 1,
        "raspberry-pi-4-4gb": 5,
        "raspberry-pi-4-8gb": 4,
    },
}
"""Whole fleets, the testbeds of the FedKNOW paper (Luopan et al., ICDE 2023).

The one has twenty Jetsons, the other ten Raspberry Pis more.
"""

PHONE_SCORES = (329.0, 1481.0, 2324.0)
"""AI-benchmark scores at which FLASH's classes of phones stand."""


class Profile(BaseModel):
    """One kind of device.

    Attributes
    ----------
    about : str
        A description for people.
    peak : float
        fp32 peak, FLOP/s (a multiply-add is two).
    efficiency : float
        Share of the peak that training sustains.
    memory, reserved : float
        Bytes that it has, and the part of these that is taken before there is a model.
    busy, idle : float or None
        Watts while computing and otherwise. None: unknown, and then so is the energy of a fleet
        that has it.
    source : dict of str to str
        The source of each number; "assumed: ..." where nobody measured it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=True)

    about: str = ""
    peak: float = Field(gt=0)
    efficiency: float = Field(1.0, gt=0, le=1)
    memory: float = Field(gt=0)
    reserved: float = Field(0.0, ge=0)
    busy: float | None = Field(None, ge=0)
    idle: float | None = Field(None, ge=0)
    source: dict[str, str]

    @property
    def speed(self) -> float:
        """Sustained FLOP/s."""
        return self.peak * self.efficiency

    @property
    def memory_limit(self) -> float:
        """Bytes that training may take."""
        return self.memory - self.reserved


@cache
def shipped_profiles() -> dict[str, Profile]:
    """Return the devices that come with the package, by name."""
    return read_profiles(Path(__file__).with_name("devices.toml"))


def shipped_memory_limits() -> dict[str, float]:
    """Return the bytes that training may take on each shipped device."""
    profiles = shipped_profiles()
    return {name: profile.memory_limit for name, profile in profiles.items()}


def read_profiles(path: Path) -> dict[str, Profile]:
    """Read the devices of a TOML file that is laid out like the shipped one.

    Raises
    ------
    ConfigError
        If the file is missing or malformed, or a number has no source.
    """
    try:
        tree: dict[str, dict[str, Any]] = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"fleet.profiles = {str(path)!r}: cannot be read: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"fleet.profiles: {path}: not valid TOML: {error}"
        ) from None
    return {name: _read_profile(path, tree, name) for name in tree}


def _read_profile(
    path: Path, tree: Mapping[str, Mapping[str, Any]], name: str
) -> Profile:
    """Read one device of a file, and refuse numbers without a source."""
    fields = tree[name]
    prefix = f"fleet.profiles: {path}: {name}"
    try:
        # A device may be like another one but for a few numbers.
        base = tree[fields["like"]] if "like" in fields else {}
        values = {**base, **fields}
        values.pop("like", None)
        profile = Profile.model_validate(values)
    except KeyError as error:
        raise ConfigError(
            f"{prefix}: like = {error}: no such device in the file"
        ) from None
    except ValidationError as error:
        faults = "; ".join(map(_fault_text, error.errors()))
        raise ConfigError(f"{prefix}: {faults}") from None
    except TypeError:
        raise ConfigError(
            f"{prefix} = {fields!r}: must be a section, [{name}]"
        ) from None
    # A number without a source cannot be checked by a reader of the results.
    stated = [number for number in NUMBERS if number in fields]
    unsourced = [number for number in stated if number not in profile.source]
    if unsourced:
        raise ConfigError(
            f"{prefix}.source lacks {', '.join(unsourced)}: say where each number is from, "
            "or 'assumed: ...' and why"
        )
    return profile


def _fault_text(fault: ErrorDetails) -> str:
    place = ".".join(map(str, fault["loc"]))
    return f"{place}: {fault['msg']}"


def load_profiles(path: str) -> dict[str, Profile]:
    """Return the shipped devices, and those of a file beside them.

    If two have the same name, that of the file counts.

    Parameters
    ----------
    path : str
        A ``.toml`` laid out like the shipped one, a ``.csv`` list of phones (:func:`phones`),
        or "" for none.

    Raises
    ------
    ConfigError
        If the file is missing or malformed, or a number has no source.
    """
    if not path:
        return dict(shipped_profiles())
    read = phones if path.endswith(".csv") else read_profiles
    return shipped_profiles() | read(Path(path))


def phones(path: Path) -> dict[str, Profile]:
    """Read phones from a list in the layout of the AI-benchmark ranking.

    The speed is interpolated between FLASH's three classes (``phone-low``, ``-middle``,
    ``-high``) by the logarithm of the processor's score. FLASH trained on processors, not GPUs.
    The classes stand at 329, 1481 and 2324, the medians of the list's thirds. Beyond the lowest
    and the highest the speed stays. Watts are those of the nearest class.

    Parameters
    ----------
    path : Path
        CSV with a header and the columns ``model``, ``ram_gb`` and ``cpu_float_score``; others
        are not read.

    Returns
    -------
    dict of str to Profile
        By ``ai-`` and the model's name in small letters, digits and hyphens.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a line lacks a column.
    """
    profiles = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # Line 1 is the header.
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    model, memory, score = _read_phone(row)
                except (KeyError, ValueError, TypeError) as error:
                    raise ConfigError(
                        f"fleet.profiles: {path}, line {line}: needs model, ram_gb and "
                        f"cpu_float_score, the last two numbers above 0: {error}"
                    ) from None
                name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
                profiles[f"ai-{name}"] = _phone(model, memory, score)
    except OSError as error:
        raise ConfigError(
            f"fleet.profiles = {str(path)!r}: cannot be read: {error.strerror}"
        ) from None
    return profiles


def _read_phone(row: Mapping[str, str]) -> tuple[str, float, float]:
    """Return a phone's model, bytes of memory, and the logarithm of its score."""
    # Raises for scores of 0 and below, which are refused with the line's number.
    score = math.log(float(row["cpu_float_score"]))
    memory = 1e9 * float(row["ram_gb"])
    return row["model"], memory, score


def _phone(model: str, memory: float, score: float) -> Profile:
    """Make the profile of a phone between FLASH's three classes."""
    shipped = shipped_profiles()
    classes = [shipped[f"phone-{name}"] for name in ("low", "middle", "high")]
    scores = np.log(PHONE_SCORES)
    # In logarithms, as speeds of phones differ by factors.
    speeds = np.log([profile.speed for profile in classes])
    nearest = classes[int(np.argmin(np.abs(scores - score)))]
    return Profile(
        about=model,
        # Beyond the classes np.interp stays at the last one, and guesses nothing.
        peak=float(np.exp(np.interp(score, scores, speeds))),
        memory=memory,
        # Assumed, as no list says how much a phone's system and apps keep.
        reserved=memory / 2,
        busy=nearest.busy,
        idle=nearest.idle,
        source=dict(nearest.source)
        | {
            "peak": "ai-benchmark.com score, between the classes that FLASH measured",
            "memory": "ai-benchmark.com list",
        },
    )


def assign(config: FleetConfig, clients: int, seed: int) -> list[str]:
    """Return the names of the clients' devices.

    Raises
    ------
    ConfigError
        If a device is unknown or the numbers do not add up to the clients.
    """
    profiles = load_profiles(config.profiles)
    devices = config.devices
    if isinstance(devices, str) and devices in FLEETS:
        devices = dict(FLEETS[devices])
    if isinstance(devices, str):
        devices = [devices]
    for name in devices:
        if not any(fnmatchcase(device, name) for device in profiles):
            hint = closest(name, [*profiles, *FLEETS])
            raise ConfigError(
                f"fleet.devices: no device {name!r}{hint}; fedknow list devices shows all"
            )
    if isinstance(devices, list):
        draw = generator(seed, "fleet.devices")
        names: list[str] = []
        for name in devices:
            names += _matching(name, profiles, draw)
        return list(islice(cycle(names), clients))
    if sum(devices.values()) != clients:
        count = counted(sum(devices.values()), "device")
        raise ConfigError(
            f"fleet.devices: {count} for data.clients = {clients}; make these equal, or give a "
            "list of devices, which is repeated as often as need be"
        )
    return list(
        chain.from_iterable(
            repeat(name, count) for name, count in devices.items()
        )
    )


def _matching(
    name: str, profiles: Mapping[str, Profile], draw: np.random.Generator
) -> list[str]:
    """Return the devices that a name or a pattern fits, in random order."""
    if "*" not in name:
        return [name]
    # Sorted before the draw, so that it depends on the names and not on the file's order.
    devices = sorted(device for device in profiles if fnmatchcase(device, name))
    # NumPy's strings are not JSON's.
    return list(map(str, draw.permutation(devices)))


def list_devices() -> dict[str, str]:
    """Return a line about each device, and about each whole fleet, by name."""
    lines = {}
    for name, profile in shipped_profiles().items():
        lines[name] = profile.about
        # Figures of the device without limits would say nothing.
        if profile.peak < math.inf:
            speed = f"{_giga(profile.speed)}FLOP/s"
            limit = f"room for {_giga(profile.memory_limit)}B"
            lines[name] += f": {speed}, {limit}, {_watts(profile.busy)}"
    for name, devices in FLEETS.items():
        counts = [f"{count} {device}" for device, count in devices.items()]
        lines[name] = f"a whole fleet: {', '.join(counts)}"
    return lines


def describe_devices(name: str) -> dict[str, list[tuple[str, str, str]]]:
    """Describe each number of some devices.

    Parameters
    ----------
    name : str
        A device, a whole fleet, or a pattern (``jetson-*``).

    Returns
    -------
    dict of str to list of (str, str, str)
        By the device's name and description: each number's name, value and source.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    profiles = shipped_profiles()
    members = FLEETS.get(name, {})
    matches = {
        device: profile
        for device, profile in profiles.items()
        if device in members or fnmatchcase(device, name)
    }
    if not matches:
        hint = closest(name, [*profiles, *FLEETS])
        raise ConfigError(
            f"no device {name!r}{hint}; fedknow list devices shows all"
        )
    return {
        f"{device}: {profile.about}": _numbers(profile)
        for device, profile in matches.items()
    }


def _numbers(profile: Profile) -> list[tuple[str, str, str]]:
    source = {name: profile.source.get(name, "by default") for name in NUMBERS}
    return [
        ("peak", f"{_giga(profile.peak)}FLOP/s", source["peak"]),
        ("efficiency", f"{profile.efficiency:g}", source["efficiency"]),
        ("speed", f"{_giga(profile.speed)}FLOP/s", "peak times efficiency"),
        ("memory", f"{_giga(profile.memory)}B", source["memory"]),
        ("reserved", f"{_giga(profile.reserved)}B", source["reserved"]),
        ("room", f"{_giga(profile.memory_limit)}B", "memory less reserved"),
        ("busy", _watts(profile.busy), source["busy"]),
        ("idle", _watts(profile.idle), source["idle"]),
    ]


def _giga(value: float) -> str:
    return f"{value / 1e9:,.4g} G"


def _watts(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g} W"
