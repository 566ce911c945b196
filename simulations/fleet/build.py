"""The fleet of an experiment: devices, links and presence of clients."""

from __future__ import annotations

from dataclasses import dataclass

from fedknow.protocols.config import ExperimentConfig
from fedknow.simulations.fleet.availability import Presence, make_presence
from fedknow.simulations.fleet.devices import Profile, assign, load_profiles
from fedknow.simulations.fleet.links import Links, make_links

__all__ = ["Fleet", "build_fleet"]


@dataclass(frozen=True)
class Fleet:
    """Devices, links and presence of virtual clients.

    Attributes
    ----------
    names : list of str
        Names of the clients' devices.
    profiles : list of Profile
        The devices themselves.
    links : Links
    presence : Presence
    """

    names: list[str]
    profiles: list[Profile]
    links: Links
    presence: Presence


def build_fleet(config: ExperimentConfig) -> Fleet:
    """Build a fleet; it is the same for the same configuration and seed.

    Raises
    ------
    ConfigError
        If a device is unknown, their number is not that of the clients, or a file cannot be
        read.
    """
    clients = config.data.clients
    names = assign(config.fleet, clients, config.seed)
    profiles = load_profiles(config.fleet.profiles)
    return Fleet(
        names,
        [profiles[name] for name in names],
        make_links(config.fleet, clients, config.seed),
        make_presence(config.fleet, config.seed),
    )
