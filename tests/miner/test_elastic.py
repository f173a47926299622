"""datalth-mine --elastic: however many workers come, and however they go, the set is that of one process.

Workers are forked from this process, so that what a test changes here holds in them, too.
"""

import fcntl
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SELECTOR, contents, inspect, mine
from miner import claims, elastic, reading, writer
from processes import ended, start, waits_for
from shards import format as fmt
from shards.errors import StoreFailed, TicketSetError
from shards.reader import TicketSet
from shards.store import ANY, LocalStore
from shards.writer import ShardWriter

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

COMMON = ["--img-size", "64", "-j", "2", "--device", "cpu"]
FEW = ["--method", "center", "--views", "2", "--shard-size", "4", "--split", "train", "--split", "val"]  # 6 + 2 shards
Hook = Callable[[], None]


@pytest.fixture(autouse=True)
def waits_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "FIRST_WAIT", 0.2)
    monkeypatch.setattr(claims, "MOST_WAITED", 0.2)


@pytest.fixture(scope="module")
def one(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FEW by one process; read-only."""
    out = tmp_path_factory.mktemp("one") / "set"
    mine("--data", photos, *FEW, "--out", out)
    return out


@pytest.fixture
def words(photos: Path, tmp_path: Path) -> list[str]:
    return ["--data", str(photos), *FEW, "--out", str(tmp_path / "set"), "--elastic"]


class Workers:
    """Processes that are ended with their test.

    Args:
        folder: of what they print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, set[int]()

    def start(self, words: list[str], hook: Hook = lambda: None) -> int:
        pid = start("miner.cli", [*COMMON, *words], self._folder / f"{len(list(self._folder.glob('*.log')))}.log", hook)
        self._running.add(pid)
        (self._folder / f"{len(list(self._folder.glob('*.log')))}.log").touch()
        return pid

    def end(self, pid: int, seconds: float = 60) -> int | None:
        """Its exit code; None where it did not end."""
        code = ended(pid, seconds)
        if code is not None:
            self._running.discard(pid)
        return code

    def said(self) -> str:
        return "".join(log.read_text() for log in sorted(self._folder.glob("*.log")))

    def close(self) -> None:
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    (tmp_path / "logs").mkdir()
    found = Workers(tmp_path / "logs")
    yield found
    found.close()


def stopped(pid: int) -> bool:
    """Whether a process has stopped itself."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def without_temporary(out: Path) -> dict[str, bytes]:
    """`contents`, but for what a process that is stopped was writing."""
    return {name: data for name, data in contents(out).items() if not name.endswith(".tmp")}


def claims_of(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "claims").glob("*")) if (out / "claims").exists() else []


def test_three_at_once_give_the_bytes_of_one(photos: Path, weights: Path, tmp_path: Path, workers: Workers) -> None:
    flags = ["--data", photos, "--selector", SELECTOR, "--weights", weights, "--views", 3, "--shard-size", 3, "-b", 4]
    mine(*flags, "--out", tmp_path / "one")
    words = [*map(str, flags), "--out", str(tmp_path / "set"), "--elastic"]
    pids = [workers.start(words) for _ in range(3)]
    assert [workers.end(pid) for pid in pids] == [0, 0, 0], workers.said()
    assert contents(tmp_path / "set") == contents(tmp_path / "one")
    assert "workers" not in workers.said() and workers.said().count("next: ") == 3


@pytest.mark.long
def test_to_an_object_store(
    photos: Path, one: Path, words: list[str], s3: str, tmp_path: Path, workers: Workers
) -> None:
    import fsspec

    words[words.index("--out") + 1] = f"{s3}/set"
    pids = [workers.start(words) for _ in range(2)]
    assert [workers.end(pid) for pid in pids] == [0, 0], workers.said()
    fs, path = fsspec.core.url_to_fs(f"{s3}/set", skip_instance_cache=True)
    fs.get(path, str(tmp_path / "copy"), recursive=True)
    assert contents(tmp_path / "copy") == contents(one)


@pytest.mark.long
def test_eight_that_are_killed_and_started_again_give_the_bytes_of_one(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    """Fifty times, while they read, mine, commit, wait, finalize."""
    rng, kills, rounds = random.Random(0), 0, 0
    flags = ["--data", str(photos), "--method", "center", "--views", "2", "--shard-size", "1"]
    mine(*flags, "--out", tmp_path / "one")
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda *a: (time.sleep(0.3), add(*a)))
    while kills < 50:
        out = tmp_path / f"set {rounds}"
        words = [*flags, "--out", str(out), "--elastic", "--claim-seconds", "2", "--attempts", "1000"]
        pids = [workers.start(words) for _ in range(8)]
        end = time.monotonic() + 300
        while not (out / "manifest.json").exists():
            assert time.monotonic() < end, workers.said()
            time.sleep(rng.random() * 0.4)
            pid = pids.pop(rng.randrange(8))
            if workers.end(pid, 0.01) is None:
                os.kill(pid, signal.SIGKILL)
                kills += workers.end(pid) == -signal.SIGKILL
            pids.append(workers.start(words))
        assert [workers.end(pid) for pid in pids] == [0] * 8, workers.said()
        assert workers.end(workers.start(words)) == 0  # sweeps what the killed ones were writing
        assert contents(out) == contents(tmp_path / "one")
        assert "Traceback" not in workers.said()
        rounds += 1


def sleep_once(kind: type, method: str, when: Callable[..., bool], monkeypatch: pytest.MonkeyPatch) -> Hook:
    """For one worker: it stops itself before a call, the first for which `when` holds."""
    call, asleep = getattr(kind, method), []

    def hook() -> None:
        def stops(*arguments: Any, **keywords: Any) -> Any:
            if not asleep and when(*arguments):
                asleep.append(1)
                os.kill(os.getpid(), signal.SIGSTOP)
            return call(*arguments, **keywords)

        setattr(kind, method, stops)

    return hook


def other_gpu(row: bool, tar: bool) -> Hook:
    """For one worker: last bits that differ, of scores alone or of rankings, too."""
    add = ShardWriter.add

    def hook() -> None:
        def differing(self: ShardWriter, said: dict[str, Any], members: dict[str, bytes]) -> None:
            if tar:
                ranking = bytearray(members["ranking.npy"])
                ranking[-1], ranking[-2] = ranking[-2], ranking[-1]
                members = {**members, "ranking.npy": bytes(ranking)}
            add(self, {**said, "mean_score": 0.5} if row else said, members)

        ShardWriter.add = differing  # type: ignore[method-assign]

    return hook


def putting(ending: str) -> Callable[..., bool]:
    return lambda self, name, *rest: name.endswith(ending) and name.startswith(("train", "val", "index"))


MOMENTS = {
    "in mid-shard": (ShardWriter, "add", lambda self, *rest: len(self._rows) == 1),
    "before the tar": (LocalStore, "put", putting(".tar")),
    "between tar and parquet": (LocalStore, "put", putting(".parquet")),
    "between parquet and JSON": (LocalStore, "put", putting(".json")),
    "before the manifest": (LocalStore, "put", lambda self, name, *rest: name == "manifest.json"),
}


@pytest.mark.parametrize("differs", ["not", "in scores", "in rankings"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_zombie_does_no_harm(
    moment: str, differs: str, one: Path, words: list[str], tmp_path: Path, workers: Workers, monkeypatch
) -> None:
    """It stops, another takes its shard over and finishes the set, it wakes up."""
    out, words = tmp_path / "set", [*words, "--claim-seconds", "0.5"]
    stops = sleep_once(*MOMENTS[moment], monkeypatch)
    gpu = other_gpu(differs != "not", differs == "in rankings")
    zombie = workers.start(words, lambda: (gpu(), stops()))
    waits_for(lambda: stopped(zombie))
    done_by_zombie = {path.stem for path in out.glob("*-0*.json")}
    assert workers.end(workers.start(words)) == 0, workers.said()
    finished = without_temporary(out)
    os.kill(zombie, signal.SIGCONT)
    assert workers.end(zombie) == 0, workers.said()
    assert contents(out) == finished
    assert "Traceback" not in workers.said()
    if differs == "not":
        assert contents(out) == contents(one)
    inspect("verify", out, "--deep")
    assert (len(done_by_zombie) == 8) == (moment == "before the manifest")


@pytest.mark.long
def test_a_zombie_in_the_midst_of_taking_over_does_no_harm(
    words: list[str], tmp_path: Path, workers: Workers, monkeypatch
) -> None:
    """The first leaves a tar and dies; the second, another GPU, has put its mark, and stops; the third is as the first."""
    out, words = tmp_path / "set", [*words, "--claim-seconds", "0.5"]
    first = workers.start(words, sleep_once(*MOMENTS["between tar and parquet"], monkeypatch))
    waits_for(lambda: stopped(first))
    marked = sleep_once(LocalStore, "put", lambda self, name, *rest: bool(
        name.endswith(".tar") and Path(self.at(f"{name[:-4]}.json")).exists()), monkeypatch)  # fmt: skip
    second = workers.start(words, lambda: (other_gpu(True, True)(), marked()))
    waits_for(lambda: stopped(second))
    (mark,) = [path for path in out.glob("*-0*.json") if fmt.is_mark(path.stat().st_size)]
    assert "taken_over" in json.loads(mark.read_bytes())
    assert workers.end(workers.start(words)) == 0, workers.said()
    finished = without_temporary(out)
    for zombie in (second, first):
        os.kill(zombie, signal.SIGCONT)
        assert workers.end(zombie) == 0, workers.said()
    assert contents(out) == finished
    inspect("verify", out, "--deep")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_told_to_stop_drops_its_shard_at_once(
    one: Path, words: list[str], tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """And who waits for it takes it long before its time is over."""
    out, add, told = tmp_path / "set", ShardWriter.add, tmp_path / "told"

    def wait(*arguments: Any) -> None:
        waits_for(told.exists)
        add(*arguments)

    def slow() -> None:
        ShardWriter.add = wait  # type: ignore[method-assign]

    spot = workers.start(words, slow)
    waits_for(lambda: len(claims_of(out)) >= 2 and any(".a1" in name for name in claims_of(out)))
    other = workers.start(words)
    waits_for(lambda: workers.said().count("output") == 2)
    os.kill(spot, number)
    time.sleep(0.5)  # it has heard of it, before its shard can go on
    told.touch()
    assert workers.end(spot) == 128 + number
    assert f"{signal.Signals(number).name}: stopped; finished shards are safe" in workers.said()
    assert workers.end(other) == 0, workers.said()
    assert contents(out) == contents(one)


@pytest.mark.long
def test_who_waits_can_be_told_to_stop(words: list[str], tmp_path: Path, workers: Workers, monkeypatch) -> None:
    out = tmp_path / "set"
    holder = workers.start(words, sleep_once(*MOMENTS["in mid-shard"], monkeypatch))
    waits_for(lambda: stopped(holder))
    done = {path.stem for path in out.glob("*-0*.json")}
    held = {name.partition(".")[0] for name in claims_of(out) if ".a1" in name} - done
    waiting = workers.start(words)
    waits_for(lambda: len(list(out.glob("*-0*.json"))) == 8 - len(held))
    time.sleep(0.3)
    os.kill(waiting, signal.SIGTERM)
    assert workers.end(waiting) == 143, workers.said()
    assert not [name for name in claims_of(out) if name.endswith(("dropped", "failed"))]


def test_two_that_finalize_at_once(one: Path, words: list[str], tmp_path: Path, workers: Workers) -> None:
    out = tmp_path / "set"
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(one, out)
        (out / "manifest.json").unlink()
        pids = [workers.start(words) for _ in range(4)]
        assert [workers.end(pid) for pid in pids] == [0] * 4, workers.said()
        assert contents(out) == contents(one)


@pytest.mark.long
def test_finalizing_is_never_given_up(one: Path, words: list[str], tmp_path: Path) -> None:
    """Not when those who were at it died, as often as a shard may fail."""
    out = tmp_path / "set"
    shutil.copytree(one, out)
    (out / "manifest.json").unlink()
    (out / "claims").mkdir()
    for attempt in range(1, 6):
        (out / "claims" / f"manifest.a{attempt}").write_bytes(b"{}")
        os.utime(out / "claims" / f"manifest.a{attempt}", (1e9, 1e9))
    mine(*words)
    assert contents(out) == contents(one)


def bad(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on one shard of train cannot be mined, or, of a negative number, none."""
    call = ShardWriter.add

    def raising(self: ShardWriter, *rest: Any) -> None:
        if number < 0 or (self.split, self.number) == ("train", number):
            raise TicketSetError("this model cannot take it")
        call(self, *rest)

    monkeypatch.setattr(ShardWriter, "add", raising)


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_shard_that_always_fails_does_not_hold_up_the_rest(
    one: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out, name = tmp_path / "set", f"train-{number:06d}"
    with monkeypatch.context() as patch:
        bad(number, patch)
        result = mine(*words, code=1)
    said = result.stderr.splitlines()
    assert said[:-1] == [f"{name}: this attempt failed: this model cannot take it"] * 3
    assert said[-1] == (
        f"Error: {out}: 1 of 8 shards failed --attempts 3 times ({name}: this model cannot take it); all others are done."
        " Mend the cause and raise --attempts"
    )
    assert {path.stem for path in out.glob("*-0*.json")} == {path.stem for path in one.glob("*-0*.json")} - {name}
    assert not (out / "manifest.json").exists()
    assert mine(*words, code=1).stderr.splitlines() == said[-1:]  # at once, without another attempt
    mine(*words, "--attempts", 4)
    assert contents(out) == contents(one)


@pytest.mark.long
def test_a_shard_that_fails_while_it_is_read_is_the_one_to_blame(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one before, which may still be written."""
    read, out = reading.read_image, tmp_path / "set"

    def raising(plan: Any, source: Any, producers: Any, split: str, row: dict[str, Any]) -> Any:
        if row["source"].endswith("val/bee/bee_1.jpg"):
            raise RuntimeError("odd")
        return read(plan, source, producers, split, row)

    monkeypatch.setattr(reading, "read_image", raising)
    said = mine(*words, "--attempts", 1, code=1).stderr
    (name,) = [stem for stem in ("val-000000", "val-000001") if not (out / f"{stem}.json").exists()]
    assert f"{name}: this attempt failed: odd" in said
    assert [path.stem for path in out.glob("claims/*.failed")] == [f"{name}.a1"]


@pytest.mark.long
def test_a_worker_at_which_everything_fails_stops_and_leaves_the_rest_to_others(
    one: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        bad(-1, patch)
        said = mine(*words, code=1).stderr.splitlines()
    assert said[-1] == "Error: this model cannot take it" and len(said) == 4
    failed = [name for name in claims_of(out) if name.endswith(".failed")]
    assert len({name.split(".")[0] for name in failed}) == len(failed) == elastic.SICK
    mine(*words)
    assert contents(out) == contents(one)


@pytest.mark.long
def test_a_full_disk_is_no_shards_fault(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full)
        assert "No space left on device" in mine(*words, code=1).stderr
    assert not [name for name in claims_of(tmp_path / "set") if name.endswith(".failed")]
    mine(*words)


@pytest.mark.long
def test_a_store_that_fails_is_no_shards_fault(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, times = LocalStore._put, iter(range(9999))

    def fails(self: LocalStore, name: str, data: Any, expected: Any) -> bool:
        if name.startswith("claims/train") and next(times) > 2:
            raise TicketSetError("s3://x: SlowDown")
        return put(self, name, data, expected)

    monkeypatch.setattr(LocalStore, "_put", fails)
    assert mine(*words, code=1).stderr == "Error: s3://x: SlowDown\n"
    assert not [name for name in claims_of(tmp_path / "set") if name.endswith(".failed")]


@pytest.mark.parametrize("times", [2, 9999])
def test_a_store_that_fails_at_shards_makes_no_poison_of_them(
    one: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """It answers about claims, and is too busy for tars: for a moment, or for longer than the worker has patience."""
    put, left = LocalStore._put, iter(range(times))

    def fails(self: LocalStore, name: str, data: Any, expected: Any) -> bool:
        if name == "train-000002.tar" and next(left, None) is not None:
            raise StoreFailed("s3://x/train-000002.tar: SlowDown")
        return put(self, name, data, expected)

    monkeypatch.setattr(LocalStore, "_put", fails)
    monkeypatch.setattr(elastic, "STORE_WAIT", 0.0)
    out = tmp_path / "set"
    said = mine(*words, "--attempts", 1, code=int(times > 2)).stderr
    tries = said.count("train-000002.tar: SlowDown; trying again\n")
    assert tries == 2 if times == 2 else tries >= 2  # patience begins anew with each other shard that is committed
    assert not [name for name in claims_of(out) if name.endswith(".failed")]
    if times > 2:
        assert said.endswith("Error: s3://x/train-000002.tar: SlowDown\n")
        monkeypatch.setattr(LocalStore, "_put", put)
        mine(*words, "--attempts", 1)  # nobody has given it up
    assert contents(out) == contents(one)


def test_a_plan_that_changes_is_no_shards_fault(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "set", ShardWriter.add

    def changes(*arguments: Any) -> None:
        said = json.loads((out / "plan.json").read_text(encoding="utf-8"))
        said["splits"]["train"]["plan_id"] = said["splits"]["val"]["plan_id"] = "0" * 64
        changed = out / f"plan.{threading.get_ident()}.tmp"
        changed.write_text(json.dumps(said), encoding="utf-8")
        changed.replace(out / "plan.json")  # whole, for who reads it meanwhile
        add(*arguments)

    monkeypatch.setattr(ShardWriter, "add", changes)
    assert "plan.json: another datalth-mine has changed it" in mine(*words, code=1).stderr
    assert not [name for name in claims_of(out) if name.endswith(".failed")]


@pytest.mark.long
@pytest.mark.parametrize("waiting_images", [1, 64], ids=["for room in the queue", "for the last shard"])
def test_claims_are_renewed_while_a_slow_store_is_waited_for(
    words: list[str], monkeypatch: pytest.MonkeyPatch, waiting_images: int
) -> None:
    put, events = LocalStore._put, list[str]()

    def slow(self: LocalStore, name: str, data: Any, expected: Any) -> bool:
        events.append(f"{name} {expected}")
        if name == "train-000003.tar":
            time.sleep(3)
            events.append("it is there")
        return put(self, name, data, expected)

    monkeypatch.setattr(LocalStore, "_put", slow)
    monkeypatch.setattr(writer, "WAITING_IMAGES", waiting_images)
    mine(*words, "--claim-seconds", 2)
    meanwhile = events[events.index("train-000003.tar None") : events.index("it is there")]
    assert meanwhile.count(f"claims/train-000003.a1 {ANY}") >= 2


@pytest.mark.long
def test_claims_are_renewed_where_no_model_is_asked(
    center_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, read, renewed = LocalStore._put, reading.read_image, list[str]()

    def noted(self: LocalStore, name: str, data: Any, expected: Any) -> bool:
        renewed.extend([name] if expected is ANY and name.endswith(".a1") else [])
        return put(self, name, data, expected)

    monkeypatch.setattr(LocalStore, "_put", noted)
    monkeypatch.setattr(reading, "read_image", lambda *a: (time.sleep(0.2), read(*a))[1])
    mine("--data", center_set, "--split", "val", "--images", "ranked", "--out", tmp_path / "set", "-j", 1, "--elastic",
         "--claim-seconds", 0.6)  # fmt: skip
    assert renewed


def broken_photos(tmp_path: Path, photos: Path, count: int) -> Path:
    copy = shutil.copytree(photos, tmp_path / "photos")
    for path in sorted((copy / "train" / "ant").iterdir())[:count]:
        path.write_bytes(b"no picture")
    return copy


@pytest.mark.long
def test_failures_are_counted_over_all_workers(photos: Path, words: list[str], tmp_path: Path) -> None:
    """3 of 27: each worker may have mined fewer than are allowed."""
    words[1] = str(broken_photos(tmp_path, photos, 3))
    mine(*words, "--max-failures", 1)
    (tmp_path / "set" / "manifest.json").unlink()
    said = mine(*words, "--max-failures", 0.1, code=1).stderr
    assert "3 of 27 images failed, --max-failures allows 2" in said
    assert "3 images failed (first: " in mine(*words, "--max-failures", 0.12).output
    assert "3 images failed (first: " not in mine(*words, "--max-failures", 0.12).output  # who finalized has said so


@pytest.mark.long
def test_too_many_failures_are_no_shards_fault(photos: Path, words: list[str], tmp_path: Path) -> None:
    words[1] = str(broken_photos(tmp_path, photos, 3))
    assert "images failed, --max-failures allows 0 of this run" in mine(*words, code=1).stderr
    assert not [name for name in claims_of(tmp_path / "set") if name.endswith(".failed")]
    mine(*words, "--max-failures", 1)
    assert not claims_of(tmp_path / "set")


@pytest.mark.long
def test_a_split_may_come_later(photos: Path, tmp_path: Path) -> None:
    flags = ["--data", photos, "--method", "center", "--views", 2, "--shard-size", 4]
    for out, more in (("one", []), ("set", ["--elastic"])):
        for split in ("train", "val"):
            mine(*flags, *more, "--split", split, "--out", tmp_path / out)
            assert TicketSet.open(str(tmp_path / out)).splits == ["train", "val"][: 1 + (split == "val")]
    assert contents(tmp_path / "set") == contents(tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize(
    "locks", [True, False], ids=["refused where there are locks", "in one plan where there are none"]
)
def test_a_split_that_comes_while_another_is_mined_is_not_left_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """Without locks, as in an object store, both are in one manifest, whoever is last."""
    flags = ["--data", photos, "--method", "center", "--views", 2, "--shard-size", 4, "--elastic"]
    out, put, codes = tmp_path / "set", LocalStore.put, list[int]()
    if not locks:
        monkeypatch.setattr("miner.lock.fcntl", None)

    def comes(self: LocalStore, name: str, *rest: Any) -> None:
        if name == "train-000002.json" and not codes:
            codes.append(1)
            mine(*flags, "--split", "val", "--out", out, code=int(locks))
        put(self, name, *rest)

    monkeypatch.setattr(LocalStore, "put", lambda self, name, data, expected=ANY: comes(self, name, data, expected))
    mine(*flags, "--split", "train", "--out", out)
    assert codes and TicketSet.open(str(out)).splits == ["train", *["val"] * (not locks)]


@pytest.mark.long
@pytest.mark.parametrize("more", [["--elastic"], []], ids=["goes on with it", "goes on without"])
def test_a_set_begun_one_way_is_finished_the_other(
    photos: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    out, words = tmp_path / "set", ["--data", photos, *FEW, "--out", tmp_path / "set"]
    with monkeypatch.context() as patch:
        bad(3, patch)
        mine(*words, *({"--elastic"} - set(more)), code=1)
    assert not (out / "manifest.json").exists() and len(list(out.glob("*-0*.json"))) > 2
    result = mine(*words, *more)
    assert "shards are done" in result.output
    assert contents(out) == contents(one) and not claims_of(out)


@pytest.mark.long
def test_what_a_worker_that_died_while_it_took_over_has_left_is_taken_over(
    one: Path, words: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "set"
    shutil.copytree(one, out)
    (out / "manifest.json").unlink()
    (out / "train-000002.json").write_bytes(fmt.taken_mark("0" * 32))
    (out / "train-000002.tar").write_bytes(b"another's")
    assert "resuming: 7 of 8 shards are done" in mine(*words).output
    inspect("verify", out, "--deep")
    assert not claims_of(out)


@pytest.mark.long
def test_what_killed_workers_were_writing_is_swept_at_the_end(
    one: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    shutil.copytree(one, out)
    left = [
        out / name for name in ("train-000000.tar.7-ab.tmp", "index/val-000000.parquet.7-ab.tmp", "new.tar.8-cd.tmp")
    ]
    for path in left:
        path.touch()
    for path in left[:2]:
        os.utime(path, (time.time() - 400,) * 2)
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # another is at work, or all would be swept at the start
    try:
        mine(*words)
        assert [path.exists() for path in left] == [False, False, True]
    finally:
        os.close(descriptor)


@pytest.mark.long
@pytest.mark.parametrize("flag", ["--overwrite", "--retry-failed"])
def test_what_workers_would_undo_for_each_other_is_refused(words: list[str], tmp_path: Path, flag: str) -> None:
    assert f"{flag} --elastic: " in mine(*words, flag, code=2).stderr
    assert not (tmp_path / "set").exists()


@pytest.mark.long
def test_under_torchrun_each_rank_is_a_worker(
    one: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so one is enough."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    mine(*words)
    assert contents(tmp_path / "set") == contents(one)
    monkeypatch.setenv("RANK", "0")
    assert "resuming: 8 of 8 shards are done" in mine(*words).output
    assert contents(tmp_path / "set") == contents(one)
