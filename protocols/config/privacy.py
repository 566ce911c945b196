"""The section ``privacy``."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedknow.protocols.config.base import Section

__all__ = ["PrivacyConfig"]

_LEAST_NOISE = 0.01


class PrivacyConfig(Section):
    """What a server may learn of a single client."""

    secure: bool = False
    """Secure aggregation: clients mask their updates so that the server learns the sum alone. For
    strategies that need nothing but the mean, and three clients in a round or more."""
    threshold: float = Field(0.66, gt=0.5, le=1)
    """Share of a round's clients that must stay until the sum is opened. As many of them together
    could open a single update."""

    clip: float = Field(0.0, ge=0, le=1e6)
    """Differential privacy on clients: largest Euclidean norm of an update, all arrays together.
    Longer ones are scaled down before they are sent. 0: no bound."""
    noise: float = Field(0.0, ge=0, le=1e6)
    """Noise multiplier: each client adds Gaussian noise to its update, whose standard deviation is
    this times ``privacy.clip``. 0: none."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Probability for which the record of each round says epsilon, where there is noise."""

    @model_validator(mode="after")
    def _fit_noise(self) -> PrivacyConfig:
        if self.noise and not self.clip:
            raise ValueError(
                f"privacy.noise = {self.noise:g} needs a bound to be measured by; set "
                "privacy.clip, for example to 1"
            )
        if 0 < self.noise < _LEAST_NOISE:
            raise ValueError(
                f"privacy.noise = {self.noise:g} protects nobody; set it to "
                f"{_LEAST_NOISE:g} or more, or to 0 for clipping alone"
            )
        if self.delta != PrivacyConfig.model_fields["delta"].default and (
            not self.noise
        ):
            raise ValueError(
                f"privacy.delta = {self.delta:g} does nothing without privacy.noise; set it, "
                "or leave privacy.delta alone"
            )
        return self

    @model_validator(mode="after")
    def _fit(self) -> PrivacyConfig:
        default = PrivacyConfig.model_fields["threshold"].default
        if not self.secure and self.threshold != default:
            raise ValueError(
                f"privacy.threshold = {self.threshold:g} does nothing without "
                "privacy.secure = true; set it, or leave privacy.threshold alone"
            )
        return self
