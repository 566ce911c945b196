"""One run: its loop, its tasks, its scores and its folder."""
