"""What the SuperLink runs."""

from fedknow.server.flower_app import app

__all__ = ["app"]
