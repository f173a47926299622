"""The acceptance of a GPU: parts in boxes of time, the most telling first; a row is in the file as soon as its part is over."""

import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu import correct, flow, speed
from benchmarks.gpu.bench import SIZES, Bench
from benchmarks.rounds import RESULTS, Part, Row, save
from miner.models import choose_device
from shards.errors import TicketSetError, first_line
from shards.flags import as_flags

Measure = Callable[[Bench, list[str]], Iterator[Row]]  # rows as they are found; notes go to the list
PARTS: dict[str, tuple[float, Measure]] = {  # seconds of its box
    "card": (45, correct.card),
    "rankings": (25, correct.rankings),
    "bytes": (60, correct.bytes_again),
    "training": (50, correct.training),
    "steps": (60, speed.steps),
    "rivals": (40, speed.rivals),
    "mining": (90, flow.mining),
    "feed": (60, flow.feed),
    "masks": (15, speed.masks),
    "kernels": (20, speed.kernels),
    "ddp": (20, speed.ddp),
    "compile": (75, speed.compiled),
}


class OutOfTime(BaseException):
    """A part's box is full; no `except Exception` on the way may swallow it."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS]), metavar="[PART]...")
@click.option("--device", default="cuda", show_default=True, help="cuda, cpu.")
@click.option("--size", type=click.Choice([*SIZES]), default="full", show_default=True, help="toy: to try it on a CPU.")
@click.option("--seconds", default=420.0, show_default=True, help="No part begins or goes on after so long.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, envvar="DATALTH_GPU_OUT", help="Of gpu.json.")
def main(parts: tuple[str, ...], device: str, size: str, seconds: float, out: Path) -> None:
    """Measure PARTs, all of them by default, in this order: card, rankings, bytes, training, steps, rivals, mining, feed,
    masks, kernels, ddp, compile.

    Exit code 1: a threshold was missed, or a part failed or was stopped: what was not measured is not accepted.
    """
    started, found = time.perf_counter(), Part()
    os.environ["HF_HUB_OFFLINE"] = "1"  # weights are random; nobody is asked for others
    warnings.simplefilter("ignore")
    try:
        chosen = choose_device(device, ("cuda", "cpu"))
    except TicketSetError as error:
        raise click.ClickException(as_flags(str(error))) from None
    work = Path(tempfile.mkdtemp(prefix="datalth-gpu-"))
    bench = Bench(chosen, SIZES[size], work)
    command = f"python -m benchmarks gpu --device {device} --size {size}"
    whole = True
    try:
        for name in parts or PARTS:
            box, measure = PARTS[name]
            begun, before = time.perf_counter(), len(found.rows)
            left = started + seconds - begun
            said = take(found, name, measure, bench, min(box * bench.size.patience, left))
            whole = whole and not said
            save("gpu", found, command, out)
            print(line(name, found.rows[before:], time.perf_counter() - begun, said), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    sys.exit(0 if whole and not any(missed(row) for row in found.rows) else 1)


def take(found: Part, name: str, measure: Measure, bench: Bench, seconds: float) -> str:
    """Collect a part's rows; says why it ended early, or nothing. The rows that it had by then are kept."""
    said = ""
    try:
        with limited(seconds):
            for row in measure(bench, found.notes):
                row.what = f"{name}: {row.what}"
                found.rows.append(row)
    except OutOfTime:
        said = f"stopped after {max(0, seconds):.0f} s"
    except Exception as error:
        said = f"failed: {type(error).__name__}: {first_line(error) if str(error) else ''}"
    found.notes += [f"{name}: {said}"] if said else []
    return said


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """
    Raises:
        OutOfTime: in the main thread, once they are over.
    """
    if seconds <= 0:
        raise OutOfTime

    def over(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def missed(row: Row) -> bool:
    return row.as_json().get("reached") is False


def line(name: str, rows: list[Row], seconds: float, said: str) -> str:
    """What is printed of a part."""
    short = [row.as_json() for row in rows if missed(row)]
    misses = "; ".join(f"{entry['what']} {entry['median']:g} ({entry['wanted']})" for entry in short)
    parts = [f"{name}: {seconds:.0f} s, {len(rows)} rows", said, misses and f"MISSED {misses}"]
    return ", ".join(part for part in parts if part)
