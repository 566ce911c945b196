"""Simulations: the Ray grid and its workers, presets and comparisons."""
