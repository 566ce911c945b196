"""The section ``attack``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fedknow.protocols.config.base import Section

__all__ = ["AttackConfig"]


class AttackConfig(Section):
    """Simulations: hostile clients. Real clients refuse it.

    A bare string stands for the name: ``attack = "signflip"``.
    """

    name: Literal[
        "none", "signflip", "scaling", "labelflip", "backdoor", "little"
    ] = "none"
    """``signflip``: hostile clients send the opposite of their update, ``scaling``: a multiple of
    it. ``labelflip``: they train on labels in the opposite order. ``backdoor``: half of
    their samples get a white corner and the label of the task's first class, and they send a
    multiple of the update. ``little``: they agree on an update that is off the mean of
    their own by a little of their spread ("A Little Is Enough", Baruch et al. 2019)."""
    clients: float = Field(0.2, gt=0, lt=1)
    """Share of the clients that are hostile, at least one. The seed chooses them."""
    scale: float = Field(0.0, ge=0, le=1e6)
    """Factor of the update; with ``little`` the number of standard deviations. 0: the usual one,
    which is 4 for ``signflip``, 10 for ``scaling``, 5 for ``backdoor`` and the paper's for
    ``little``."""

    @model_validator(mode="after")
    def _fit(self) -> AttackConfig:
        if self.name == "labelflip" and self.scale:
            raise ValueError(
                f"attack.scale = {self.scale:g} does nothing with attack.name = 'labelflip'; "
                "leave attack.scale at 0"
            )
        if self.name == "none":
            defaults = AttackConfig.model_fields
            for key in ("clients", "scale"):
                if (value := getattr(self, key)) != defaults[key].default:
                    raise ValueError(
                        f"attack.{key} = {value:g} does nothing without an attack; set "
                        "attack.name, for example attack = 'signflip'"
                    )
        return self

    def __bool__(self) -> bool:
        """Say whether anybody attacks."""
        return self.name != "none"
