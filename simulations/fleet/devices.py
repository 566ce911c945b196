"""Device profiles: how fast a device trains, how much memory it has, what it draws; and which
client has which."""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    "shipped_profiles",
    "shipped_rooms",
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
"""Whole fleets: the testbeds of the FedKNOW paper (Luopan et al., ICDE 2023), twenty Jetsons, and
ten Raspberry Pis more."""


class Profile(BaseModel):
    """One kind of device.

    Attributes
    ----------
    about : str
        What it is, for people.
    peak : float
        fp32 peak, FLOP/s (a multiply-add is two).
    efficiency : float
        Share of the peak that training sustains.
    memory, reserved : float
        Bytes it has, and of these what is taken before there is a model.
    busy, idle : float or None
        Watts while computing and otherwise; None: not known, and then neither is the energy of
        a fleet that has it.
    source : dict of str to str
        Where each of the numbers is from; "assumed: ..." where nobody measured it.
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
    def room(self) -> float:
        """Bytes that training may take."""
        return self.memory - self.reserved


@cache
def shipped_profiles() -> dict[str, Profile]:
    """The devices that come with the package, by name."""
    return read_profiles(Path(__file__).with_name("devices.toml"))


def shipped_rooms() -> dict[str, float]:
    """Bytes that training may take on each device that comes with the package."""
    return {name: profile.room for name, profile in shipped_profiles().items()}


def load_profiles(path: str) -> dict[str, Profile]:
    """The shipped devices, and those of a file beside them; of two with one name the file's counts.

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
    own = phones(Path(path)) if path.endswith(".csv") else read_profiles(Path(path))
    return shipped_profiles() | own


def phones(path: Path) -> dict[str, Profile]:
    """Phones from a list in the layout of the AI-benchmark ranking.

    Speed: interpolated between FLASH's three classes (``phone-low``, ``-middle``, ``-high``) by
    the logarithm of the processor's score, as FLASH trained on processors, not GPUs; the
    classes stand at 329, 1481 and 2324, the medians of the list's thirds, and beyond the first
    and last the speed stays. Watts are those of the nearest class.

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
    shipped = shipped_profiles()
    classes = [shipped[f"phone-{name}"] for name in ("low", "middle", "high")]
    scores = np.log([329.0, 1481.0, 2324.0])
    # In logarithms, as speeds of phones differ by factors.
    speeds = np.log([profile.speed for profile in classes])
    found = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    score, memory = (
                        # Raises for scores of 0 and below, which are refused with the line's
                        # number.
                        math.log(float(row["cpu_float_score"])),
                        1e9 * float(row["ram_gb"]),
                    )
                    model = row["model"]
                except (KeyError, ValueError, TypeError) as error:
                    raise ConfigError(
                        f"fleet.profiles: {path}, line {line}: needs model, ram_gb and cpu_float_score, the last two "
                        f"numbers above 0: {error}"
                    ) from None
                nearest = classes[int(np.argmin(np.abs(scores - score)))]
                source = (
                    "ai-benchmark.com score, between the classes that FLASH measured"
                )
                found["ai-" + re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")] = (
                    Profile(
                        about=model,
                        peak=float(np.exp(np.interp(score, scores, speeds))),
                        memory=memory,
                        # Assumed, as no list says how much a phone's system and apps keep.
                        reserved=memory / 2,
                        busy=nearest.busy,
                        idle=nearest.idle,
                        source=dict(nearest.source)
                        | {"peak": source, "memory": "ai-benchmark.com list"},
                    )
                )
    except OSError as error:
        raise ConfigError(
            f"fleet.profiles = {str(path)!r}: cannot be read: {error.strerror}"
        ) from None
    return found


def assign(config: FleetConfig, clients: int, seed: int) -> list[str]:
    """Names of the clients' devices.

    Raises
    ------
    ConfigError
        If a device is unknown or the numbers do not add up to the clients.
    """
    known = load_profiles(config.profiles)
    devices = config.devices
    if isinstance(devices, str) and devices in FLEETS:
        devices = dict(FLEETS[devices])
    if isinstance(devices, str):
        devices = [devices]
    for name in devices:
        if not any(fnmatchcase(other, name) for other in known):
            raise ConfigError(
                f"fleet.devices: no device {name!r}{closest(name, [*known, *FLEETS])}; fedknow list devices shows all"
            )
    if isinstance(devices, list):
        draw = generator(seed, "fleet.devices")
        places = list(
            chain.from_iterable(_matching(name, known, draw) for name in devices)
        )
        return list(islice(cycle(places), clients))
    if sum(devices.values()) != clients:
        raise ConfigError(
            f"fleet.devices: {counted(sum(devices.values()), 'device')} for data.clients = {clients}; "
            "make these equal, or give "
            "a list of devices, which is repeated as often as need be"
        )
    return list(
        chain.from_iterable(repeat(name, count) for name, count in devices.items())
    )


def _matching(
    name: str, known: Mapping[str, Profile], draw: np.random.Generator
) -> Sequence[str]:
    if "*" not in name:
        return [name]
    return [
        str(found)
        for found in draw.permutation(
            # Sorted before the draw, so that it depends on the names and not on the file's
            # order.
            sorted(other for other in known if fnmatchcase(other, name))
        )
    ]


def list_devices() -> dict[str, str]:
    """All devices and whole fleets that have a name, with one line about each."""
    lines = {}
    for name, profile in shipped_profiles().items():
        lines[name] = profile.about
        if profile.peak < math.inf:
            lines[name] += (
                f": {_giga(profile.speed)}FLOP/s, room for {_giga(profile.room)}B, {_watts(profile.busy)}"
            )
    return lines | {
        name: "a whole fleet: "
        + ", ".join(f"{count} {device}" for device, count in devices.items())
        for name, devices in FLEETS.items()
    }


def describe_devices(name: str) -> dict[str, list[tuple[str, str, str]]]:
    """Each number of a device, of those of a whole fleet, or of all that a pattern (``jetson-*``)
    fits.

    Returns
    -------
    dict of str to list of (str, str, str)
        By the device's name and what it is: what the number is called, its value, and where
        that is from.

    Raises
    ------
    ConfigError
        If there is no such device.
    """
    known = shipped_profiles()
    found = [
        other
        for other in known
        if other in FLEETS.get(name, ()) or fnmatchcase(other, name)
    ]
    if not found:
        raise ConfigError(
            f"no device {name!r}{closest(name, [*known, *FLEETS])}; fedknow list devices shows all"
        )
    return {
        f"{device}: {known[device].about}": _numbers(known[device]) for device in found
    }


def _numbers(profile: Profile) -> list[tuple[str, str, str]]:
    source = {name: profile.source.get(name, "by default") for name in NUMBERS}
    return [
        ("peak", f"{_giga(profile.peak)}FLOP/s", source["peak"]),
        ("efficiency", f"{profile.efficiency:g}", source["efficiency"]),
        ("speed", f"{_giga(profile.speed)}FLOP/s", "peak times efficiency"),
        ("memory", f"{_giga(profile.memory)}B", source["memory"]),
        ("reserved", f"{_giga(profile.reserved)}B", source["reserved"]),
        ("room", f"{_giga(profile.room)}B", "memory less reserved"),
        ("busy", _watts(profile.busy), source["busy"]),
        ("idle", _watts(profile.idle), source["idle"]),
    ]


def _giga(value: float) -> str:
    return f"{value / 1e9:,.4g} G"


def _watts(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g} W"


def read_profiles(path: Path) -> dict[str, Profile]:
    """The devices in a TOML file laid out like the shipped one.

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
        raise ConfigError(f"fleet.profiles: {path}: not valid TOML: {error}") from None
    found = {}
    for name, fields in tree.items():
        try:
            base = tree[fields["like"]] if "like" in fields else {}
            profile = Profile.model_validate(
                {k: v for k, v in (base | fields).items() if k != "like"}
            )
        except KeyError as error:
            raise ConfigError(
                f"fleet.profiles: {path}: {name}: like = {error}: no such device in the file"
            ) from None
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in error.errors()
            )
            raise ConfigError(f"fleet.profiles: {path}: {name}: {faults}") from None
        except TypeError:
            raise ConfigError(
                f"fleet.profiles: {path}: {name} = {fields!r}: must be a section, [{name}]"
            ) from None
        # A number without a source cannot be checked by a reader of the results.
        unsaid = [
            number
            for number in NUMBERS
            if number in fields and number not in profile.source
        ]
        if unsaid:
            raise ConfigError(
                f"fleet.profiles: {path}: {name}.source lacks {', '.join(unsaid)}: say where each number is from, "
                "or 'assumed: ...' and why"
            )
        found[name] = profile
    return found
