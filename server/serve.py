"""One experiment with real clients, from its configuration to its report."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from fedknow.protocols.config import ConfigError, ExperimentConfig, differences
from fedknow.protocols.security import Tokens, server_credentials
from fedknow.protocols.transport import check_address
from fedknow.protocols.wire import Limits
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.grpc_grid import GrpcGrid
from fedknow.server.reports.page import write_report
from fedknow.server.run.experiment import Experiment, RunResult
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber

__all__ = ["serve"]

log = logging.getLogger(__name__)


def serve(
    config: ExperimentConfig,
    out: Path,
    listen: str,
    *,
    tls: Path | None = None,
    tokens: bool = False,
    insecure: bool = False,
    resume: bool = False,
    observers: Sequence[Subscriber] = (),
    ready: Callable[[int], None] = lambda port: None,
) -> RunResult | None:
    """Run an experiment with the clients that connect.

    Everything it yields, report included, is written to ``out``.

    A run in ``out`` that is finished already is not run again: the clients that come within
    half a minute are told so.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; its learner's settings may be left to their defaults.
    out : Path
        The run folder.
    listen : str
        ``HOST:PORT``; port 0 is one of the system's choice.
    tls : Path, optional
        The server's certificates (:func:`~fedknow.protocols.security.server_credentials`).
    tokens : bool
        Let clients in by their tokens, over TLS, instead of by certificates.
    insecure : bool
        Listen in the clear although others than this machine can connect.
    resume : bool
        Go on with the run in ``out`` after its last complete round; if there is none yet, begin.
    observers : sequence of callable
        Called with each event of the experiment (:mod:`fedknow.server.run.events`).
    ready : callable
        Called with the port when clients can connect.

    Raises
    ------
    ConfigError
        If the configuration cannot be run, the address cannot be had, or ``out`` holds another run.
    RunError
        If the run fails; what it earned until then is kept and can be resumed.
    """
    check_address(listen, tls, insecure)
    if tls is None and tokens:
        raise ConfigError("--tokens needs --tls: a token in the clear is anybody's")
    credentials = (
        None if tls is None else server_credentials(tls, client_certificates=not tokens)
    )
    bearers = Tokens.load(tls) if tls is not None and tokens else None
    parts = assemble(config, Clients.REAL)
    config = parts.config
    again = resume and (out / "config.toml").is_file()
    if (
        again
        and (done := RunFolder.open(out)).complete
        and not differences(done.config.absolute(), config)
    ):
        with GrpcGrid(
            config, listen, done.run_id, credentials=credentials, tokens=bearers
        ) as grid:
            ready(grid.port)
            log.info("the run in %s is finished", out)
            grid.finish(everyone=True)
        write_report([done], done.path)
        return None
    with (
        RunFolder.resume(out, config)
        if again
        else RunFolder.create(out, config) as folder
    ):
        try:
            limits = _limits(
                sum(
                    tensor.nbytes
                    for part in (parts.learner.send(), parts.learner.kept())
                    for tensor in part.values()
                )
            )
            grid = GrpcGrid(
                config,
                listen,
                folder.run_id,
                credentials=credentials,
                tokens=bearers,
                limits=limits,
            )
            with grid:
                ready(grid.port)
                result = Experiment(parts, grid, folder, observers).run()
                # A client whose work was all done before the server came back may not have come
                # to this process yet.
                grid.finish(everyone=again)
        except Exception:
            with suppress(
                OSError
            ):  # a disk too full for the run is too full for its log
                (folder.path / "error.log").write_text(traceback.format_exc(), "utf-8")
            raise
        write_report([folder], folder.path)
    return result


def _limits(model: int) -> Limits:
    """Limit answers to a few times a model's size, given in bytes."""
    size = max(64 * 2**20, 4 * model)
    return Limits(message_bytes=size, decoded_bytes=size)
