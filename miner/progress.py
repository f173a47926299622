"""What a person sees while a set is mined: the resolved plan, progress, and a summary with the next command."""

import math
import shlex
import shutil
import statistics
import sys
import time
from typing import Any

import click
import numpy as np

from miner.job import Progress
from miner.sources import Source
from shards.console import duration, printable, rate, size, table
from shards.errors import TicketSetError
from shards.flags import as_flags
from shards.reader import TicketSet, resolve_base
from shards.schema import Plan, SelectorIdentity
from shards.store import Store

LOG_SECONDS = 15  # between plain log lines
MEGAPIXELS_TO_RECOMMEND = 2.0
QUALITIES, BITS = (1, 50, 75, 85, 90, 95, 100), (0.5, 1.0, 1.5, 2.0, 2.6, 3.8, 8.0)  # a pixel of photos, 4:4:4


def show_plan(plan: Plan, source: Source, store: Store, device: str, mined: list[str]) -> None:
    """Print what is about to happen."""
    common, selector, n = plan.common, plan.common.selector, plan.common.num_patches
    how = selector.method
    if selector.model:
        blocks = ", ".join(map(str, selector.blocks))
        how += f" of {selector.model} at block{'s' if ',' in blocks else ''} {blocks}, {selector.input_size} px"
    rows: list[list[object]] = [["source", source.spec]]
    for name in mined:
        split = plan.splits[name]
        rows.append(["", f"{name}: {split.images} images, {split.views} views each, {split.shards} shards"])
    rows += [["", f"note: {note}"] for note in source.notes]
    if source.base:
        rows.append(["base", f"{source.base.url}: views, seed and sizes are inherited; images: {common.images}"])
    rows += [
        ["classes", len(source.classes) or "none: unlabeled"],
        ["selector", how],
        *_ranked_views(plan, source),
        ["tickets", f"K = {common.k} of {n} patches ({common.k / n:.1%}){_rate(selector)}" if common.k else "none"],
    ]
    if labels := common.token_labels:
        places = f"{labels.grid[0]} x {labels.grid[1]} places"
        rows.append(["token labels", f"{places}, by {labels.model} at {labels.input_size} px"])
    rows += [
        ["device", f"{device}, {(common.token_labels or selector).dtype}"],
        ["output", f"{store}, about {size(expected_bytes(plan, source, mined))}"],
    ]
    click.echo(as_flags(table([[str(v) for v in row] for row in rows])))


def _ranked_views(plan: Plan, source: Source) -> list[list[object]]:
    """What is stored of each view, and which pixels its ranking is of."""
    common, ranked = plan.common, plan.common.ranked
    if ranked is None:
        return []
    n = common.num_patches
    stored = f"all {n}" if ranked.tokens == n else f"the best {ranked.tokens} of {n}"
    rows: list[list[object]] = [["ranked views", f"{stored} patches of a view, JPEG quality {ranked.quality}"]]
    mined = "mined on the pixels that are stored"
    if not ranked.decoded:
        assert source.tickets is not None
        same = common.token_labels and common.token_labels == source.tickets.labeler
        rows.append(["", f"rankings{' and token labels' if same else ''} are kept from {source.spec}"])
        mined = "mined on undecoded pixels: on those stored here a few patches may rank differently"
    if common.selector.input_size:  # else the selector looked at no pixels
        rows.append(["", mined])
    return rows


def _rate(selector: SelectorIdentity) -> str:
    rate, stages = selector.keep_rate, len(selector.counts)
    return "" if rate is None else f", keep rate {rate:g} at each of {stages} stages"


def expected_bytes(plan: Plan, source: Source, mined: list[str]) -> int:
    """Images as they are or ranked views, and per sample the ranking, the boxes, the token labels and their tar blocks."""
    total, common = 0, plan.common
    for name in mined:
        split, listed = plan.splits[name], source.splits[name]
        members = 3 * 1024 + split.views * (common.num_patches + 20) if common.k else 1024
        if common.token_labels:
            members += 1024 + 4 * math.prod((common.token_labels.top, *common.token_labels.grid))
        images = 0
        if common.images == "copy":
            known = [s for s in listed["size"].to_pylist() if s > 0]
            images = round(statistics.fmean(known)) + 768 if known else 0
        if ranked := common.ranked:
            bits = np.interp(ranked.quality, QUALITIES, BITS)
            images = split.views * round(ranked.tokens * ranked.cell**2 * bits / 8) + 768
        total += split.images * (members + images)
    return total


class ProgressBar(Progress):
    """Progress that a person sees: a bar on a terminal, plain lines elsewhere.

    Args:
        total: images to mine.
        max_failures: of them that may fail.
        shown: else nothing is seen of it, as of other ranks than the first.

    Attributes:
        workers: at work for this process, which mines nothing itself; None where it does.
    """

    def __init__(self, total: int, max_failures: float, shown: bool = True) -> None:
        super().__init__(max_failures)
        self._total, self._start, self._shown = total, time.monotonic(), time.monotonic()
        self._bar, self._quiet = None, not shown
        self._elsewhere, self._their_shards = 0, 0
        self.workers: int | None = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            columns = shutil.get_terminal_size().columns  # 80 where a terminal does not say
            bar = "{percentage:3.0f}%|{bar:20}| " if columns >= 110 else "{percentage:3.0f}% "
            rest = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            self._bar = tqdm(total=total, unit="im", ncols=columns, bar_format=bar + rest)

    def others(self, images: int, shards: int) -> None:
        """Take in what other workers have done meanwhile: images of finished shards; and the shards they are at."""
        self._elsewhere, self._their_shards = images, shards

    def changed(self) -> None:
        """Show what was counted. See `Progress.changed`."""
        super().changed()
        if self._quiet:
            return
        now, images = time.monotonic(), self.images + self._elsewhere
        detail = f"{rate(self.views, now - self._start, 'view')}, failed {self.failures}"
        if self._their_shards:
            detail = f"{self._their_shards} shards at work elsewhere, here {detail}"
        if self.workers is not None:
            detail = f"{self.workers} workers, {detail}"
        shares = waiting_shares(self).items()
        if self._bar is not None:
            brief = " ".join(f"{leg[0]}{100 * share:.0f}" for leg, share in shares)
            self._bar.set_postfix_str(f"{detail}, wait {brief}", refresh=False)
            self._bar.update(images - self._bar.n)
        elif now - self._shown > LOG_SECONDS:
            self._shown = now
            taken = now - self._start
            left = duration((self._total - images) * taken / images) if images else "?"
            waits = " ".join(f"{leg} {share:.0%}" for leg, share in shares)
            click.echo(
                f"mining {images}/{self._total} images ({images / self._total:.0%}), {rate(images, taken)},"
                f" left {left}, {detail}, waiting: {waits}",
                err=True,
            )

    def close(self) -> None:
        """Leave the line of the bar."""
        if self._bar is not None:
            self._bar.close()


def waiting_shares(progress: Progress) -> dict[str, float]:
    """Of the time that the main thread spent in reading, selecting and writing, each one's share."""
    total = sum(progress.waited.values()) or 1.0
    return {leg: seconds / total for leg, seconds in progress.waited.items()}


def show_summary(store: Store, seconds: float, progress: Progress, who: str = "mined", advice: bool = True) -> None:
    """Print what was written, what deserves attention, and what to type next.

    Args:
        advice: say what deserves attention: it takes the index of every shard to be read.
    """
    opened = TicketSet.open(store.url, images=False)
    manifest = opened.manifest
    if progress.images:
        waits = ", ".join(f"{leg} {share:.0%}" for leg, share in waiting_shares(progress).items())
        click.echo(
            f"{who} {progress.images} images, {progress.views} views in {duration(seconds)}:"
            f" {rate(progress.images, seconds)}, {rate(progress.views, seconds, 'view')} (waiting: {waits})"
        )
    head = ["split", "samples", "failed", "views", "shards", "size"]
    rows = [[name, s.samples, s.failed, s.views, s.shards, size(s.bytes)] for name, s in manifest.splits.items()]
    click.echo(table(rows, head))
    for line in _advice(opened) if advice else []:
        click.echo(as_flags(printable(line)))
    where = shlex.quote(store.url)
    base = manifest.base
    if base:
        try:
            resolve_base(store.url, base.path)
        except TicketSetError:  # no reader follows a manifest to another store by itself
            where += f" --base {shlex.quote(base.path)}"
    look = f"datalth-shards sheet {where} -o sheet.png, then " if opened.has_tickets else ""
    click.echo(printable(f"next: {look}datalth-shards verify {where} --deep"))


def _advice(opened: TicketSet) -> list[str]:
    lines = []
    columns = ["status", "source", "error", "orientation", "width", "height"]
    rows: dict[str, list[Any]] = {name: [] for name in columns}
    for split in opened.splits:
        table_ = opened.table(split)
        for name in columns:
            rows[name] += table_[name].to_pylist()
    failed = [(s, e) for st, s, e in zip(rows["status"], rows["source"], rows["error"], strict=True) if st != "ok"]
    if failed:
        lines.append(
            f"{len(failed)} images failed (first: {failed[0][0]}: {failed[0][1]}); `retry_failed` mines them again"
        )
    turned = sum(o not in (None, 1) for o in rows["orientation"])
    if turned and opened.exif == "ignore" and opened.manifest.base is None:
        lines.append(
            f"{turned} images carry an EXIF orientation that was ignored; for upright photos mine with `exif` apply"
        )
    pixels = [w * h for w, h in zip(rows["width"], rows["height"], strict=True) if w]
    megapixels = statistics.median(pixels) / 1e6 if pixels else 0
    if megapixels > MEGAPIXELS_TO_RECOMMEND and opened.manifest.base is None:
        lines.append(
            f"the median image has {megapixels:.1f} megapixels, decoded in every epoch; `store_side` 512 makes training cheaper"
        )
    return lines
