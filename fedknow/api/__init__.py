"""The interface for Python programs; :mod:`fedknow` re-exports it."""
