"""One try, watched: what it raised and printed, how long it took, how much memory, and which files it opened."""

import contextlib
import importlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from shards.errors import ImageError, TicketSetError

SECONDS, GROWTH = 10, 1 << 30
# C0 but for tab and newline, C1, and what turns a line round: none of these may reach a terminal.
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
# What a command opens besides the set: Python and its packages, the system's, this project.
ALLOWED = tuple(
    map(str, (sys.prefix, sys.base_prefix, Path(__file__).parents[2], "/usr", "/lib", "/proc", "/sys", "/dev"))
)


@dataclass
class Case:
    """What became of one try; `fault` is empty where the promise held."""

    title: str
    use: str
    outcome: str  # refused, or went through
    fault: str = ""


class _TooLong(Exception):
    """Not an OSError, as TimeoutError is: nothing may take it for the data's."""


class Watch:
    """Runs things in this process under bounds of time, memory and files."""

    def __init__(self) -> None:
        self._opened: list[str] | None = None
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGALRM, self._late)

    def command(self, title: str, use: str, module: str, arguments: list[str], place: Path) -> Case:
        """A command line: exit code 0, or 1 or 2 with words."""
        main = importlib.import_module(module).main
        result: Any = None

        def invoke() -> None:
            nonlocal result
            result = CliRunner().invoke(main, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception

        case = self.call(title, use, invoke, place)
        if case.fault or result is None:
            return case
        case.outcome = "went through" if result.exit_code == 0 else "refused"
        if "Traceback" in result.output:
            case.fault = f"traceback printed: {result.output[-600:]}"
        elif result.exit_code and not result.output.strip():
            case.fault = f"exit code {result.exit_code} without a word"
        elif result.exit_code not in (0, 1, 2):
            case.fault = f"exit code {result.exit_code}: {result.output[-200:]}"
        elif found := RAW.search(result.output.replace("\r", "")):
            case.fault = f"raw control character {found[0]!r} in {result.output[max(0, found.start() - 80) : found.end() + 20]!r}"
        return case

    def call(self, title: str, use: str, action: Callable[[], Any], place: Path) -> Case:
        """A call of the library: a result, TicketSetError, or ImageError."""
        case = Case(title, use, "went through")
        before = _reset_peak()
        started = time.monotonic()
        try:
            with self._watching() as opened:
                action()
        except (TicketSetError, ImageError) as error:
            case.outcome = "refused"
            if "\n" in str(error):
                case.fault = f"more than a line: {error!r}"
        except OSError:  # the command line makes a line of it
            case.outcome = "refused"
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            case.outcome = "fault"
            case.fault = "".join(traceback.format_exception(error))[-1800:]
        seconds, growth = time.monotonic() - started, _peak() - before
        allowed = (*ALLOWED, str(place.parent.parent))
        strange = [path for path in opened if not os.path.abspath(path).startswith(allowed)]
        if not case.fault and seconds > SECONDS:
            case.fault = f"took {seconds:.0f} s"
        elif not case.fault and growth > GROWTH:
            case.fault = f"took {growth >> 20} MiB"
        elif not case.fault and strange:
            case.fault = f"opened {strange[0]}"
        return case

    @contextlib.contextmanager
    def _watching(self) -> Iterator[list[str]]:
        self._opened = opened = []
        signal.alarm(3 * SECONDS)
        try:
            yield opened
        finally:
            signal.alarm(0)
            self._opened = None

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._opened is not None and event == "open" and isinstance(arguments[0], str):
            self._opened.append(arguments[0])
        elif self._opened is not None and event == "socket.connect":
            self._opened.append("/a socket")  # nobody asked for one

    @staticmethod
    def _late(number: int, frame: Any) -> None:
        raise _TooLong("".join(traceback.format_stack(frame)[-6:]))


def _peak() -> int:
    """Peak resident bytes since the last reset; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()
