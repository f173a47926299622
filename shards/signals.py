"""SIGTERM and Ctrl-C during work that is not to be torn: noted at once, obeyed where the work says.

An exception out of a handler may leave a lock of `threading` or `concurrent.futures` held for ever: they are Python code,
and it can be raised in the middle. Of miners that were stopped like that about one in a thousand never ended.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")
AGAIN = 2.0  # seconds; torchrun hands on to its processes what they had from the terminal too


class Signals:
    """The number of the first that came, or 0; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    @contextlib.contextmanager
    def heard(self, *left: Any) -> Iterator[None]:
        """SIGTERM and SIGINT inside are noted; what heard them before hears them again after. In the main thread alone.

        Args:
            left: a signal with one of these handlers is left to it, as are those that are ignored (as a shell's background
                jobs do) and those that others of this class hear already.
        """
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number, handler in list(before.items()):
            # None: it was not set by Python, which could not set it again.
            if handler in (None, signal.SIG_IGN, *left) or getattr(handler, "__func__", None) is Signals._hear:
                del before[number]
        try:
            for number in before:
                signal.signal(number, self._hear)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Obey.

        Raises:
            KeyboardInterrupt: of the signal that came.
        """
        if self.number:
            raise KeyboardInterrupt(signal.Signals(self.number))

    @contextlib.contextmanager
    def untorn(self) -> Iterator[None]:
        """Where a signal's handler would raise, `check` and the end of it do."""
        with self.heard(signal.SIG_DFL):
            yield
        self.check()

    def _hear(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def in_threads(function: Callable[[A], B], items: Iterable[A], count: int) -> list[B]:
    """What a function gives for each, by some threads; where one fails, or a signal comes, no further one is begun."""
    signals = Signals()
    with signals.untorn(), ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            while (found := wait(futures, 1, FIRST_EXCEPTION)).not_done:
                signals.check()
                for future in found.done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
