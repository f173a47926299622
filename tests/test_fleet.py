"""The simulated fleet: whatever is killed, all shards are done, and its figures add up."""

import pytest

from benchmarks.fleet import Simulation

SHARDS, WORKERS = 60, 8


@pytest.mark.parametrize("notice", [False, True])
def test_workers_that_are_killed_lose_time_and_no_shard(notice):
    run = Simulation(WORKERS, SHARDS, seconds=60.0, kills=30.0, notice=notice, seed=1)
    run.elastic()  # asserts that all are done
    deaths = len(run.fates) - WORKERS
    assert deaths > 3 and run.finished > run.ideal
    shares = run.shares()
    assert 0 < shares["claims"] < 0.1 and shares["killed"] > 0.1
    assert run.store.requests["PUT"] >= 4 * SHARDS + deaths


def test_alone_it_takes_the_ideal_time_and_its_requests():
    run = Simulation(1, SHARDS, seconds=60.0, kills=0.0, notice=False, seed=1)
    run.elastic()
    assert run.ideal < run.finished < 1.05 * run.ideal
    assert run.store.requests["conflict"] == 0 and run.store.requests["PUT"] == 4 * SHARDS + 2  # two: its clock
    assert run.split() == pytest.approx(run.ideal)
