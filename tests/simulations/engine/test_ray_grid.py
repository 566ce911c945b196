"""The Ray grid: the same answers whatever the number of workers and whatever happens to them."""

import itertools
import os
import random
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg

from fedknow.client.host import Host
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import (
    CLIENT_FAILED,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.inline import InlineGrid
from fedknow.server.grids.strategy_grid import StrategyGrid
from fedknow.server.grids.wave import WaveOptions
from fedknow.simulations.engine.batches import (
    WORKER_DIED,
    even_queues,
    take_batch,
)
from fedknow.simulations.engine.packing import (
    Job,
    Shared,
    pack,
    share,
    unpack,
    unshare,
)
from fedknow.simulations.engine.ray_grid import (
    RayGrid,
    core_share,
    gpu_share,
    placement,
)

ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # workers cannot import a test module

CLIENTS = 11
CONFIG = ExperimentConfig()
START = Arrays({"w": np.linspace(-1, 1, 64, dtype=np.float32)})


@dataclass
class Stream:
    """Stands for the data."""

    clients: int = CLIENTS
    weights: np.ndarray = field(
        default_factory=lambda: np.linspace(0, 1, 4096, dtype=np.float32).reshape(
            64, 64
        )
    )


class Trainer:
    """Sums that depend on the order they are taken in, of what is received, what is kept and the
    client's number.

    A message's config may list clients that fail (``fails``), kill their worker (``dies``), or
    do so where the file ``marker`` does not exist yet (``dies-once``), and say how long each
    takes (``seconds``).
    """

    def __init__(self, config: ExperimentConfig, stream: Stream) -> None:
        if config.name == "broken":
            raise ConfigError("learner.name = 'broken': cannot be built")
        self.stream = stream
        self.weights = torch.from_numpy(stream.weights.copy())

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        client, config = client_of(message.node), message.config()
        if client in config.get("fails", []):
            return message.fail(CLIENT_FAILED, f"client {client} fails"), state
        marker = Path(f"{config.get('marker')}-{client}")
        if client in config.get("dies", []) or (
            client in config.get("dies-once", []) and not marker.exists()
        ):
            marker.touch()
            os._exit(1)
        if "seconds" in config:
            time.sleep(config["seconds"][client])  # stands for training
        received = message.arrays()
        kept = state.get("kept", torch.full((64, 64), 1.0 + client))
        kept = (
            torch.tanh(kept @ self.weights)
            + torch.from_numpy(received["w"].copy()).mean()
        )
        state = {"kept": kept, "count": state.get("count", 0) + 1}
        metrics = {
            "num-examples": client + 1,
            "count": state["count"],
            "process": os.getpid(),
            "broadcast": id(received["w"]),
            "threads": torch.get_num_threads()
            * int(os.environ.get("OMP_NUM_THREADS", "0")),
            "gpu": int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1),
            "data-is-copied": int(self.stream.weights.flags.writeable),
        }
        arrays = Arrays({"w": (kept.sum(0) * 1e-3).numpy()})
        return message.reply(
            {"arrays": arrays, "metrics": Metrics(metrics)}
        ), state


def dies_at_start(config, stream):
    """Stands for a machine that goes away while its workers start."""
    os._exit(1)


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        num_cpus=8,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(cluster, tmp_path_factory):
    """A grid of two workers, for all tests that do not need one of their own."""
    with RayGrid(
        CONFIG, Stream(), tmp_path_factory.mktemp("pair"), 2, Trainer
    ) as grid:
        yield grid


@pytest.fixture
def grid(pair):
    ray.get(
        [worker.start.remote() for worker in pair.pool.workers]
    )  # those that the last test had replaced are up
    pair.restore({}, {})
    pair.pool.homes = {client: client % 2 for client in range(CLIENTS)}
    pair._pace = {}
    return pair


@pytest.fixture
def inline(tmp_path):
    return InlineGrid(
        CLIENTS,
        Host(
            CONFIG,
            None,
            StateStore(tmp_path / "inline", 0),
            Trainer(CONFIG, Stream()),
        ),
    )


def work(clients, arrays=START, **config):
    settings = Config(
        {
            "task": 0,
            **{name.replace("_", "-"): value for name, value in config.items()},
        }
    )
    content = {"arrays": arrays, "config": settings}
    return [
        Message(TRAIN, node_of(client), "", content=content) for client in clients
    ]


def numbers(replies):
    """What must not depend on where the work was done."""
    return [
        (r.node, r.failure)
        if r.failure
        else (
            r.node,
            r.arrays()["w"].tobytes(),
            r.content["metrics"]["count"],
            r.content["metrics"]["num-examples"],
        )
        for r in replies
    ]


def metric(replies, name):
    return {
        client_of(reply.node): reply.content["metrics"][name] for reply in replies
    }


def waves(grid, **config):
    """Three waves of changing clients, each from the mean of the last: numbers of all answers."""
    seen, arrays = [], START
    for clients in (range(CLIENTS), [5, 1, 3, 4], range(CLIENTS - 1, -1, -1)):
        replies = grid.exchange(work(clients, arrays, **config))
        seen += numbers(replies)
        arrays = Arrays(
            {
                "w": np.mean(
                    [
                        reply.arrays()["w"]
                        for reply in replies
                        if not reply.failure
                    ],
                    axis=0,
                )
            }
        )
    return seen


def clients_of(queues):
    return [[job.client for job in queue] for queue in queues]


def test_a_grid_starts_and_stops_its_own_ray(tmp_path):
    assert not ray.is_initialized()
    with RayGrid(CONFIG, Stream(3), tmp_path, node=Trainer) as grid:
        assert ray.is_initialized()
        assert 1 <= grid.workers <= 3  # one a core, and no more than clients
        assert metric(grid.exchange(work(range(3))), "count") == {
            0: 1,
            1: 1,
            2: 1,
        }
    assert not ray.is_initialized()
    grid.close()
    assert not ray.is_initialized()


def test_answers_do_not_depend_on_the_number_of_workers(
    cluster, grid, inline, tmp_path
):
    expected = waves(inline, fails=[4])
    assert len(expected) == 26
    assert waves(grid, fails=[4]) == expected
    for workers in (1, 4):
        with RayGrid(
            CONFIG, Stream(), tmp_path / str(workers), workers, Trainer
        ) as other:
            assert other.workers == workers
            assert waves(other, fails=[4]) == expected


def test_states_may_lie_at_a_storage_url(cluster, inline, tmp_path):
    expected = waves(inline)
    url = f"file://{tmp_path}/states"
    with RayGrid(CONFIG, Stream(), url, 2, Trainer) as grid:
        assert waves(grid) == expected
        assert len(grid.store._files.list(tmp_path / "states")) >= CLIENTS
        grid.prune()
    assert len(list((tmp_path / "states").glob("*"))) == CLIENTS


def test_flowers_fedavg_runs_unmodified_and_gives_the_same_numbers(grid, inline):
    results = []
    for it in (grid, inline):
        random.seed(3)
        strategy = FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
        result = strategy.start(StrategyGrid(it), to_record(START), num_rounds=3)
        results.append(
            (result.arrays["w"].numpy().tobytes(), it.traffic.counts())
        )
    assert results[0] == results[1]


def test_workers_have_one_thread_share_the_data_and_decode_a_broadcast_once(grid):
    replies = grid.exchange(work(range(CLIENTS)))
    assert set(metric(replies, "threads").values()) == {1}
    assert set(metric(replies, "data-is-copied").values()) == {0}
    process, broadcast = metric(replies, "process"), metric(replies, "broadcast")
    assert len(
        {(process[client], broadcast[client]) for client in process}
    ) == len(set(process.values()))


@pytest.mark.parametrize(("workers", "expected"), [(0, {0, 1}), (3, {0, 1})])
def test_workers_have_gpus(cluster, tmp_path, workers, expected):
    """As Ray hands them out; it does not look whether they are there."""
    with RayGrid(
        CONFIG.on_device("cuda"), Stream(), tmp_path, workers, Trainer
    ) as grid:
        assert grid.workers == (workers or 2)
        assert (
            set(
                metric(
                    grid.exchange(work(range(CLIENTS), seconds=[0.02] * CLIENTS)),
                    "gpu",
                ).values()
            )
            <= expected
        )


def test_workers_on_the_cpu_have_none(grid):
    assert set(metric(grid.exchange(work(range(CLIENTS))), "gpu").values()) == {
        -1
    }


@pytest.mark.parametrize(
    ("device", "cores", "gpus", "expected"),
    [
        ("cpu", 8.0, 2.0, ("cpu", 0.0, 8)),
        ("cpu", 0.5, 0.0, ("cpu", 0.0, 1)),
        ("cuda", 8.0, 2.0, ("cuda", 2.0, 2)),
        ("cuda:1", 8.0, 2.0, ("cuda:1", 0.0, 1)),
        ("auto", 8.0, 0.0, ("cpu", 0.0, 8)),
        ("auto", 8.0, 2.0, ("cuda", 2.0, 2)),
    ],
)
def test_where_workers_compute(monkeypatch, device, cores, gpus, expected):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    assert placement(device, cores, gpus) == expected


def test_without_a_gpu_none_is_asked_for(monkeypatch):
    with pytest.raises(
        ConfigError,
        match=r"engine\.device = 'cuda': Ray sees no GPU; set .* 'cpu' or 'auto'",
    ):
        placement("cuda", 8.0, 0.0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert placement("auto", 8.0, 2.0) == (
        "cpu",
        0.0,
        8,
    )  # torch could not use them


@pytest.mark.parametrize(
    ("workers", "gpus", "share"),
    [(1, 4, 1), (4, 4, 1), (4, 2, 0.5), (3, 2, 0.5), (3, 1, 0.3333), (8, 0, 0)],
)
def test_workers_share_gpus(workers, gpus, share):
    """Three on two GPUs: of parts of two thirds there would be room for two."""
    assert gpu_share(workers, gpus) == share


@pytest.mark.parametrize(
    ("workers", "cores", "share"),
    [
        (2, [1.0, 1.0], 1.0),
        (3, [1.0, 1.0], 0.5),  # of 2/3 of a core, one on each machine would fit
        (8, [2.0, 1.0], 0.3333),
        (5, [4.0, 0.0], 0.8),
        (3, [0.0], 1.0),
    ],
)
def test_every_worker_fits_on_a_machine(workers, cores, share):
    assert core_share(workers, cores) == share
    if any(cores):
        assert sum(int(each / share) for each in cores) >= workers


def test_the_worker_that_did_the_work_is_a_clients_home(grid):
    process = metric(
        grid.exchange(work(range(CLIENTS), seconds=[0.02] * CLIENTS)), "process"
    )
    homes = {
        (grid.pool.homes[client], process[client]) for client in range(CLIENTS)
    }
    assert len(homes) == 2


def test_clients_go_home_as_far_as_that_is_even(grid):
    def queues(clients, home):
        return clients_of(
            even_queues([Job(client, 0) for client in clients], 2, home)
        )

    assert queues([0, 1, 2, 3], {0: 1, 1: 0, 2: 1, 3: 0}) == [[1, 3], [0, 2]]
    assert queues(range(9), dict.fromkeys(range(9), 1)) == [
        [5, 6, 7, 8],
        [0, 1, 2, 3, 4],
    ]
    assert queues(range(5), {4: 1}) == [[0, 1, 3], [4, 2]]
    assert queues([3], {3: 1}) == [[], [3]]


def test_work_that_is_uneven_is_evened_out(grid):
    seconds = [1.0] + [0.01] * (CLIENTS - 1)
    process = metric(
        grid.exchange(work(range(CLIENTS), seconds=seconds)), "process"
    )
    # Client 0 and the two others of the first half of its queue: the rest was taken over by the
    # other worker.
    assert sum(other == process[0] for other in process.values()) == 3


def test_a_worker_that_dies_amid_a_wave_changes_nothing(grid, inline, tmp_path):
    assert waves(grid, dies_once=[3, 8], marker=str(tmp_path / "died")) == waves(
        inline
    )
    assert {path.name for path in tmp_path.glob("died*")} == {"died-3", "died-8"}


def test_a_worker_killed_between_waves_changes_nothing(grid, inline):
    first = grid.exchange(work(range(CLIENTS)))
    assert numbers(first) == numbers(inline.exchange(work(range(CLIENTS))))
    os.kill(metric(first, "process")[0], signal.SIGKILL)
    second = grid.exchange(work(range(CLIENTS)))
    assert numbers(second) == numbers(inline.exchange(work(range(CLIENTS))))
    assert metric(second, "count") == dict.fromkeys(range(CLIENTS), 2)


def test_a_client_that_kills_every_worker_fails_alone(grid, inline, tmp_path):
    replies = grid.exchange(
        work(range(CLIENTS), dies=[1], marker=str(tmp_path / "died"))
    )
    failure = replies.pop(1).failure
    assert failure is not None
    assert failure.code == WORKER_DIED
    assert failure.reason.startswith(
        "client 1: 3 workers died on its 'train' work"
    )
    assert 1 not in grid.versions
    assert numbers(replies) == numbers(
        inline.exchange(work([0, *range(2, CLIENTS)]))
    )


def test_after_a_timeout_the_clients_that_did_not_answer_are_as_they_were(grid):
    started = time.monotonic()
    replies = grid.exchange(
        work(range(4), seconds=[0.0, 0.0, 60.0, 60.0]), timeout=1.0
    )
    assert time.monotonic() - started < 10
    assert (
        [client_of(reply.node) for reply in replies]
        == sorted(grid.versions)
        == [0, 1]
    )
    assert metric(grid.exchange(work(range(4))), "count") == {
        0: 2,
        1: 2,
        2: 1,
        3: 1,
    }


def test_an_interrupt_while_waiting_leaves_a_grid_that_works(grid):
    started = time.monotonic()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        grid.exchange(work([0], seconds=[60.0]))
    assert time.monotonic() - started < 10
    assert metric(grid.exchange(work([0, 1])), "count") == {0: 1, 1: 1}


def test_a_lost_state_is_a_failure_or_a_fresh_client(grid):
    grid.restore({1: 77})
    lost, other = grid.exchange(work([1, 2]))
    assert "000001-4d.safetensors: no such client state" in lost.failure.reason
    assert other.failure is None
    assert grid.versions[1] == 77
    told = []
    options = WaveOptions(
        on_lost_state=lambda client, reason: told.append(client)
    )
    assert metric(grid.exchange(work([1, 2]), options), "count") == {1: 1, 2: 2}
    assert told == [1]
    assert grid.versions[1] not in (0, 77)


def test_a_node_that_cannot_be_built_is_said_at_the_start(cluster, tmp_path):
    with pytest.raises(ConfigError, match=r"learner\.name = 'broken'"):
        RayGrid(ExperimentConfig(name="broken"), Stream(), tmp_path, 1, Trainer)
    assert ray.is_initialized()


def test_arrays_that_messages_share_are_taken_out_and_put_back():
    own = Arrays({"x": np.ones(2)})
    jobs = [
        Job(0, 0, work([0, 0])),
        Job(
            1, 0, [Message(TRAIN, 3, "", content={"arrays": START, "kept": own})]
        ),
    ]
    light, arrays = share(jobs)
    assert [id(record) for record in arrays] == [id(START)]
    assert light[0].work[1].content["arrays"] == Shared(0)
    assert light[1].work[0].content["kept"] is own
    for job, original in zip(light, jobs, strict=True):
        for message, full in zip(job.work, original.work, strict=True):
            assert unshare(message, arrays).arrays() is full.arrays()
            assert list(message.content) == list(full.content)


def test_arrays_of_answers_travel_as_one_and_are_read_where_they_lie():
    own = Arrays(
        {
            "x": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
            "none": np.empty((0, 3)),
            "n": 0,
        }
    )
    own["n"] = np.array(2.5, np.float16)
    odd, large = (
        Arrays({"o": np.array([None])}),
        Arrays({"l": np.zeros(2**14, np.float32)}),
    )
    first, second = work([0, 1])
    content = {"b": own, "odd": odd, "large": large}
    messages = [
        first.reply({"a": START, "b": own, "m": Metrics(loss=1.0)}),
        second.reply(content),
    ]
    light, buffer = pack(messages)
    assert light[0].content["b"].layout is light[1].content["b"].layout
    assert light[1].content["odd"] is odd
    assert light[1].content["large"] is large  # Ray has a quicker way for these
    assert buffer.nbytes == 256 + 2 * (64 + 64)
    for message, original in zip(light, messages, strict=True):
        full = unpack(message, buffer)
        assert list(full.content) == list(original.content)
        assert full.content.get("m") == original.content.get("m")
        for name, record in original.content.items():
            for key, array in record.items() if name in "ab" else ():
                found = full.content[name][key]
                assert (found.dtype, found.shape, found.tolist()) == (
                    array.dtype,
                    array.shape,
                    array.tolist(),
                )
                assert not found.flags.writeable
                assert array.size == 0 or np.shares_memory(found, buffer)


def test_how_long_work_took_says_how_much_is_asked_for_at_once(grid, inline):
    grid.exchange(work(range(CLIENTS)))
    assert grid._pace[TRAIN] > 0
    grid.exchange(work(range(CLIENTS), seconds=[0.01] * CLIENTS))
    assert grid._pace[TRAIN] > 0.01
    assert numbers(grid.exchange(work([3, 4]))) == numbers(
        [inline.exchange(work([3, 4])) for _ in range(3)][-1]
    )


def test_answers_that_fill_the_store_are_copied_out_of_it(grid, inline):
    expected, room = (
        numbers(inline.exchange(work(range(CLIENTS)))),
        grid._held_bytes_limit,
    )
    grid._held_bytes_limit = 0
    replies = grid.exchange(work(range(CLIENTS)))
    assert numbers(replies) == expected
    assert all(reply.arrays()["w"].base is None for reply in replies)
    grid._held_bytes_limit = room


@pytest.mark.parametrize("died", [[], [4]])
def test_workers_average_their_own_clients(grid, inline, tmp_path, died):
    """The strategy's mean of all answers is that of the workers' means; who fails is in none, who
    died is in one."""
    settings = {
        "fails": [3],
        "dies-once": died,
        "marker": str(tmp_path / "marker"),
    }
    strategy = FedAvg(fraction_evaluate=0)
    found = []
    for it, mean in ((inline, False), (grid, True)):
        face = StrategyGrid(it, WaveOptions(is_averaged=mean))
        if not mean:
            (tmp_path / "marker-4").touch()
        elif died:
            (tmp_path / "marker-4").unlink()
        messages = list(
            strategy.configure_train(
                1, to_record(START), ConfigRecord(settings), face
            )
        )
        replies = [
            reply
            for reply in face.send_and_receive(messages)
            if not reply.has_error()
        ]
        assert len(replies) == (1 if mean else CLIENTS - 1)
        found.append(strategy.aggregate_train(1, replies)[0]["w"].numpy())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert grid.traffic.counts()[TRAIN] == inline.traffic.counts()[TRAIN]
    assert len(grid.versions) == CLIENTS - 1


def test_batches_get_smaller_and_what_a_worker_died_on_is_tried_alone():
    queue = deque(Job(client, 0) for client in range(11))
    assert [len(take_batch(queue)) for _ in range(5)] == [6, 3, 1, 1, 0]
    queue = deque(
        [
            Job(0, 0, deaths=1),
            Job(1, 0, deaths=2),
            *(Job(client, 0) for client in range(2, 6)),
        ]
    )
    taken = itertools.takewhile(bool, (take_batch(queue) for _ in range(9)))
    assert clients_of(taken) == [[0], [1], [2, 3], [4], [5]]
    queue = deque(Job(client, 0) for client in range(11))
    assert [len(take_batch(queue, 4)) for _ in range(3)] == [
        6,
        5,
        0,
    ]  # one client is not worth a batch of its own
    queue = deque(Job(client, 0) for client in range(11))
    assert [len(take_batch(queue, 8)) for _ in range(2)] == [11, 0]


def test_a_worker_that_dies_while_it_starts_is_a_sentence(cluster, tmp_path):
    with pytest.raises(
        RunError, match=r"Ray failed while workers started: .*engine.workers"
    ) as told:
        RayGrid(CONFIG, Stream(), tmp_path, 1, dies_at_start)
    assert "\n" not in str(told.value)
