"""Checks of clients' answers, and of strategies' instructions and results."""
