"""SIGTERM and Ctrl-C during work that is not to be torn: noted at once, obeyed where the work says.

What a handler raises may leave a condition, an event, a future or a semaphore locked for ever: their code is Python, and
the exception may come between any two lines of it. Of some thousand miners that were stopped like that, two never ended.
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
    """What came while it was listened, in the main thread alone: elsewhere nothing is heard, as Python has it.

    Attributes:
        number: of the first signal, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}  # the handlers that were there
        self._outer: Signals | None = None  # one that hears them already
        self._puts_off = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Signals inside are noted, and nothing more; a Ctrl-C later than two seconds after the first ends the process."""
        with self._noted(signal.SIGTERM), self._noted(signal.SIGINT):
            yield

    @contextlib.contextmanager
    def untorn(self) -> Iterator[None]:
        """Handlers of Python's are put off to `check` and to the end, for most raise: an error inside hides no signal.

        A Ctrl-C later than two seconds after the first is put off no longer. Where no handler is, the signal ends the process
        as always, which tears nothing that lives on.
        """
        self._puts_off = True
        try:
            with self._noted(signal.SIGTERM, signal.SIG_DFL), self._noted(signal.SIGINT, signal.SIG_DFL):
                yield
        except Exception:
            self.check()
            raise
        self.check()

    def check(self) -> None:
        """Have what was put off handled now, here or where it was put off around this.

        Raises:
            KeyboardInterrupt: or whatever else the handler raises.
        """
        if self._outer is not None and self._outer._puts_off:
            self._outer.check()
        if self.number:
            number, self.number = self.number, 0
            self._before[number](number, None)

    @contextlib.contextmanager
    def _noted(self, number: int, *left: Any) -> Iterator[None]:
        """One of them, unless `left` says to leave such a handler, it is ignored, or another object notes it already."""
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(number) if main else None
        owner = getattr(handler, "__self__", None)
        if isinstance(owner, Signals) and owner is not self:
            self._outer = owner
        # None: not set by Python, which could not set it again. Ignored: as a shell's background jobs do.
        if handler in (None, signal.SIG_IGN, *left) or isinstance(owner, Signals):
            yield
            return
        self._before[number] = handler
        try:
            signal.signal(number, self._hear)
            yield
        finally:
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
            if self._puts_off:
                self.number = 0
                self._before[number](number, frame)
            else:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)


def in_threads(function: Callable[[A], B], items: Iterable[A], count: int) -> list[B]:
    """What a function gives for each, by some threads; where one fails, or a signal comes, no further one is begun.

    In the main thread a signal is obeyed within a second, once those under way have ended.
    """
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
