"""Fleets: virtual devices, links and presence, and their virtual time."""
