"""The section ``privacy``."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedknow.protocols.config.base import Section

__all__ = ["PrivacyConfig"]


class PrivacyConfig(Section):
    """What a server may learn of a single client."""

    secure: bool = False
    """Secure aggregation: clients mask their updates so that the server learns the sum alone. For
    strategies that need nothing but the mean, and three clients in a round or more."""
    threshold: float = Field(0.66, gt=0.5, le=1)
    """Share of a round's clients that must stay until the sum is opened. As many of them together
    could open a single update."""

    @model_validator(mode="after")
    def _fit(self) -> PrivacyConfig:
        default = PrivacyConfig.model_fields["threshold"].default
        if not self.secure and self.threshold != default:
            raise ValueError(
                f"privacy.threshold = {self.threshold:g} does nothing without "
                "privacy.secure = true; set it, or leave privacy.threshold alone"
            )
        return self
