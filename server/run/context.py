"""What the halves of an experiment's loop share."""

from __future__ import annotations

from dataclasses import dataclass

from fedknow.server.grids.base import MessageGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.incidents import Incidents
from fedknow.server.run.parts import Parts
from fedknow.server.run.recorder import Recorder
from fedknow.server.run.state import RunState
from fedknow.server.run.strategy_calls import StrategyCalls

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """The parts of a run, its clients, where it writes, and its state.

    Attributes
    ----------
    parts : Parts
    grid : MessageGrid
        How clients are reached.
    options : WaveOptions
        What the experiment wants of each wave of work.
    strategy_grid : StrategyGrid
        The same clients, as the strategy sees them.
    folder : RunFolder
    recorder : Recorder
        Takes the events.
    state : RunState
        How far the run is.
    incidents : Incidents
        Where clients' failures are dealt with.
    calls : StrategyCalls
        Guards what the strategy does.
    """

    parts: Parts
    grid: MessageGrid
    options: WaveOptions
    strategy_grid: StrategyGrid
    folder: RunFolder
    recorder: Recorder
    state: RunState
    incidents: Incidents
    calls: StrategyCalls
