"""Schedules computed by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedknow.simulations.fleet.availability import Always, Trace
from fedknow.simulations.fleet.clock import Clock, Job
from fedknow.simulations.fleet.links import Links


def clock(down=10.0, up=10.0, shared=False, presence=None, clients=4):
    return Clock(
        Links([down] * clients, [up] * clients, shared), presence or Always()
    )


def run(it, *jobs, until=math.inf):
    for job in jobs:
        it.give(job)
    ended = []
    while timing := it.step(until):
        ended.append((timing.job.id, timing.ended))
    return ended


def test_a_job_is_sent_computed_and_answered():
    it = clock(down=10, up=5)
    it.give(Job("a", 0, down=100, seconds=7, up=20, delays=(0.5, 0.25)))
    timing = it.step()
    assert (
        timing.given_at,
        timing.began,
        timing.received,
        timing.computed,
        timing.ended,
    ) == (0, 0, 10.5, 17.5, 21.75)
    assert timing.is_complete
    assert it.shares(timing) == (14.75, 7.0)
    assert it.shares(timing, since=5.0) == (5.5 + 4.25, 7.0)
    assert it.time == 21.75
    assert it.is_idle


def test_clients_do_not_wait_for_each_other_on_links_of_their_own():
    jobs = [
        Job("a", 0, 100, 5, 10),
        Job("b", 1, 10, 3, 10),
        Job("c", 2, 10, 4, 0),
    ]
    assert run(clock(), *jobs) == [("b", 5.0), ("c", 5.0), ("a", 16.0)]


def test_a_client_does_one_job_after_the_other():
    it = clock()
    assert run(it, Job("a", 0, 10, 2, 10), Job("b", 0, 10, 1, 10)) == [
        ("a", 4.0),
        ("b", 7.0),
    ]


def test_a_shared_link_is_shared_equally():
    # Both requests (100 bytes at 10/s) at half the rate: there at 20. a is computed at 21 and
    # has the way back alone until b's answer joins at 25: 40 of 60 bytes are through; the other
    # 20 take 4 s more. b then has 20 of its 60.
    it = clock(shared=True)
    assert run(it, Job("a", 0, 100, 1, 60), Job("b", 1, 100, 5, 60)) == [
        ("a", 29.0),
        ("b", 33.0),
    ]


def test_transfers_of_different_sizes_on_a_shared_link():
    # 30, 60 and 90 bytes at 30/s: 10/s each until 3; then 15/s each, the second needs 30 more:
    # 5; the third alone: 6.
    it = clock(down=30.0, shared=True)
    jobs = [
        Job(name, client, size)
        for client, (name, size) in enumerate({"a": 30, "b": 60, "c": 90}.items())
    ]
    assert run(it, *jobs) == [("a", 3.0), ("b", 5.0), ("c", 6.0)]


def test_whoever_is_given_up_leaves_the_shared_link_to_others():
    it = clock(down=10.0, shared=True)
    # a is due at 4 with 20 of 100 bytes through; b has 20 as well and needs 3 s for the other 30.
    it.give(Job("a", 0, 100, due=4.0))
    it.give(Job("b", 1, 50))
    first, second = it.step(), it.step()
    assert (first.job.id, first.ended, first.is_complete) == ("a", 4.0, False)
    assert (second.job.id, second.ended, second.is_complete) == ("b", 7.0, True)


def test_what_is_due_is_given_up_and_what_is_done_just_then_is_done():
    it = clock()
    it.give(Job("a", 0, 10, 2, 10, due=4.0))
    it.give(Job("b", 1, 10, 3, 10, due=4.0))
    done, late = it.step(), it.step()
    assert (done.job.id, done.ended, done.is_complete) == ("a", 4.0, True)
    assert (late.job.id, late.ended, late.is_complete, late.computed) == (
        "b",
        4.0,
        False,
        4.0,
    )
    assert it.shares(late) == (1.0, 3.0)


def test_a_lost_answer_is_noticed_when_it_is_due_or_should_have_come():
    assert run(clock(), Job("a", 0, 10, 1, 10, is_lost=True)) == [("a", 3.0)]
    assert run(clock(), Job("a", 0, 10, 1, 10, is_lost=True, due=9.0)) == [
        ("a", 9.0)
    ]
    it = clock()
    it.give(Job("a", 0, 10, 1, 10, is_lost=True, due=9.0))
    timing = it.step()
    assert (
        timing.computed,
        timing.arrived,
        timing.ended,
        timing.is_complete,
    ) == (
        2.0,
        3.0,
        9.0,
        False,
    )
    assert it.shares(timing) == (
        2.0,
        1.0,
    )  # the other six seconds nobody computed and nothing was under way


def test_jobs_given_later_are_seen_in_time():
    it = clock()
    it.give(Job("a", 0, seconds=10))
    assert it.step(until=4.0) is None
    assert it.time == 4.0
    it.give(Job("b", 1, seconds=2))
    assert [it.step().job.id, it.step().job.id] == ["b", "a"]
    assert it.time == 10.0
    assert it.step() is None
    assert it.time == 10.0


def test_who_is_away_goes_on_when_back():
    # There in [0, 5) and [8, 10), again every 10 s.
    it = clock(presence=Trace([[(0.0, 5.0), (8.0, 10.0)]], 10.0))
    # Down 1 s, then 4 s until 5, away, 3 s to compute: 8-10 and 10-11; up 1 s.
    assert run(it, Job("a", 0, 10, 7, 10)) == [("a", 12.0)]
    late = clock(presence=Trace([[(3.0, 5.0)]], 10.0))
    late.give(Job("b", 0, 10, 2, 10))
    timing = late.step()
    assert (timing.began, timing.received, timing.computed, timing.ended) == (
        3.0,
        4.0,
        14.0,
        15.0,
    )
    assert late.shares(timing) == (2.0, 2.0)


def test_time_away_is_neither_computing_nor_transfer():
    # There for 5 s in each hour. Down 1 s, 10 s of work as 4 + 5 + 1, up 2 s, while the client
    # is there.
    it = clock(presence=Trace([[(0.0, 5.0)]], 3600.0))
    it.give(Job("a", 0, down=10, seconds=10, up=20))
    timing = it.step()
    assert (timing.computed, timing.ended) == (7201.0, 7203.0)
    assert it.shares(timing) == (3.0, 10.0)
    assert it.shares(timing, since=3602.0) == (2.0, 3.0 + 1.0)
    # The way up begins in one hour and goes on in the next; a job given in between waits for
    # its client.
    it.give(Job("b", 0, down=0, seconds=1, up=30))
    timing = it.step()
    assert (timing.began, timing.computed, timing.ended) == (
        7203.0,
        7204.0,
        10802.0,
    )
    assert it.shares(timing) == (3.0, 1.0)


def test_a_transfer_on_a_shared_link_goes_on_while_its_client_is_away():
    it = clock(shared=True, presence=Trace([[(0.0, 5.0)]], 20.0))
    it.give(
        Job("a", 0, down=80, seconds=2, up=10)
    )  # there at 8, but computed when back: 20-22; up until 23
    timing = it.step()
    assert (timing.received, timing.computed, timing.ended) == (8.0, 22.0, 23.0)
    assert it.shares(timing) == (9.0, 2.0)


def test_dropped_jobs_end_now():
    it = clock()
    for client in range(3):
        it.give(Job(str(client), client, 10, client + 1))
    assert it.step().job.id == "0"
    dropped = it.drop(["1", "2"])
    assert [
        (timing.job.id, timing.ended, timing.is_complete) for timing in dropped
    ] == [
        ("1", 2.0, False),
        ("2", 2.0, False),
    ]
    assert it.step() is None
    assert it.time == 2.0


jobs = st.lists(
    st.tuples(
        st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 5)
    ),
    min_size=1,
    max_size=12,
)


@given(jobs)
def test_a_shared_link_is_never_faster_and_as_fast_for_one_at_a_time(sizes):
    given_jobs = [
        Job(str(i), i, d, s, u, (wait, wait))
        for i, (d, s, u, wait) in enumerate(sizes)
    ]
    own = dict(run(clock(clients=12), *given_jobs))
    shared = dict(run(clock(shared=True, clients=12), *given_jobs))
    assert own.keys() == shared.keys()
    for job in given_jobs:
        assert own[job.id] == pytest.approx(
            job.down / 10 + job.seconds + job.up / 10 + sum(job.delays)
        )
        assert shared[job.id] >= own[job.id] - 1e-9 * max(1.0, own[job.id])
    # Nor does a link carry more than it can.
    assert max(shared.values()) >= sum(job.down for job in given_jobs) / 10 * (
        1 - 1e-9
    )
    alone = dict(run(clock(shared=True, clients=12), given_jobs[0]))
    assert alone["0"] == pytest.approx(own["0"])


@given(jobs, st.floats(0, 300))
def test_nothing_is_counted_twice(sizes, due):
    it = clock(shared=True, clients=12)
    for i, (d, s, u, wait) in enumerate(sizes):
        it.give(Job(str(i), i, d, s, u, (wait, wait), due=due))
    while timing := it.step():
        assert (
            timing.given_at
            <= timing.began
            <= timing.received
            <= timing.computed
            <= timing.arrived
            <= timing.ended
            <= due
        )
        assert timing.is_complete or timing.ended == due
        transfer, computing = it.shares(timing)
        waiting = timing.began - timing.given_at
        assert transfer + computing + waiting == pytest.approx(
            timing.ended - timing.given_at
        )
