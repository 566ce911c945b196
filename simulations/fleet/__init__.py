"""Imagined devices and networks: what a run would take on them, in virtual time."""
