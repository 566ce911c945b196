"""Flower looks for an app's two objects in the app's own package."""
