"""Training on a set in an object store is training on its local copy, and each byte comes at most once a host."""

import subprocess
import time
from pathlib import Path

import pytest

from servers import FaultServer, upload
from training import arguments, same, train, two_ranks, weights_of

ENOUGH = 300  # seconds


def finish(ranks: list[subprocess.Popen]) -> None:
    said = [rank.communicate(timeout=ENOUGH)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


def whole(folder: Path, pattern: str = "*.tar") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


@pytest.mark.long
def test_two_ranks_are_killed_and_resumed_to_the_weights_of_a_local_set(tickets, s3, faults: FaultServer, tmp_path):
    far, cache = upload(tickets, f"{s3}/sets/tickets"), tmp_path / "cache"
    more = ["-b", 2, "--recovery-interval", 1, "-j", 1]  # a worker process for each rank: behind a fork
    finish(two_ranks(*arguments(tickets, tmp_path, "local", *more)))
    faults.clear()
    remote = arguments(far, tmp_path, "far", *more, "--cache", cache)
    ranks = two_ranks(*remote)
    deadline = time.monotonic() + ENOUGH
    while not (tmp_path / "far/recovery.pth.tar").exists():
        assert ranks[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    finish(two_ranks(*remote, "--resume", "latest"))
    assert same(weights_of(tmp_path / "far"), weights_of(tmp_path / "local"))
    assert faults.bytes("GET", r"\.tar$") == whole(tickets)  # of each tar every byte once, for four processes twice
    assert sorted(path.stat().st_size for path in cache.rglob("*.tar")) == sorted(
        path.stat().st_size for path in tickets.glob("*.tar")
    )


@pytest.mark.long
def test_of_ranked_views_two_ranks_fetch_parts(ranked_set, s3, faults: FaultServer, tmp_path):
    far, cache = upload(ranked_set, f"{s3}/sets/ranked"), tmp_path / "cache"
    more = ["-b", 2, "-j", 1, "--repeats", 1, "--mixup", 0, "--cutmix", 0, "--aa", "", "--tokens", 4]
    finish(two_ranks(*arguments(ranked_set, tmp_path, "local", *more)))
    faults.clear()
    finish(two_ranks(*arguments(far, tmp_path, "far", *more, "--cache", cache)))
    assert same(weights_of(tmp_path / "far"), weights_of(tmp_path / "local"))
    assert 0 < faults.bytes("GET", r"\.tar$") < whole(ranked_set)
    assert list(cache.rglob("*.part")) and not list(cache.rglob("*.tar"))


@pytest.mark.long
def test_a_run_with_a_cache_smaller_than_a_tar_and_a_set_on_two_stores(tickets, s3, faults: FaultServer, tmp_path):
    far = upload(tickets, f"{s3}/sets/tickets")
    faults.plan(503, "GET", "train-000001.tar", times=1)
    faults.plan("cut", "GET", "train-000000.tar", times=1)
    train(tickets, tmp_path, "local")
    train(far, tmp_path, "far", "--cache", tmp_path / "cache", "--cache-size", 0.000001)
    assert same(weights_of(tmp_path / "far"), weights_of(tmp_path / "local"))


def test_a_store_that_fails_ends_a_run_in_one_line(tickets, s3, faults: FaultServer, tmp_path, monkeypatch):
    monkeypatch.setattr("shards.remote.WAITS", (0, 0))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    far = upload(tickets, f"{s3}/sets/tickets")
    faults.plan("flip", "GET", "train-00000[12].tar")
    output = train(far, tmp_path, "flipped", "--cache", tmp_path / "cache", code=1).output
    last = output.splitlines()[-1]
    assert last.startswith(f"Error: {far}/train-00000") and ("checksum" in last or "of sha256" in last)
    faults.clear()
    faults.plan(403, "GET", "train-000001.tar")
    output = train(far, tmp_path, "refused", "--cache", tmp_path / "cache", "-j", 1, code=1).output
    assert f"{far}/train-000001.tar: " in output.splitlines()[-1]
    train(far, tmp_path, "negative", "--cache-size", -1, code=2)
