"""Signals that are put off: none is lost, none is obeyed in the middle, and who asked for it gets it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shards import remote, signals
from shards.signals import Signals, in_threads

BOTH = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[list[int]]:
    """SIGTERM raises as Ctrl-C does; nothing of it is left behind."""
    before = [signal.getsignal(number) for number in BOTH]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield []
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # here its handler runs


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("error", [None, FileNotFoundError(), OSError("full")])
def test_a_stop_is_raised_at_the_end_whatever_the_work_raised(number: int, error: Exception | None) -> None:
    went_on = False
    with pytest.raises(KeyboardInterrupt), Signals().untorn():
        send(number)
        went_on = True
        if error is not None:
            raise error
    assert went_on
    with pytest.raises(KeyboardInterrupt):  # as before, at once
        send(number)


@pytest.mark.parametrize("number", BOTH)
def test_a_handler_of_the_users_own_gets_what_is_its(number: int) -> None:
    heard: list[int] = []
    signal.signal(number, lambda number, frame: heard.append(number))
    with Signals().untorn():
        send(number)
        assert not heard
    assert heard == [number]

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(number, leave)
    with pytest.raises(SystemExit, match=f"{128 + number}"), Signals().untorn():
        send(number)


def test_what_is_ignored_or_ends_the_process_is_left_alone() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with Signals().untorn():
        assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_DFL, signal.SIG_IGN]
    stops = Signals()
    with stops.heard():
        send(signal.SIGINT)
        assert stops.number == 0
        send(signal.SIGTERM)
        assert stops.number == signal.SIGTERM


def test_a_second_ctrl_c_is_put_off_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN", 0.05)
    steps = []
    with pytest.raises(KeyboardInterrupt), Signals().untorn():
        send(signal.SIGINT)
        send(signal.SIGINT)  # handed on by torchrun
        steps.append("first")
        time.sleep(0.1)
        send(signal.SIGINT)
        steps.append("never")
    assert steps == ["first"]


@pytest.mark.parametrize("kind", ["untorn", "heard"])
def test_a_store_that_fails_is_asked_again_unless_a_stop_may_be_raised(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the outer work notes a stop and goes on, as training does, so does the call."""
    monkeypatch.setattr(remote, "WAITS", (0.001, 0.001))
    outer, calls = Signals(), 0

    def call() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            send(signal.SIGINT)
        if calls < 3:
            raise ConnectionError("busy")
        return "found"

    if kind == "untorn":
        with pytest.raises(KeyboardInterrupt), outer.untorn():
            remote.retry("s3://bucket/a", call)
        assert calls == 1
    else:
        with outer.heard():
            assert remote.retry("s3://bucket/a", call) == "found"
            assert outer.number == signal.SIGINT and calls == 3


def test_threads_are_begun_until_a_stop_or_an_error() -> None:
    assert in_threads(lambda item: item * 2, range(50), 4) == list(range(0, 100, 2))
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 3 and failing:
            raise ValueError("three")
        if item == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02 if failing else 0.1)

    failing = True
    with pytest.raises(ValueError, match="three"):
        in_threads(work, range(1000), 2)
    assert len(begun) < 1000
    failing = False
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        in_threads(work, range(1000), 2)
    assert len(begun) < 1000


def test_another_thread_hears_nothing() -> None:
    before = [signal.getsignal(number) for number in BOTH]
    found = []

    def work() -> None:
        with Signals().untorn():
            found.extend(signal.getsignal(number) for number in BOTH)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == before
