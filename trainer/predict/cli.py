"""datalth-predict: a run and photos -> the class of each photo."""

import contextlib
import csv
import io
import os
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click
from click.core import ParameterSource

from miner.settings import DEFAULT_SELECTOR, MASKS, Selection
from shards.console import duration, file_option, printable, rate, reports_errors, table
from shards.errors import TicketSetError
from shards.flags import options_of, setting, settings_from
from shards.signals import Signals

if TYPE_CHECKING:
    from trainer.predict.predictor import Answer

EXAMPLES = """
\b
Examples:
  datalth-predict output/winning photo.jpg
  datalth-predict output/winning photos holiday/*.jpg --top 3 -o classes.csv
  datalth-predict output/winning photos --tickets deit_small --tokens 98
"""
BATCH, LOG_SECONDS, ROWS = 32, 15, 20


@dataclass(frozen=True)
class Picking(Selection):
    """The selector whose tickets are shown too, under mining's names."""

    selector: str | None = setting(
        None,
        flag="--tickets",
        metavar="SELECTOR",
        help="Also predict on the tickets of this timm ViT, as --selector of datalth-mine. One of the flags below is enough to ask for them.",
        shown=DEFAULT_SELECTOR,
    )
    method: str = setting(Selection.method, metavar="NAME", help="How it ranks patches; see datalth-mine --help.")
    keep_rate: float | None = setting(
        None, metavar="R", help="Share of patches kept at each of three stages, instead of --tokens."
    )
    tokens: int | None = setting(
        None, click.IntRange(min=1), "Patches in a ticket.", metavar="K", shown="what the run was tested on"
    )
    masks: ClassVar[None] = None  # type: ignore[misc]  # photos of any place have none

    def __post_init__(self) -> None:
        if self.method == MASKS:
            raise TicketSetError(
                f"`method` {MASKS}: needs true masks, which are of mining; expected one that looks at photos"
            )
        super().__post_init__()


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("run", metavar="RUN")
@click.argument("photos", metavar="PHOTO|DIR...", nargs=-1, required=True)
@file_option(".csv", "Also write all answers here: file, patches, rank, label, probability, error.")
@click.option(
    "--top", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Classes of a photo."
)
@options_of(Picking)
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(min=1),
    default=BATCH,
    show_default=True,
    metavar="N",
    help="Photos a batch.",
)
@click.option(
    "-j", "--workers", type=click.IntRange(min=1), metavar="N", help="Threads that read.  [default: cores, 16 at most]"
)
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.version_option(package_name="datalth")
@click.pass_context
@reports_errors
def main(
    context: click.Context,
    run: str,
    photos: tuple[str, ...],
    output: str | None,
    top: int,
    batch_size: int,
    workers: int | None,
    device: str | None,
    **values: Any,
) -> None:
    """Say of what class photos are, by the best epoch of a run of datalth-train.

    RUN is its folder; photos are files, or folders with all that is below them. A photo that cannot be read is listed
    with its reason, and the exit code is then 1.
    """
    picking = settings_from(Picking, values)
    from miner.models import choose_device
    from trainer.predict.photos import list_photos
    from trainer.predict.predictor import Ticket, Way, Whole, answers
    from trainer.predict.student import open_student

    paths, notes = list_photos(photos)
    place = choose_device(device)
    student = open_student(run)
    ways: list[Way] = [Whole(student, place)]
    if any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in values):
        own = student.views is not None and not picking.tokens and picking.keep_rate is None
        if own and student.views:
            picking = replace(picking, tokens=student.views.tokens)
        ways.append(Ticket(student, picking, place, batch_size, varying=own))
    for note in notes:
        click.echo(printable(f"note: {note}"), err=True)
    threads = workers or min(os.cpu_count() or 1, 16)
    found = shown(answers(student, ways, paths, place, batch_size, threads, top), len(paths))
    if output is not None:  # before the first line, which `| head` may end
        from shards.storage import write_atomic

        write_atomic(Path(output), as_csv(found).encode("utf-8", "backslashreplace"))
    click.echo(as_table(found if output is None else found[:ROWS], top, len(ways)))
    if output is not None:
        more = f" (the first {ROWS} above)" if len(found) > ROWS else ""
        click.echo("\n" + printable(f"{output}: {len(found)} photos{more}"))
    if len(ways) > 1:
        click.echo(agreement(found), err=True)
    failed = [answer for answer in found if answer.error]
    if failed:
        first = f"{failed[0].path}: {failed[0].error}"
        click.echo(printable(f"{len(failed)} of {len(found)} photos have no class (first: {first})"), err=True)
        sys.exit(1)


def shown(batches: "Generator[list[Answer], None, None]", total: int) -> "list[Answer]":
    """All answers, with a bar on a terminal and a line now and then elsewhere."""
    from tqdm import tqdm

    found: list[Answer] = []
    start = said = time.monotonic()
    terminal = sys.stderr.isatty()
    stops = Signals()
    bar = tqdm(total=total, unit="photo", leave=False, disable=not terminal)
    with stops.untorn(), contextlib.closing(batches), bar:
        for batch in batches:
            stops.check()
            found += batch
            bar.update(len(batch))
            now = time.monotonic()
            if not terminal and now - said > LOG_SECONDS:
                said, speed = now, rate(len(found), now - start, "photo")
                left = duration((total - len(found)) * (now - start) / len(found))
                click.echo(f"{len(found)}/{total} photos, {speed}, left {left}", err=True)
    return found


Line = tuple[str, str, int | None, str | None, float | None, str | None]
HEAD = ["file", "patches", "rank", "label", "probability", "error"]


def lines(found: "Sequence[Answer]") -> list[Line]:
    """What HEAD names, a line for every class of every photo in every way; one for a photo without."""
    out: list[Line] = []
    for answer in found:
        for patches, classes in answer.classes.items():
            out += [(answer.path, patches, rank, *each, None) for rank, each in enumerate(classes, 1)]
        if answer.error:
            out.append((answer.path, "", None, None, None, answer.error))
    return out


def as_csv(found: "Sequence[Answer]") -> str:
    """All columns, for programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    for path, patches, rank, label, share, error in lines(found):
        writer.writerow([path, patches, rank, label, None if share is None else f"{share:.6f}", error])
    return text.getvalue()


def as_table(found: "Sequence[Answer]", top: int, ways: int) -> str:
    """For people: the columns in which lines differ."""
    failed = any(answer.error for answer in found)
    columns = [0, *([1] if ways > 1 else []), *([2] if top > 1 else []), 3, 4, *([5] if failed else [])]
    rows = [["" if i == 5 and line[i] is None else line[i] for i in columns] for line in lines(found)]
    return table(rows, [HEAD[i] for i in columns])


def agreement(found: "Sequence[Answer]") -> str:
    """What tickets cost, in a line."""
    pairs = [[classes[0][0] for classes in answer.classes.values()] for answer in found if not answer.error]
    same = sum(of_all == of_ticket for of_all, of_ticket in pairs)
    return f"on tickets the class is the same as on all patches for {same} of {len(pairs)} photos"


if __name__ == "__main__":
    main()
