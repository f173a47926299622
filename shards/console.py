"""What the commands share on the screen: one-line errors, tables that line up, sizes for people."""

import contextlib
import errno
import functools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from _thread import start_new_thread
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from shards.errors import ImageError, TicketSetError, first_line
from shards.flags import as_flags

# What moves the cursor, colors the screen, ends a line or turns the direction of writing; halves of characters.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_WHAT_TO_DO = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "allow more open files (ulimit -n), or use fewer workers (-j),",
    errno.ENFILE: "close some files",
    errno.ENOMEM: "free some memory, or use fewer workers (-j),",
}


def printable(text: str) -> str:
    """Text of others (names, what an error says of them) for the screen: what acts on a terminal becomes \\x1b or \\u202e."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def ready_screen() -> None:
    """What every command needs before its first word.

    A character that the output's encoding lacks is escaped, in any locale: a name must not stop a run.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by a program that has none, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    quiet_images()


def quiet_images() -> None:
    """Odd EXIF makes Pillow warn at each decoding, though the pixels are right. A spawned worker needs it anew."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors that a person can act on into one line and exit code 1; others keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        ready_screen()
        try:
            with _stops_heard():
                return command(*args, **kwargs)
        except (TicketSetError, ImageError) as error:
            raise _message(str(error)) from None
        except MemoryError as error:
            said = f" ({first_line(error)})" if str(error) else ""
            raise _message(f"out of memory{said}{_goes_on(errno.ENOMEM)}") from None
        except BrokenPipeError:  # `| head`: click knows what to do
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _message(f"{where}{error.strerror or first_line(error)}{_goes_on(error.errno)}") from None

    return run


@contextlib.contextmanager
def _stops_heard() -> Iterator[None]:
    """A stop that is raised where Python ignores it (a weak reference's callback, __del__, a fork's hook) is sent again.

    And an error that comes of one is taken for it: until 3.11 Python makes a RuntimeError of what a class body's hook raises.
    """
    before, inside = sys.unraisablehook, True

    def again(number: int) -> None:
        time.sleep(0.01)  # until what ignores it has ended
        if inside:
            os.kill(os.getpid(), number)

    def hook(ignored: Any) -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            return before(ignored)
        said = ignored.exc_value.args[:1]  # datalth-mine's handler says which signal it was
        number = said[0] if said and isinstance(said[0], signal.Signals) else signal.SIGINT
        start_new_thread(again, (number,))  # no threading.Timer: its locks may be held by what was interrupted here

    sys.unraisablehook = hook
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, KeyboardInterrupt):
            found = found.__cause__ or found.__context__
        if found is not None:
            raise KeyboardInterrupt(*found.args) from None
        raise
    finally:
        sys.unraisablehook, inside = before, False


def _goes_on(number: int | None) -> str:
    """What to do about an error of the machine, which has lost nothing."""
    todo = _WHAT_TO_DO.get(number or 0)
    return f"; what is finished is safe: {todo} and run the same command again" if todo else ""


def _message(text: str) -> click.ClickException:
    """The lines of a list of ours are indented; any other line break is somebody's name."""
    return click.ClickException(as_flags("\n  ".join(map(printable, text.split("\n  ")))))


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Columns that line up; numbers to the right."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*([list(head)] if head else []), *texts, strict=True)]
    right = [all(isinstance(row[i], (int, float)) or row[i] is None for row in rows) for i in range(len(widths))]
    lines = [list(head)] if head else []
    out = []
    for line in [*lines, *texts]:
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True))
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return printable(f"{value}")


def size(count: float) -> str:
    """Bytes for people: 1.4 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """1:02:03, or 4.5 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(count: float, seconds: float, unit: str = "image") -> str:
    """Work done in a time, in words that say something at any speed: 120 images/s, 4.2 images/s, 7.5 s/image."""
    if count <= 0 or seconds <= 0:
        return f"- {unit}s/s"
    speed = count / seconds
    return f"{speed:.{0 if speed >= 100 else 1}f} {unit}s/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output, for programs.")


def print_json(value: Any) -> None:
    """A value for programs."""
    click.echo(json.dumps(value, sort_keys=True, indent=1))  # in ASCII: nothing in it acts on a terminal


def picture_option(required: bool) -> Callable[[Callable[..., Any]], Any]:
    """-o FILE.png"""
    return file_option(".png", "Write the picture here." if required else "Also write a picture here.", required)


def file_option(ending: str, text: str, required: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """-o FILE of one kind; one that could not be written is refused before the work."""

    def check(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
        if path is not None and not path.lower().endswith(ending):
            raise click.BadParameter(f"expected a file that ends in {ending}, got {path}")
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise click.BadParameter(f"{Path(path).parent}: no such folder")
        return path

    return click.option("-o", "--output", required=required, callback=check, metavar=f"FILE{ending}", help=text)


class Finite(click.FloatRange):
    """A number in a range. To click's own, nan lies in every one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = super().convert(value, param, ctx)
        return found if math.isfinite(found) else self.fail(f"{value} is no finite number.", param, ctx)
