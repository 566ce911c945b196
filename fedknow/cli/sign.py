"""The command that signs an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.options import EXPERIMENT, SET, read_experiment
from fedknow.cli.output import out

__all__ = ["sign"]

KEY = typer.Option("--key", metavar="FILE", help="The owner's private key.")
MAKE_KEY = typer.Option(
    "--make-key",
    help="Make the key first, and `FILE.pub` beside it for `fedknow client --signed-by`.",
)
FILE = typer.Option(
    "--out", metavar="FILE", help="Where the signature goes.", show_default=False
)


def sign(
    experiment: Annotated[str, EXPERIMENT],
    key: Annotated[Path, KEY],
    make_key: Annotated[bool, MAKE_KEY] = False,
    changes: Annotated[list[str] | None, SET] = None,
    file: Annotated[Path | None, FILE] = None,
) -> None:
    """Sign an experiment, for clients that run nothing else.

    The key belongs to the clients' owner, not to the server. `fedknow server` sends the signature
    (`--signature`), and a client with `--signed-by` runs the experiment only if it fits.

    For example:

    - `fedknow sign field.toml --key owner.key --make-key --out field.signature`

    - `fedknow client --server fl.example.org:8700 --signed-by owner.key.pub`
    """
    with explained(None, extra="signing"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.client.learners import keep_at_home, resolve
        from fedknow.protocols.files import write_atomic
        from fedknow.protocols.security import signing

        config = resolve(read_experiment(experiment, changes, None))
        # As the server will tell it to real clients.
        config = keep_at_home(config)
        if make_key:
            signing.make_key(key)
        target = file or Path(f"{config.name}.signature")
        write_atomic(target, signing.sign(config, key))
        out.print(escape(str(target)), highlight=False, soft_wrap=True)
