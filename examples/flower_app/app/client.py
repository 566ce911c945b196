"""What a SuperNode runs."""

from fedknow.client.flower_app import app

__all__ = ["app"]
