"""The server's side: the experiment loop, grids, checks, metrics, checkpoints and reports."""
