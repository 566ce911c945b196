"""Aggregation strategies: any of Flower's, a user's own, or ours, found by name."""
