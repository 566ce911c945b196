"""The experiments of the FedKNOW paper.

Each runs a comparison and ends in a page beside the paper's values.

``paper.toml`` holds the experiments and the paper's values. ``scale`` shrinks the training by
about that factor. The page says which number was shrunk by how much, and which share remains.
"""

from fedknow.simulations.paper.protocol import (
    Variant,
    experiments,
    mixed,
    variants,
)
from fedknow.simulations.paper.run import Outcome, PaperRequest, run_paper

__all__ = [
    "Outcome",
    "PaperRequest",
    "Variant",
    "experiments",
    "mixed",
    "run_paper",
    "variants",
]
