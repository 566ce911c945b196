import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "flwr", "ray", "grpc", "matplotlib", "scipy")


@pytest.mark.parametrize(
    "module", ["fedknow.__main__", "fedknow.cli", "fedknow.cli.app"]
)
def test_the_command_line_starts_without_what_takes_seconds(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == []
