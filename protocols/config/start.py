"""The section ``start``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from fedknow.protocols.config.base import Section

__all__ = ["StartConfig"]


def _split(value: Any) -> Any:
    """Let text with commas stand for a list."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


class StartConfig(Section):
    """Where the global model's first parameters come from.

    Without it they are drawn from the seed. Bare text stands for the weights: ``start =
    "mine.safetensors"``. The server alone reads them, and clients are not told where they lie.
    """

    weights: str = ""
    """A file of weights (safetensors, or a state dict that ``torch.save`` wrote), or the folder of
    a former run, whose global model is taken. They must fit what the learner exchanges, by names
    and shapes."""
    without: Annotated[list[str], BeforeValidator(_split)] = Field(
        default=[], max_length=1000
    )
    """Parameters, or modules such as ``head``, that are not taken from there and are drawn from the
    seed."""
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    """Checksum of the weights. A run enters it, so that it is not resumed from other ones. A given
    one must be theirs."""

    @model_validator(mode="after")
    def _fit(self) -> StartConfig:
        if not self.weights and (self.without or self.sha256):
            key = "without" if self.without else "sha256"
            raise ValueError(
                f"start.{key} does nothing without weights; set start.weights, or leave "
                f"start.{key} out"
            )
        return self
