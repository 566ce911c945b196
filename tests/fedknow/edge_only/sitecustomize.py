"""Put this folder on PYTHONPATH, and Python finds what an edge installation has, and no more."""

import os
import sys

BLOCKED = {
    "PIL",
    "cryptography",
    "datasets",
    "flwr",
    "flwr_datasets",
    "grpc_health",
    "huggingface_hub",
    "matplotlib",
    "psutil",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
}


class EdgeOnly:
    """A finder that does not find what the extras bring, as where they are not installed.

    The variable ``SIGNAL`` is the number of a signal that comes when the module ``SIGNAL_AT`` is
    looked for.
    """

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("SIGNAL_AT"):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        # None rather than an error: libraries ask find_spec whether they may use another one.
        if name.partition(".")[0] in BLOCKED:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(EdgeOnly, sys.meta_path)
