"""SIGTERM and Ctrl-C while a run trains: the step under way is finished and saved, whichever comes."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

AGAIN = 2.0  # seconds; torchrun hands on to its processes what they had from the terminal too


class Signals:
    """The number of the first that came, or 0; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """SIGTERM and SIGINT inside are noted; what heard them before hears them again after."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
