"""Who is at which shard: on a store in memory whose clock the test turns."""

import json
import random
from pathlib import Path

import pytest

from miner.claims import FIRST_WAIT, MOST_WAITED, Claims, Stolen, Unreachable
from miner.folder import remove_claims
from shards import format as fmt
from shards.errors import TicketSetError
from stores import MemoryStore

NAMES = [f"train-{number:06d}" for number in range(8)]
DONE = b"{}".ljust(500)


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    return MemoryStore(tmp_path)


def worker(store: MemoryStore, name: str = "one", names: list[str] = NAMES, attempts: int = 3) -> Claims:
    return Claims(store, name, names, seconds=60, attempts=attempts)


def claims_in(store: MemoryStore) -> list[str]:
    return sorted(name.removeprefix("claims/") for name in store.objects if name.startswith("claims/"))


def take_all(claims: Claims) -> list[str]:
    return [name for name in iter(claims.take, None)]


def test_workers_share_out_what_there_is_each_in_an_order_of_its_own(store: MemoryStore) -> None:
    orders = [take_all(worker(MemoryStore(store._folder), name)) for name in "abcde"]
    assert all(sorted(order) == NAMES for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    one, two = worker(store, "one"), worker(store, "two")
    taken = [claims.take() for claims in (one, two, one, two, one, two, one, two, one, two)]
    assert sorted(filter(None, taken)) == NAMES and taken[-2:] == [None, None]
    assert sorted(one.held + two.held) == NAMES
    assert claims_in(store) == [f"{name}.a1" for name in NAMES]


def test_a_claim_that_is_not_renewed_is_free_when_its_time_is_over(store: MemoryStore) -> None:
    one, two = worker(store, "one"), worker(store, "two")
    take_all(one)
    store.time += 59
    assert two.take() is None and two.state.working == dict.fromkeys(NAMES, 1.0)
    assert two.pause <= 1.05
    store.time += 1.5
    assert sorted(take_all(two)) == NAMES
    assert claims_in(store) == sorted(f"{name}.a{attempt}" for name in NAMES for attempt in (1, 2))
    with pytest.raises(Stolen, match=r"train-00000.: another worker has taken this shard over"):
        one.renew()


def test_a_claim_that_is_renewed_stays(store: MemoryStore) -> None:
    one, two = worker(store, "one"), worker(store, "two")
    taken = one.take()
    for _ in range(20):
        store.time += 25
        one.renew()
        two.look()
        assert list(two.state.working) == [taken]
    puts = []
    store.step = lambda what, name: puts.append(name)
    store.time += 15
    one.renew()
    assert not puts  # it is not time yet


def test_of_many_who_steal_one_wins(store: MemoryStore) -> None:
    worker(store, "dead", NAMES[:1]).take()
    store.time += 61
    many = [worker(store, f"worker {number}", NAMES[:1]) for number in range(50)]
    for claims in many:
        claims.look()
    taken = [claims.take() for claims in many]
    assert [name for name in taken if name] == NAMES[:1]


def test_a_worker_that_was_only_slow_goes_on_where_nobody_came(store: MemoryStore) -> None:
    one, two = worker(store, "one", NAMES[:1]), worker(store, "two", NAMES[:1])
    one.take()
    store.time += 500
    assert two.look().free == {NAMES[0]: 2}
    one.renew()
    assert list(two.look().working) == NAMES[:1] and two.take() is None
    assert claims_in(store) == ["train-000000.a1"]


def test_what_was_dropped_is_free_at_once_and_counts_for_nothing(store: MemoryStore) -> None:
    for number in range(10):
        one = worker(store, f"spot {number}", NAMES[:1])
        assert one.take() == NAMES[0]
        one.drop()
        assert not one.held
    assert one.look().free == {NAMES[0]: 11}


@pytest.mark.parametrize(("ends", "poisoned"), [("fff", 3), ("ffl", 3), ("lll", 3), ("fdfdl", 5), ("ffdd", None), ("ff", None), ("fffd", 3)])  # fmt: skip
def test_attempts_that_failed_or_were_lost_make_poison(store: MemoryStore, ends: str, poisoned: int | None) -> None:
    for number, end in enumerate(ends):
        one = worker(store, f"worker {number}", NAMES[:1], attempts=99)
        assert one.take() == NAMES[0]
        if end == "l":
            store.time += 61
        else:
            one.fail(NAMES[0], f"reason {number + 1}") if end == "f" else one.drop()
    state = worker(store, "last", NAMES[:1]).look()
    assert state.poisoned == ({} if poisoned is None else {NAMES[0]: poisoned})
    assert state.free == ({NAMES[0]: len(ends) + 1} if poisoned is None else {})
    if poisoned:
        last = worker(store, "last", NAMES[:1])
        assert last.take() is None
        lost = ends[poisoned - 1] == "l"
        assert last.reason(NAMES[0], poisoned) == ("its worker was lost" if lost else f"reason {poisoned}")
        assert worker(store, "patient", NAMES[:1], attempts=4).take() == NAMES[0]


def test_somebody_at_work_on_the_last_attempt_is_waited_for(store: MemoryStore) -> None:
    one = worker(store, "one", NAMES[:1], attempts=1)
    one.take()
    assert list(one.look().working) == NAMES[:1]
    store.time += 61
    assert one.look().poisoned == {NAMES[0]: 1}


def test_what_failed_is_tried_last(store: MemoryStore) -> None:
    """Or a worker would give up over one bad shard before it has seen the good ones."""
    for number in range(3):
        one = worker(store, f"worker {number}")
        bad = take_all(one)[0]
        one.fail(bad, "bad")
        one.drop()  # the others, which is another thing
        assert take_all(worker(store, "last"))[-1] == bad
        store.time += 100
        remove_claims(store)


def test_a_reason_is_one_line_of_plain_text(store: MemoryStore) -> None:
    one = worker(store)
    name = one.take()
    one.fail(name, "red \x1b[31m and\nmore")
    assert one.reason(name, 1).isprintable()
    assert json.loads(store.objects[f"claims/{name}.a1.failed"])["worker"] == "one"


def test_done_is_what_has_a_json_that_is_no_mark(store: MemoryStore) -> None:
    """A mark says that somebody takes a shard over; if he dies, another must."""
    store.put("train-000000.json", DONE)
    store.put("train-000001.json", fmt.taken_mark("0" * 32))
    one = worker(store, names=NAMES[:2])
    assert one.look().done == {"train-000000"}
    assert take_all(one) == ["train-000001"]


def test_an_old_listing_does_no_harm_when_all_was_done_and_the_claims_removed(store: MemoryStore) -> None:
    late, others = worker(store, "late"), worker(store, "others")
    assert len(late.look().free) == len(NAMES)
    for name in take_all(others):
        store.put(f"{name}.json", DONE)
        others.forget(name)
    remove_claims(store)
    assert late.take() is None
    assert late.state.done == set(NAMES) and not late.held


def test_an_old_listing_costs_a_few_conflicts_and_no_more(store: MemoryStore) -> None:
    late, others = worker(store, "late"), worker(store, "others", NAMES[:-1])
    late.look()
    take_all(others)
    asked = []
    store.step = lambda what, name: asked.append(what)
    assert late.take() == NAMES[-1]
    assert asked.count("put") <= 5 and asked.count("entries") <= 2


def test_a_shard_that_was_committed_by_another_thread_while_its_claim_is_renewed_is_not_held(
    store: MemoryStore,
) -> None:
    one = worker(store)
    name = one.take()
    store.time += 30
    store.step = lambda what, of: one.forget(name) if what == "put" else None
    one.renew()
    assert not one.held


def test_clocks_of_workers_do_not_matter(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one = worker(store, "one")
    name = one.take()
    monkeypatch.setattr("time.time", lambda: 5.0)
    two = worker(store, "two")
    assert name in two.look().working
    monkeypatch.setattr("time.time", lambda: 9e9)
    assert name in worker(store, "three").look().working


def test_a_store_that_fails_is_no_shards_fault(store: MemoryStore) -> None:
    one, down = worker(store), False

    def step(what: str, name: str) -> None:
        if down:
            raise TicketSetError("s3://x: SlowDown")

    store.step = step
    name = one.take()
    down = True
    store.time += 30
    for ask in (one.take, one.renew):
        with pytest.raises(Unreachable, match="s3://x: SlowDown"):
            ask()
    one.drop()  # it cannot, and others wait for the time to be over
    down = False
    assert not one.held and name in one.look().working


def test_others_files_among_the_claims_are_passed_over(store: MemoryStore) -> None:
    for name in (
        "lock",
        "clock-0123",
        "train-000000.a1.77-abcdef.tmp",
        "train-000099.a1",
        "train-000001.a1.odd",
        ".a1",
    ):
        store.put(f"claims/{name}", b"?")
    assert sorted(worker(store).look().free.values()) == [1] * len(NAMES)


def test_pauses_grow_while_there_is_nothing_to_take(store: MemoryStore) -> None:
    one, two = worker(store, "one", NAMES[:1]), worker(store, "two", NAMES[:1])
    one.take()
    pauses = []
    for _ in range(8):
        assert two.take() is None
        pauses.append(two.pause)
    assert FIRST_WAIT / 2 <= pauses[0] <= FIRST_WAIT + 0.05 and MOST_WAITED / 2 <= pauses[-1] <= MOST_WAITED + 0.05
    one.drop()
    assert two.take() and one.take() is None
    assert one.pause <= FIRST_WAIT + 0.05


@pytest.mark.parametrize("seed", range(30))
def test_whatever_workers_do_each_shard_is_done_and_two_never_hold_the_same_attempt(
    store: MemoryStore, seed: int
) -> None:
    """Workers that come, work, sleep, fail, drop, die and wake up again, in any order."""
    rng = random.Random(seed)
    alive: list[Claims] = []
    attempts: set[str] = set()
    store.step = lambda what, name: None

    def put(name, data, expected="any", *, _put=store._put):
        won = _put(name, data, expected)
        if won and expected is None and name.startswith("claims/"):
            assert name not in attempts, "an attempt was made twice"
            attempts.add(name)
        return won

    store._put = put  # type: ignore[method-assign]
    for turn in range(400):
        if len(alive) < 4 and rng.random() < 0.3:
            alive.append(worker(store, f"worker {turn}", attempts=1000))
        store.time += rng.choice([0, 1, 5, 40])
        if not alive:
            continue
        claims = rng.choice(alive)
        try:
            match rng.choice(["take", "take", "renew", "commit", "fail", "drop", "die", "sleep"]):
                case "take":
                    claims.take()
                case "renew":
                    claims.renew()
                case "commit" if claims.held:
                    name = claims.held[0]
                    store.put(f"{name}.json", DONE)
                    claims.forget(name)
                case "fail" if claims.held:
                    claims.fail(claims.held[0], "?")
                case "drop":
                    claims.drop()
                case "die":
                    alive.remove(claims)
        except Stolen:
            claims.drop()
    store.time += 100
    last = worker(store, "last", attempts=1000)
    assert sorted(last.look().done | set(take_all(last))) == NAMES
