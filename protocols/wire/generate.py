"""Generate ``fedknow_pb2`` from ``fedknow.proto``.

Usage: ``python protocols/wire/generate.py``.

The generated files are committed: whoever installs the package needs no compiler. They work
with the protobuf of the compiler (grpcio-tools, pinned in the ``dev`` extra) and every later
one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

__all__ = ["FILES", "HERE", "compiled", "main"]

HERE = Path(__file__).resolve().parent
FILES = ("fedknow_pb2.py", "fedknow_pb2.pyi")


def compiled() -> dict[str, str]:
    """Return the text of each generated file, from ``fedknow.proto``.

    Raises
    ------
    ValueError
        If the compiler refuses the file; it has said why on standard error.
    """
    from grpc_tools import protoc  # only developers have it

    # Where the file lies when installed: the generated module knows its own name.
    package = "fedknow/protocols/wire"
    with tempfile.TemporaryDirectory() as out:
        options = [
            f"-I{package}={HERE}",
            f"--python_out={out}",
            f"--pyi_out={out}",
        ]
        # The first argument stands for the program's name, which the compiler skips.
        if protoc.main(["protoc", *options, f"{package}/fedknow.proto"]) != 0:
            raise ValueError(
                f"the compiler refuses {HERE / 'fedknow.proto'}; it says why above"
            )
        return {name: (Path(out) / package / name).read_text() for name in FILES}


def main() -> None:
    """Write the generated files."""
    for name, text in compiled().items():
        (HERE / name).write_text(text)


if __name__ == "__main__":
    main()
