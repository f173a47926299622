"""Who is at which shard, where workers come and go: small objects in the set's folder, in `claims/`.

    claims/train-000012.a1            the first attempt at train-000012; put only where there is none, so one worker has it
    claims/train-000012.a1.failed     it failed; the content says why
    claims/train-000012.a1.dropped    it was given up, which is nobody's fault (a spot machine was taken away)
    claims/train-000012.a2            the second attempt

A claim is renewed by putting it again; one that was not for some time is taken for its worker's end. Time is the store's
alone. Nothing is ever removed while somebody works: who steals puts the next attempt's name, and of several only one can.

Claims save work and decide nothing: that no worker undoes another's shard is up to how shards are committed
(`shards.writer`), since a worker that was taken for dead may wake up at any time.
"""

import contextlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from shards import format as fmt
from shards.checks import parse_json
from shards.console import printable
from shards.errors import TicketSetError
from shards.schema import MAX_JSON_BYTES
from shards.store import Conflict, Store

_NAME = re.compile(r"(.+)\.a([0-9]{1,6})(?:\.(failed|dropped))?", re.DOTALL)
CONFLICTS_TO_LOOK_AGAIN = 3  # in a row: what was listed is old
RENEWALS = 3  # in the time that a claim holds
FIRST_WAIT, MOST_WAITED = 2.0, 40.0  # seconds between looks while others are at work


class Stolen(TicketSetError):
    """Another worker has taken this one for dead, and its shard over."""


class Unreachable(TicketSetError):
    """The store failed when it was asked about claims: no shard is to blame."""


@contextlib.contextmanager
def _no_shards_fault() -> Iterator[None]:
    try:
        yield
    except Stolen:
        raise
    except (TicketSetError, OSError) as error:
        raise Unreachable(str(error)) from error


@dataclass
class _Held:
    """A claim of this worker's.

    Attributes:
        attempt: its number.
        put: when it was put last, by the store's clock.
    """

    attempt: int
    put: float


@dataclass
class _Attempts:
    """What is known of one name's attempts.

    Attributes:
        times: attempt -> when its claim was put last.
        ended: attempt -> "failed" or "dropped".
    """

    times: dict[int, float] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)

    @property
    def last(self) -> int:
        return max(self.times, default=0)

    @property
    def failed(self) -> list[int]:
        """Those that did not end well, now that the last is over: lost ones count, dropped ones do not."""
        return [attempt for attempt in self.times if self.ended.get(attempt) != "dropped"]


@dataclass
class State:
    """What one listing shows.

    Attributes:
        done: names whose JSON is there.
        free: that may be claimed, and the number of the attempt that this would be; those that failed before stand first.
        working: that somebody is at; seconds until the claim would be taken for lost.
        poisoned: that failed too often; the number of the last attempt that did.
    """

    done: set[str] = field(default_factory=set)
    free: dict[str, int] = field(default_factory=dict)
    working: dict[str, float] = field(default_factory=dict)
    poisoned: dict[str, int] = field(default_factory=dict)


class Claims:
    """One worker's view of who is at what.

    Args:
        store: the folder of the ticket set.
        worker: its name, which no other has.
        names: of what is to be done, each once; `NAME.json` says that it is. Stems of shards.
        seconds: that a claim holds after it was put last.
        attempts: that may fail until a name is given up.
    Attributes:
        state: as of the last look.
        now: tells the store's time, in seconds.

    Raises:
        TicketSetError: the store does not keep conditional writes.
    """

    def __init__(self, store: Store, worker: str, names: Iterable[str], seconds: float, attempts: int) -> None:
        self._store, self._worker, self._seconds, self._attempts = store, worker, seconds, attempts
        self._names = list(names)  # that were not done when it was looked last
        random.Random(worker).shuffle(self._names)  # or a thousand workers would ask for the first of them
        self.now = store.clock()
        self.state = State()
        self._held: dict[str, _Held] = {}
        self._in_vain = 0  # takes, one after another

    def look(self) -> State:
        """What is done, free, at work and given up now: two listings."""
        there = self._store.entries()
        found = {name: _Attempts() for name in self._names}
        for claim, entry in self._store.entries(fmt.CLAIMS).items():
            match = _NAME.fullmatch(claim)
            if match is None or match[1] not in found:
                continue
            name, number, end = match[1], int(match[2]), match[3]
            if end:
                found[name].ended[number] = end
            else:
                found[name].times[number] = entry.modified
        state, now = State(self.state.done), self.now()
        for name, attempts in found.items():
            file = there.get(f"{name}.json")
            if file is not None and not fmt.is_mark(file.size):
                state.done.add(name)
                continue
            last = attempts.last
            left = attempts.times.get(last, 0.0) + self._seconds - now
            if last and last not in attempts.ended and left > 0:
                state.working[name] = left
            elif len(attempts.failed) >= self._attempts:
                state.poisoned[name] = max(attempts.failed)
            else:
                state.free[name] = last + 1
        self._names = [name for name in self._names if name not in state.done]
        # `take` begins at the end: what fails again and again is not to hold up the rest.
        state.free = dict(sorted(state.free.items(), key=lambda item: -len(found[item[0]].failed)))
        self.state = state
        return state

    @_no_shards_fault()
    def take(self) -> str | None:
        """Claim something that is free, or None where nothing is now: as `state` says, which is of this moment then.

        Raises:
            Unreachable: the store fails.
        """
        for stale in (True, False):
            conflicts, free = 0, self.state.free if stale else self.look().free
            while free and conflicts < CONFLICTS_TO_LOOK_AGAIN:
                name, attempt = free.popitem()
                if not self._claim(name, attempt):
                    conflicts += 1
                elif self._is_done(name):  # since it was looked, and its claims were removed with all others
                    self._end(name, "dropped")
                    conflicts += 1
                else:
                    self._in_vain = 0
                    return name
        self._in_vain += 1
        return None

    @property
    def pause(self) -> float:
        """Seconds to wait after taking in vain: a listing costs, so longer each time, but no longer than a claim holds."""
        wait = min(FIRST_WAIT * 2 ** min(self._in_vain - 1, 10), MOST_WAITED, *self.state.working.values())
        return wait * random.uniform(0.5, 1) + 0.05

    def _is_done(self, name: str) -> bool:
        try:
            return not fmt.is_mark(len(self._store.read(f"{name}.json", MAX_JSON_BYTES)))
        except FileNotFoundError:
            return False

    def _claim(self, name: str, attempt: int) -> bool:
        try:
            self._store.put(_place(name, attempt), self._said, expected=None)
        except Conflict:
            return False
        self._held[name] = _Held(attempt, self.now())
        return True

    @property
    def _said(self) -> bytes:
        return fmt.canonical_json({"worker": self._worker})

    @property
    def held(self) -> list[str]:
        """Names that are claimed and neither done nor given up, in the order of their claims."""
        return list(self._held)

    @_no_shards_fault()
    def renew(self) -> None:
        """Put the held claims again where it is time; call it as the work goes on.

        Raises:
            Stolen: a later attempt is there.
            Unreachable: the store fails.
        """
        for name, held in list(self._held.items()):
            if self.now() - held.put < self._seconds / RENEWALS:
                continue
            if self._store.tag(_place(name, held.attempt + 1)):
                self.forget(name)
                raise Stolen(f"{self._store.at(name)}: another worker has taken this shard over")
            self._store.put(_place(name, held.attempt), self._said)
            held.put = self.now()

    def forget(self, name: str) -> None:
        """Hold a claim no longer: its JSON is there. Another thread may call it."""
        self._held.pop(name, None)

    def drop(self) -> None:
        """Give up all that is held, so that others need not wait; where the store fails they have to."""
        for name in self.held:
            with contextlib.suppress(TicketSetError, OSError):
                self._end(name, "dropped")

    def fail(self, name: str, reason: str) -> None:
        """Say that an attempt at what is held failed."""
        self._end(name, "failed", reason)

    def _end(self, name: str, how: str, reason: str = "") -> None:
        attempt = self._held.pop(name).attempt
        said = {"worker": self._worker, "reason": reason}
        self._store.put(f"{_place(name, attempt)}.{how}", fmt.canonical_json(said))

    def reason(self, name: str, attempt: int) -> str:
        """Why an attempt failed."""
        try:
            said = parse_json(self._store.read(f"{_place(name, attempt)}.failed", MAX_JSON_BYTES), name)
        except FileNotFoundError:
            return "its worker was lost"
        return printable(str(said.get("reason")))


def _place(name: str, attempt: int) -> str:
    return f"{fmt.CLAIMS}/{name}.a{attempt}"
