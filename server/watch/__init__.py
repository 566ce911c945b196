"""The live page: a run's record as it grows, in a browser on this machine."""
