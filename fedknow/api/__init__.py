"""What Python programs and notebooks use; :mod:`fedknow` gives it under its own name."""
