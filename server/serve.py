"""One experiment with real clients, from its configuration to its report."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from fedknow.client.learners import Learner
from fedknow.protocols.config import ConfigError, ExperimentConfig, differences
from fedknow.protocols.secure.fixed import sum_size
from fedknow.protocols.security import Tokens, server_credentials
from fedknow.protocols.security.signing import read_signature
from fedknow.protocols.transport import check_address
from fedknow.protocols.wire import Limits
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.activity import Listener
from fedknow.server.grids.grpc_grid import GrpcGrid
from fedknow.server.grids.grpc_membership import Issuer, Membership
from fedknow.server.renewal import Renewer
from fedknow.server.reports.page import write_report
from fedknow.server.run.activity import ActivityLog
from fedknow.server.run.audit import AuditLog
from fedknow.server.run.error_log import error_log
from fedknow.server.run.experiment import Experiment, RunResult
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.members import MEMBERS, read_ejections
from fedknow.server.run.recorder import Subscriber
from fedknow.server.run.run_reader import FENCE_KEY
from fedknow.server.tracking import tracking

__all__ = ["serve"]

log = logging.getLogger(__name__)


def serve(  # noqa: PLR0913  # the options of a command
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
    metrics_listen: str = "",
    renew: Path | None = None,
    signature: Path | None = None,
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
    metrics_listen : str
        ``HOST:PORT`` of a page for Prometheus, with the server's own credentials; none by
        default.
    renew : Path, optional
        The folder of the run's certificate authority, to renew clients' certificates with.
    signature : Path, optional
        The experiment's, by the clients' owner (:mod:`fedknow.protocols.security.signing`).

    Raises
    ------
    ConfigError
        If the configuration cannot be run, the address cannot be had, or ``out`` holds another run.
    RunError
        If the run fails; what it earned until then is kept and can be resumed.
    """
    check_address(listen, tls, insecure)
    # Certificates before data: a wrong folder shows at once, and data may take minutes.
    entrance = _entrance(listen, tls, tokens, renew)
    if metrics_listen:
        check_address(metrics_listen, tls, insecure)
    parts = assemble(config, Clients.REAL)
    entrance = entrance.signed(signature, parts.config)
    is_resumed = resume and (out / "config.toml").is_file()
    if is_resumed:
        earlier = RunFolder.open(out)
        # Absolute, as a run may go on from another working folder.
        changes = differences(earlier.config.absolute(), parts.config)
        if earlier.complete and not changes:
            _dismiss(parts.config, earlier, entrance, ready)
            return None
    opened = RunFolder.resume if is_resumed else RunFolder.create
    with opened(out, parts.config) as folder:
        limits = _limits(parts.learner)
        listener = ActivityLog(folder.path)
        with (
            error_log(folder.path),
            entrance.grid(parts.config, folder, limits, listener) as grid,
            tracking(parts.config, config.tracking, out, is_resumed) as trackers,
        ):
            ready(grid.port)
            with _metrics(metrics_listen, grid, tls, entrance.tokens) as extra:
                subscribers = [*trackers, *observers, *extra]
                result = Experiment(parts, grid, folder, subscribers).run()
            # A client whose work was all done before the server came back may not have come
            # to this process yet.
            grid.finish(everyone=is_resumed)
        # After the clients are let go, as they need not wait for it.
        write_report([folder], folder.path)
    return result


@dataclass(frozen=True)
class _Entrance:
    """Where clients connect, and how they show who they are."""

    listen: str
    tls: Path | None
    credentials: grpc.ServerCredentials | None
    tokens: Tokens | None
    issuer: Issuer | None = None
    signature: bytes = b""

    def signed(
        self, signature: Path | None, config: ExperimentConfig
    ) -> _Entrance:
        """Have clients told of an experiment's signature, where there is one."""
        if signature is None:
            return self
        return replace(self, signature=read_signature(signature, config))

    def grid(
        self,
        config: ExperimentConfig,
        folder: RunFolder,
        limits: Limits | None = None,
        listener: Listener | None = None,
    ) -> GrpcGrid:
        """Open the entrance for a run."""
        return GrpcGrid(
            config,
            self.listen,
            folder.run_id,
            credentials=self.credentials,
            membership=self._membership(folder),
            signature=self.signature,
            limits=limits,
            listener=listener,
        )

    def _membership(self, folder: RunFolder) -> Membership:
        """Read who may take part in a run, now and when that changes."""
        path = folder.path
        return Membership(
            tls=self.tls,
            tokens=self.tokens,
            ejections=lambda: {
                client: ejection.reason
                for client, ejection in read_ejections(path).items()
            },
            members=path / MEMBERS,
            audit=AuditLog(path),
            fence_key=_fence_key(path),
            issuer=self.issuer,
        )


def _fence_key(folder: Path) -> bytes:
    """Read the secret that fences of a run are made with; make it at first."""
    path = folder / FENCE_KEY
    try:
        # Never anew: with another key no client could prove that it was here before.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        # Readable by its owner alone from the start.
        with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
    except FileExistsError:
        # A kill in between leaves an empty file, which is a secret to nobody.
        if not path.stat().st_size:
            path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()


def _entrance(
    listen: str,
    tls: Path | None,
    has_tokens: bool,
    renew: Path | None,
) -> _Entrance:
    """Read what the server needs to know clients by."""
    if tls is None and has_tokens:
        raise ConfigError(
            "--tokens needs --tls: a token in the clear is anybody's"
        )
    if renew is not None and (tls is None or has_tokens):
        raise ConfigError(
            f"--renew {renew}: only clients that show certificates have some to renew; "
            "give --tls DIR and leave --tokens out"
        )
    if tls is None:
        return _Entrance(listen, None, None, None)
    if renew is not None and not os.access(tls, os.W_OK):
        raise ConfigError(
            f"--renew {renew}: the list of certificates in {tls} must be written, and "
            "cannot be; make the folder writable"
        )
    credentials = server_credentials(tls, client_certificates=not has_tokens)
    loaded = Tokens.load(tls) if has_tokens else None
    issuer = None if renew is None else Renewer(renew)
    return _Entrance(listen, tls, credentials, loaded, issuer)


@contextmanager
def _metrics(
    listen: str,
    grid: GrpcGrid,
    tls: Path | None,
    tokens: Tokens | None,
) -> Iterator[list[Subscriber]]:
    """Serve metrics to Prometheus, where wanted; give its subscribers."""
    if not listen:
        yield []
        return
    # Imported late: an extra brings the library.
    from fedknow.server.watch.exposition import Exposition
    from fedknow.server.watch.scrape import MetricsServer

    exposition = Exposition(grid.status)
    with MetricsServer(listen, exposition.text, tls, tokens) as server:
        log.info("metrics are at port %d, /metrics", server.port)
        yield [exposition]


def _dismiss(
    config: ExperimentConfig,
    folder: RunFolder,
    entrance: _Entrance,
    ready: Callable[[int], None],
) -> None:
    """Tell clients that their run is finished, and write its report again."""
    with entrance.grid(config, folder) as grid:
        ready(grid.port)
        log.info("the run in %s is finished", folder.path)
        grid.finish(everyone=True)
    write_report([folder], folder.path)


def _limits(learner: Learner) -> Limits:
    """Limit answers to a few times a model's size."""
    tensors = [*learner.send().values(), *learner.local_parameters().values()]
    model = sum(tensor.nbytes for tensor in tensors)
    # Under masks a number has 64 bits.
    sums = 8 * sum_size(learner.sum_layout())
    # An answer may hold what a client keeps and a method's extras beside the model.
    size = max(64 * 2**20, 4 * (model + sums))
    return Limits(message_bytes=size, decoded_bytes=size)
