"""TensorBoard: event files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedknow.server.tracking.tracker import Status, TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes event files of TensorBoard to ``tensorboard/`` of the run folder."""

    _writer: SummaryWriter

    def start(self, run: TrackedRun) -> None:
        """Open an event file and write the configuration into it."""
        # Imported late: it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier file has of these steps is void: a resumed run repeats its last rounds.
        self._writer = SummaryWriter(
            str(run.folder / "tensorboard"), purge_step=run.step + 1
        )
        text = run.config.to_toml()
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self._writer.add_text("config", indented, run.step)

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Write scalars, each with its step and time."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time)
        # Someone may look while the run goes on.
        self._writer.flush()

    def finish(self, status: Status) -> None:
        """Write how the run ended, and close the file."""
        self._writer.add_text("status", status)
        self._writer.close()
