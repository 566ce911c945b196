"""The engine of simulations: virtual clients in batches on Ray's workers."""

import logging
import warnings


def _import_ray() -> None:
    """Import Ray without its advice to notebooks.

    In a notebook it misses ``ipywidgets`` twice: for bars of progress, and to show objects of
    its own. Neither is used here.
    """
    log = logging.getLogger("ray.widgets.util")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="IProgress not found")
            import ray  # noqa: F401  # the modules of this folder have it from here
    finally:
        # A user's own bars and objects of Ray are advised as before.
        log.setLevel(level)


_import_ray()
