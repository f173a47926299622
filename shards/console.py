"""What the commands share on the screen: one-line errors, tables that line up, sizes for people."""

import errno
import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

WHAT_TO_DO = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EMFILE: "allow more open files (ulimit -n), or use fewer workers (-j),",
    errno.ENFILE: "close some files",
    errno.ENOMEM: "free some memory, or use fewer workers (-j),",
}


def reports_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors that a person can act on into one line and exit code 1; others keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ValueError as error:  # TicketSetError among them
            from shards.errors import ImageError, TicketSetError

            if not isinstance(error, (TicketSetError, ImageError)):
                raise
            raise click.ClickException(str(error)) from None
        except BrokenPipeError:  # `| head`: click knows what to do
            raise
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            todo = WHAT_TO_DO.get(error.errno or 0)
            hint = f"; what is finished is safe: {todo} and run the same command again" if todo else ""
            raise click.ClickException(f"{where}{error.strerror or error}{hint}") from None
        except MemoryError:
            raise click.ClickException(
                "out of memory; what is finished is safe: free some, or use fewer workers (-j), and run the same"
                " command again"
            ) from None

    return run


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
    return f"{value}"


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
