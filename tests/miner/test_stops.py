"""A signal comes at the worst moment: while the miner's main thread holds a lock that its other threads wait for."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import contents, mine
from miner.job import Progress
from miner.writer import Writer
from processes import ended, kill, start, waits_for


def stop_inside_a_lock(number: int) -> None:
    """Send a signal when the main thread has just taken the lock that the writing threads will ask for."""
    enter, following, takes = threading.Condition.__enter__, Writer._next, 0

    def later(self: Writer, images: Any) -> Any:
        time.sleep(0.2)
        return following(self, images)

    def entered(self: threading.Condition) -> bool:
        nonlocal takes
        result = enter(self)
        if sys._getframe(2).f_code is Writer.add.__code__:
            takes += 1
            if takes == 3:
                os.write(2, b"locked\n")
                os.kill(os.getpid(), number)
                time.sleep(0)  # here its handler runs
        return result

    Writer._next, threading.Condition.__enter__ = later, entered  # type: ignore[method-assign]


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_no_lock_held(number: int, heard: bool, photos: Path, tmp_path: Path) -> None:
    """The control, whose handler raises wherever it is, never ends."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--data", str(photos), "--method", "center", "--img-size", "64", "-j", "2", "--shard-size", "3"]

    def before() -> None:
        stop_inside_a_lock(number)
        if not heard:
            Progress.stoppable = lambda self: contextlib.nullcontext()  # type: ignore[method-assign]

    pid = start("miner.cli", [*arguments, "--out", str(out)], log, before)
    waits_for(lambda: log.exists() and "locked" in log.read_text())
    code = ended(pid, 60 if heard else 3)
    if not heard:
        assert code is None
        kill(pid)
        return
    assert code == 128 + number
    assert f"{signal.Signals(number).name}: stopped; finished shards are safe" in log.read_text()
    mine(*arguments, "--out", out)
    mine(*arguments, "--out", tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")
