"""Settings of learners: what they read from the section ``learner``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["ANY_HEAD", "ContinualSettings", "Exchange", "LearnerSettings"]

Exchange = Literal["all", "body", "none"]
ANY_HEAD = frozenset({"linear", "cosine"})
"""Heads of methods that take a head for a function from features to logits."""


class LearnerSettings(BaseModel):
    """A learner's own settings.

    Unknown keys are refused, and so is what is infinite or NaN. A number that may be infinite
    says so: ``Field(allow_inf_nan=True)``.

    Examples
    --------
    >>> import fedknow
    >>> class Settings(fedknow.LearnerSettings):
    ...     rho: float = 0.1
    >>> Settings(rho=0.2).rho
    0.2
    """

    # The docstrings of settings are what `fedknow list learners NAME` says of them.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ContinualSettings(LearnerSettings):
    """Settings of a method made for one machine, federated by averaging."""

    exchange: Exchange = "body"
    """What is averaged over clients. ``body`` gives each client a head of its own, as FedKNOW and
    FedRep have, so that methods are compared on equal terms; ``all`` is plain FedAvg around the
    method, ``none`` the method on its own."""
