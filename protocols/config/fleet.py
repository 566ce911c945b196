"""The section ``fleet``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedknow.protocols.config.base import MOST_CLIENTS, MOST_SECONDS, Section

__all__ = ["FleetConfig"]


class FleetConfig(Section):
    """Simulations: the devices and networks of clients, in virtual time.

    Without ``devices`` there is no fleet: clients are equally fast and always there. A bare
    string or list stands for the devices: ``fleet = "testbed-a"``.
    """

    devices: (
        dict[str, Annotated[int, Field(ge=1, le=MOST_CLIENTS)]] | list[str] | str
    ) = Field(default={})
    """How many clients have which device (``fedknow list devices``), in the order of clients,
    adding up to ``data.clients``: ``{jetson-nano = 8, ...}``; or a list, repeated as often as
    need be (``ai-*``: all devices named so, in an order drawn at random); or the name of a
    whole fleet, such as ``testbed-a``."""
    profiles: str = ""
    """File with devices of your own: TOML as ``fedknow calibrate`` writes it, or a CSV list
    of phones.
    """
    down: float = Field(0.0, ge=0)
    up: float = Field(0.0, ge=0)
    """Bytes a second to and from a client; 0: no limit."""
    latency: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Seconds that any message is under way besides."""
    jitter: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Mean of a further, exponentially distributed delay of each message, seconds."""
    shared: bool = False
    """``down`` and ``up`` are those of one link, shared equally by all that use it at a moment."""
    link_sigma: float = Field(0.0, ge=0, le=3)
    """Clients' links differ: each one's rate is ``exp(link_sigma * z)`` times what is given, ``z``
    standard normal."""
    compute_sigma: float = Field(0.0, ge=0, le=3)
    """Stragglers: each piece of computing takes ``exp(compute_sigma * z)`` times what it should."""
    availability: str = Field("always", min_length=1)
    """``always``; ``markov``: there and away in turn, for exponentially distributed times; or a
    CSV file with columns ``client,start,end`` (seconds), which is repeated after its last
    ``end``. Who is away is not chosen; who leaves goes on when back."""
    online: float = Field(3600.0, ge=0.1, le=MOST_SECONDS)
    offline: float = Field(3600.0, ge=0.1, le=MOST_SECONDS)
    """``markov``: mean seconds that a client is there, and away."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an answer is lost on its way."""
    deadline: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Virtual seconds after which the server goes on without those that have not answered; 0: it
    waits."""
    over_commit: float = Field(1.0, ge=1, le=1000)
    """The server asks so many times the clients it needs to train, and takes the first answers."""

    @model_validator(mode="after")
    def _fit(self) -> FleetConfig:
        if not self.devices:
            defaults = FleetConfig.model_fields
            for name in self.model_fields_set - {"devices"}:
                # A saved configuration spells out every default, which is no mistake.
                if getattr(self, name) != defaults[name].default:
                    raise ValueError(
                        f"fleet.{name} = {getattr(self, name)!r} does nothing without "
                        f"devices; set fleet.devices "
                        "(fedknow list devices), 'infinite' for devices that take no time"
                    )
        for name in ("down", "up"):
            # Probably meant in megabytes: at such a rate a message would take days.
            if 0 < (rate := getattr(self, name)) < 1:
                raise ValueError(
                    f"fleet.{name} = {rate:g}: must be at least 1 (byte a second), or 0 "
                    f"for no limit"
                )
        # Differences between links that nobody has would be ignored without a word.
        if self.shared and self.link_sigma:
            raise ValueError(
                f"fleet.link_sigma = {self.link_sigma:g}: with fleet.shared = true there "
                f"is one link, so set "
                "fleet.link_sigma = 0"
            )
        return self
