"""Numbers, tables, plots and pages about runs and comparisons."""
