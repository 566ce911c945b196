"""Experiments shipped with fedknow, one TOML file each."""
