"""Experiments with sums under masks, against the same in the clear."""

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.host import Host
from fedknow.client.secure import STATE
from fedknow.client.secure_sums import UNSENT
from fedknow.client.state import StateStore
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import (
    ARRAYS,
    END_TASK,
    EXTRA,
    METRICS,
    TRAIN,
    client_of,
)
from fedknow.protocols.secure.rounds import (
    KEYS,
    MASKED,
    SHARES,
    UNMASK,
)
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.run.experiment import Experiment, RunError
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

SMALL = {
    "data": {
        "clients": 7,
        "tasks": 2,
        "scenario": "class-incremental",
        "partition": "dirichlet",
        "test_samples": 0.5,
    },
    "model": {"name": "mlp", "hidden": 12, "train": "head"},
    "train": {"rounds": 2},
    "learner": "afcl",
    "engine": {"backend": "inline"},
}
SECURE = "privacy.secure=true"


def configured(*overrides):
    return read_config(SMALL, overrides)


class Lossy(InlineGrid):
    """A grid on which some messages get no answer, once each, and all are noted."""

    def __init__(self, clients, host, lost):
        super().__init__(clients, host)
        self.lost = list(lost)
        self.seen = []

    def deliver(self, work, timeout, options):
        """Leave the lost ones out."""
        present = []
        for message in work:
            key = (message.kind, client_of(message.node))
            if key in self.lost:
                self.lost.remove(key)
            else:
                present.append(message)
        self.seen += work
        for reply, version in super().deliver(present, timeout, options):
            self.seen.append(reply)
            yield reply, version


def grid_of(tmp_path, config, lost=()):
    parts = assemble(config, Clients.VIRTUAL)
    store = StateStore(tmp_path / "states", 2**20, durable=False)
    host = Host(parts.config, make_benchmark(config), store)
    return parts, Lossy(config.data.clients, host, lost)


def run(tmp_path, config, lost=()):
    parts, grid = grid_of(tmp_path, config, lost)
    with RunFolder.create(tmp_path / "run", parts.config) as folder:
        return Experiment(parts, grid, folder).run(), grid


def resume(tmp_path, config, lost=()):
    parts, grid = grid_of(tmp_path, config, lost)
    with RunFolder.open(tmp_path / "run") as folder:
        return Experiment(parts, grid, folder).run(), grid


def head(result):
    return result.arrays["head.weight"]


@pytest.fixture(scope="module")
def in_the_clear(tmp_path_factory):
    result, _ = run(tmp_path_factory.mktemp("clear"), configured())
    return head(result)


def same(secure, plain):
    """Up to the rounding of sums, and of the head to float32."""
    np.testing.assert_allclose(
        head(secure), plain, rtol=0, atol=1e-6 * np.abs(plain).max()
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_solution_is_that_in_the_clear(tmp_path, in_the_clear, fraction):
    """Also of clients that no round chose, which share when the task is over."""
    config = configured(SECURE, f"strategy.fraction={fraction}")
    secure, grid = run(tmp_path, config)
    same(secure, in_the_clear)
    work = [each for each in grid.seen if each.kind in (TRAIN, END_TASK)]
    answers = [each for each in work if each.reply_to]
    assert len(answers) == (42 if fraction == 1 else 2 * (2 * 3 + 7))
    assert not any(EXTRA in message.content for message in grid.seen)
    for answer in answers:
        assert answer.content.keys() == {ARRAYS, METRICS}
        assert answer.arrays().keys() == {MASKED}
    # Sums go when a task ends alone, all clients' at once.
    sizes = {each.kind: each.arrays()[MASKED].size for each in answers}
    assert sizes == {TRAIN: 12 * 10 + 10, END_TASK: 12 * 13 // 2 + 12 * 10}
    for client, version in grid.versions.items():
        state = grid.host.store.load(client, version)
        assert not {STATE, UNSENT} & state.keys()


# A third of the clients drop out at each wave of the first round, at a task's end, or throughout.
DROPOUTS = {
    "keys": [(KEYS, 1), (KEYS, 5)],
    "shares": [(SHARES, 0), (SHARES, 4)],
    "updates": [(TRAIN, 2), (TRAIN, 6)] * 3,
    "opening": [(UNMASK, 0), (UNMASK, 3)] * 6,
    "everywhere": [(KEYS, 0), (TRAIN, 1), (UNMASK, 2)] * 2,
    # It shares when the next task ends, among all others' sums of that one.
    "end": [(END_TASK, 3), (END_TASK, 5)],
}


@pytest.mark.parametrize("phase", DROPOUTS)
def test_who_drops_out_shares_later(tmp_path, in_the_clear, phase):
    secure, _ = run(tmp_path, configured(SECURE), DROPOUTS[phase])
    same(secure, in_the_clear)


def test_who_is_lost_at_the_end_is_missing(tmp_path):
    """As in the clear, where it is not heard in a round of the task either."""
    lost = [(TRAIN, 2), (TRAIN, 2), (END_TASK, 2)]
    overrides = ["data.tasks=1", "data.classes_max=10"]
    secure, _ = run(tmp_path / "a", configured(SECURE, *overrides), lost)
    plain, _ = run(tmp_path / "b", configured(*overrides), lost)
    same(secure, head(plain))


@pytest.mark.parametrize("wave", [TRAIN, UNMASK])
def test_too_few_end_the_run_and_a_resumed_one_has_all(
    tmp_path, in_the_clear, wave
):
    """In the second task, so that a checkpoint is there."""
    times = 7 if wave == UNMASK else 3
    config = configured(SECURE)
    lost = [(wave, client) for client in range(3) for _ in range(times)]
    # The first ones are lost in the first task, one client at a time.
    parts, grid = grid_of(tmp_path, config)
    waves = []

    def deliver(work, timeout, options):
        if work and work[0].kind == wave:
            waves.append(wave)
            if len(waves) == (4 if wave == UNMASK else 3):
                grid.lost = list(lost)
        yield from Lossy.deliver(grid, work, timeout, options)

    grid.deliver = deliver
    with (
        RunFolder.create(tmp_path / "run", parts.config) as folder,
        pytest.raises(RunError, match="task 2, round 1: secure aggregation: 4"),
    ):
        Experiment(parts, grid, folder).run()
    secure, _ = resume(tmp_path, config)
    same(secure, in_the_clear)


FLEET = [SECURE, "fleet.devices=infinite", "fleet.dropout=0.3", "train.rounds=3"]


def fleet_of(tmp_path, seed, *overrides):
    config = configured(*FLEET, f"seed={seed}", *overrides)
    return simulate(config, tmp_path, report=False)


@pytest.mark.parametrize("seed", range(4))
def test_a_fleet_loses_nothing(tmp_path, seed):
    """Whether rounds have a sum or not: dropouts change no number of the solution."""
    result = fleet_of(tmp_path / "a", seed)
    calm = fleet_of(tmp_path / "b", seed, "fleet.dropout=0")
    # Sums of multiples of the unit are exact in any order.
    assert (head(result) == head(calm)).all()


def without_sum(folder):
    """How many rounds of a run had no sum."""
    reasons = [
        event.get("reason", "") for event in RunFolder.open(folder).events()
    ]
    return sum("clients sent updates, and" in reason for reason in reasons)


def test_a_fleet_without_a_sum_is_among_them(tmp_path):
    counts = []
    for seed in range(4):
        fleet_of(tmp_path / str(seed), seed)
        counts.append(without_sum(tmp_path / str(seed)))
    assert 0 < sum(counts) < 4 * 6


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a seed in which a first round had no sum, among others."""
    result = fleet_of(tmp_path_factory.mktemp("whole") / "run", 2)
    assert without_sum(result.folder)
    return result


@pytest.mark.parametrize("stop", range(2, 7))
def test_a_resumed_fleet_gives_the_same_to_the_bit(tmp_path, whole, stop):
    config = configured(*FLEET, "seed=2")
    rounds = []

    def interrupt(event):
        rounds.append(event.event == "round")
        if sum(rounds) == stop:
            raise KeyboardInterrupt

    folder = tmp_path / "halved"
    with pytest.raises(KeyboardInterrupt):
        simulate(config, folder, observers=[interrupt], report=False)
    resumed = simulate(config, folder, resume=True, report=False)
    for name, array in whole.arrays.items():
        assert (resumed.arrays[name] == array).all()
    for scoring, accuracy in whole.accuracy.items():
        np.testing.assert_array_equal(resumed.accuracy[scoring], accuracy)
    assert without_sum(folder) == without_sum(whole.folder)
