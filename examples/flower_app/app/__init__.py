"""fedknow as a Flower app: Flower wants its two objects in the app's own package."""
