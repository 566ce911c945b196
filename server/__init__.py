"""The server's side: runs, grids, checks, reports and trackers."""
