"""What runs at the edge loads nothing that an edge box does not have."""

import subprocess
import sys

import pytest

HEAVY = ("flwr", "ray", "matplotlib", "sklearn")


@pytest.mark.parametrize(
    "module",
    [
        "fedknow.client.node",
        "fedknow.client.learners",
        "fedknow.client.edge.client",
    ],
)
def test_the_edge_is_light(module):
    code = (
        f"import sys, {module}; print(*sorted(set({HEAVY}) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.split() == []
