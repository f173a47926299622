"""datalth-shards: look at a ticket set and check it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.console import (
    duration,
    file_option,
    json_option,
    picture_option,
    print_json,
    printable,
    reports_errors,
    size,
    table,
)
from shards.errors import TicketSetError

if TYPE_CHECKING:  # --help needs neither numpy nor pyarrow
    from shards.reader import TicketSet
    from shards.sample import Sample
    from shards.schema import SplitStats

_folder = click.argument("folder", metavar="DIR")
_base = click.option("--base", metavar="DIR", help="Where the base of a linked set is now.")
_split = click.option("--split", metavar="S", help="Which split.  [default: the first]")


def _open(folder: str, base: str | None = None, images: bool = True) -> "TicketSet":
    from shards.reader import TicketSet

    return TicketSet.open(folder, base, images)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="datalth")
def main() -> None:
    """Look at a ticket set and check it. DIR is its folder, or an fsspec URL of one.

    \b
    Examples:
      datalth-shards info shards
      datalth-shards sheet shards -o sheet.png
      datalth-shards verify shards --deep
    """


@main.command()
@_folder
@_base
@json_option
@reports_errors
def info(folder: str, base: str | None, as_json: bool) -> None:
    """What a set is: selector, tickets, grid, classes, splits, sizes.

    \b
    Example: datalth-shards info shards
    """
    opened = _open(folder, base)
    manifest = opened.manifest
    if as_json:
        print_json(manifest.to_json())
        return
    selector = manifest.selector
    rate = selector.keep_rate
    rows = [
        ["ticket set", opened.url],
        ["format", ".".join(map(str, manifest.format))],
        ["set_id", manifest.set_id[:16]],
        ["plan_id", manifest.plan_id[:16]],
        ["selector", selector.method + (f" of {selector.model}" if selector.model else "")],
        [
            "",
            f"blocks {', '.join(map(str, selector.blocks))}, {selector.dtype}" if selector.blocks else "model-free",
        ],
        [
            "tickets",
            f"K = {opened.k} of {opened.num_patches} patches" + (f", keep rate {rate:g} a stage" if rate else "")
            if opened.has_tickets
            else "none: token labels alone",
        ],
        *_token_labels_row(opened),
        ["grid", f"{opened.grid[0]} x {opened.grid[1]}, {manifest.img_size} px, patch {manifest.patch_size}"],
        ["classes", f"{len(opened.classes)}" if opened.classes else "none: unlabeled"],
        ["images", _images_text(opened)],
        *_ranked_row(opened),
    ]
    click.echo(table(rows))
    click.echo()
    pixels = "ranked views" if manifest.ranked else "images"
    head = ["split", "samples", "failed", "views", "shards", "size", pixels, "tickets a sample"]
    click.echo(table([_split_row(name, s, opened) for name, s in manifest.splits.items()], head))


def _token_labels_row(opened: "TicketSet") -> list[list[str]]:
    from shards import token_labels

    owner = opened if opened.has_token_labels else opened.base
    said = owner.manifest.token_labels if owner and owner.has_token_labels else None
    if owner is None or said is None:
        return []
    _, top, rows, columns = token_labels.shape(len(owner.classes), said.grid[0])
    text = f"top {top} at {rows} x {columns} places, {said.model} at {said.input_size} px"
    return [["token labels", text + ("" if owner is opened else f", in {owner.url}")]]


def _images_text(opened: "TicketSet") -> str:
    text = "inside" if opened.base is None else f"linked from {opened.base.url}"
    text = "none: ranked views in their place" if opened.manifest.ranked else text
    store_side = opened.manifest.store_side
    return f"{text}, EXIF orientation: {opened.exif}" + (f", stored at {store_side} px" if store_side else "")


def _ranked_row(opened: "TicketSet") -> list[list[str]]:
    said = opened.manifest.ranked
    if said is None:
        return []
    views = sum(split.samples * split.views for split in opened.manifest.splits.values())
    seen = "as the selector saw them" if said.decoded else "the selector saw them before they were stored"
    text = f"quality {said.quality}, {said.tokens} of {opened.num_patches} patches stored, {seen}"
    return [["ranked views", f"{text}; {size(opened.manifest.totals.image_bytes / max(1, views))} each"]]


def _split_row(name: str, split: "SplitStats", opened: "TicketSet") -> list[object]:
    extra = (split.bytes - split.image_bytes) / max(1, split.samples)
    counts = [split.samples, split.failed, split.views, split.shards]
    return [name, *counts, size(split.bytes), size(split.image_bytes), size(extra)]


@main.command()
@_folder
@_base
@click.option("--split", metavar="S", help="Only this split.")
@click.option("--label", metavar="NAME|NUMBER", help="Only this class.")
@click.option("--status", type=click.Choice(["ok", "failed"]), help="Only samples that succeeded, or failed.")
@click.option(
    "-n", "--limit", type=click.IntRange(min=0), metavar="N", help="Rows; 0: all.  [default: 20; all with --json]"
)
@json_option
@reports_errors
def ls(
    folder: str,
    base: str | None,
    split: str | None,
    label: str | None,
    status: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Rows of the index, one per input image, failures too; --json gives one object a line.

    \b
    Example: datalth-shards ls shards --split train --status failed
    """
    opened = _open(folder, base)
    wanted = None if label is None else _label_number(opened, label)
    limit = limit if limit is not None else 0 if as_json else 20
    rows: list[dict[str, Any]] = []
    total = 0
    for name in [split] if split else opened.splits:
        for row in opened.table(name).to_pylist():
            if (wanted is None or row["label"] == wanted) and status in (None, row["status"]):
                total += 1
                if not limit or len(rows) < limit:
                    rows.append({"split": name, **row})
    if as_json:
        for row in rows:
            click.echo(json.dumps(_without_bytes(opened, row)))
        return
    head = ["split", "key", "class", "width", "height", "status", "entropy", "error"]
    cells = [
        [r["split"], r["key"], opened.class_name(r["label"]), *(r[name] for name in head[3:7]), r["error"] or ""]
        for r in rows
    ]
    click.echo(table(cells, head))
    if total > len(rows):
        click.echo(f"{len(rows)} of {total} rows; -n 0 lists all")


def _without_bytes(opened: "TicketSet", row: dict[str, Any]) -> dict[str, Any]:
    """A row of the index as JSON has it: bits in hexadecimal, counts [V, 7] as lists."""
    from shards import spread

    row["ticket"] = row["ticket"].hex() if row["ticket"] else None
    if row.get("spread") is not None:
        views = len(row["spread"]) // spread.size(1, opened.num_patches)
        row["spread"] = spread.decode([row["spread"]], views, opened.num_patches)[0].tolist()
    return row


def _label_number(opened: "TicketSet", label: str) -> int:
    if label in opened.classes:
        return opened.classes.index(label)
    if label.isdecimal() and len(label) < 10 and int(label) < len(opened.classes):
        return int(label)
    raise TicketSetError(f"--label {label}: expected a class name or a number below {len(opened.classes)}")


@main.command()
@_folder
@click.argument("key", metavar="KEY|FILE")
@_base
@click.option("--split", metavar="S", help="Needed where a key stands in several splits.")
@picture_option(required=False)
@json_option
@reports_errors
def show(folder: str, key: str, base: str | None, split: str | None, output: str | None, as_json: bool) -> None:
    """One image, by its key or by the file that it was mined from: its row, its views, and their tickets; as a picture
    with -o.

    \b
    Examples:
      datalth-shards show shards train/bird/000_owl
      datalth-shards show shards photos/train/bird/000_owl.jpg -o owl.png
    """
    from shards.format import VIEW_COLUMNS

    opened = _open(folder, base)
    if output:
        opened.require_tickets()
    split, row = opened.find(key, split)
    row = _without_bytes(opened, row)
    sample = next(opened.stream_shard(row["shard"], {row["key"]}), None)
    views = [] if sample is None else sample.views.tolist()
    tickets = [] if sample is None else sample.tickets.tolist()
    center = [] if sample is None else _center_classes(opened, sample)
    if output and sample is not None:  # before the first line: `| head` ends the command
        from shards.inspect.pictures import sample_page

        sample_page(opened, sample).save(output, "PNG")
    if as_json:
        named = [dict(zip(VIEW_COLUMNS, view, strict=True)) for view in views]
        named_row = {"split": split, **row, "class": opened.class_name(row["label"])}
        content = {**named_row, "views": named, "tickets": tickets}
        print_json(content | {"center_classes": center} if center else content)
    else:
        likeliest = {"center": ", ".join(f"{name} {share:.3f}" for name, share in center) or None}
        cells = {"split": split, **row, **likeliest, "ticket": None, "spread": None}  # they say little to a person
        if row["label"] is not None:
            cells["label"] = f"{row['label']} ({opened.class_name(row['label'])})"
        click.echo(table([[name, _short(value)] for name, value in cells.items() if value is not None]))
        click.echo()
        heads = [" ".join(map(str, ticket[:8])) + " ..." if ticket else "-" for ticket in tickets]
        rows = [[i, *view, heads[i]] for i, view in enumerate(views)]
        click.echo(table(rows, ["view", *VIEW_COLUMNS, "ticket, most informative first"]))
    if output and sample is None:
        raise TicketSetError(f"{key}: failed ({row['error']}); there is nothing to draw")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _center_classes(opened: "TicketSet", sample: "Sample") -> list[tuple[str, float]]:
    """(class, probability) at the place in the middle of the image, likeliest first; empty without token labels."""
    from shards import token_labels

    if sample.token_labels is None:
        return []
    middle = sample.token_labels[:, :, sample.token_labels.shape[2] // 2, sample.token_labels.shape[3] // 2]
    return [(opened.classes[number], units / token_labels.UNIT) for units, number in middle.T.tolist()]


@main.command()
@_folder
@_base
@_split
@picture_option(required=True)
@click.option(
    "--classes", type=click.IntRange(min=1), default=10, show_default=True, help="Classes shown, spread over all."
)
@click.option("--per-class", type=click.IntRange(min=1), default=3, show_default=True, help="Images of each.")
@reports_errors
def sheet(folder: str, base: str | None, split: str | None, output: str, classes: int, per_class: int) -> None:
    """Contact sheet: images of several classes, each with its ticket beside it.

    \b
    Example: datalth-shards sheet shards --split val -o sheet.png
    """
    from shards.inspect.pictures import contact_sheet

    opened = _open(folder, base)
    opened.require_tickets()
    picture, shown = contact_sheet(opened, split or opened.splits[0], classes, per_class)
    picture.save(output, "PNG")
    click.echo(f"{printable(output)}: {shown}")


@main.command()
@click.argument("folders", metavar="SET...", nargs=-1, required=True)
@_base
@_split
@file_option(".html", "Write the page here.", required=True)
@click.option("--images", type=click.IntRange(min=1), default=60, show_default=True, metavar="N", help="Images shown.")
@reports_errors
def explore(folders: tuple[str, ...], base: str | None, split: str | None, output: str, images: int) -> None:
    """A page for the browser, in one file: images by class, their patches lit and dimmed by a slider.

    Several sets of the same images stand side by side, with their overlap.

    \b
    Example: datalth-shards explore shards random -o explore.html
    """
    from shards.inspect.explore import explore as page
    from shards.storage import write_atomic

    sets = [_open(folder, base) for folder in folders]
    content, shown = page(sets, split or sets[0].splits[0], images)
    write_atomic(Path(output), content)
    click.echo(f"{printable(output)}: {shown} images, {size(len(content))}")


@main.command()
@_folder
@_base
@_split
@picture_option(required=False)
@json_option
@reports_errors
def stats(folder: str, base: str | None, split: str | None, output: str | None, as_json: bool) -> None:
    """Where tickets lie (overall and per class), how sure the selector was, what failed.

    \b
    Example: datalth-shards stats shards -o where.png
    """
    from shards.inspect.stats import statistics

    opened = _open(folder, base)
    found = statistics(opened, split or opened.splits[0])
    if output:  # before the first line, as in `show`
        from shards.inspect.pictures import frequency_maps

        frequency_maps(found).save(output, "PNG")
    if as_json:
        print_json(found)
    else:
        click.echo(table(_statistics_rows(found)))
        click.echo("\nhow often a patch is in the ticket of view 0, in %:")
        click.echo("\n".join(" ".join(f"{round(f * 100):3d}" for f in row) for row in found["frequency"]))


def _statistics_rows(found: dict[str, Any]) -> list[list[object]]:
    cells = [share for row in found["frequency"] for share in row]
    k, n, entropy, sure = found["k"], found["n"], found["entropy"], "-"
    if entropy is not None:
        sure = "mean {mean:.2f}, 5 % {p5:.2f}, median {p50:.2f}, 95 % {p95:.2f}".format(**entropy)
    return [
        ["split", found["split"]],
        ["samples", f"{found['samples']} ({found['failed']} failed)"],
        ["tickets", f"K = {k} of {n} ({k / n:.1%})"],
        ["patch frequency", f"{min(cells):.3f} to {max(cells):.3f}; the same everywhere would be {k / n:.3f}"],
        ["entropy, bits", sure],
        *(["failed", f"{count} x {reason}"] for reason, count in found["errors"].items()),
    ]


@main.command()
@_folder
@_base
@click.option("--deep", is_flag=True, help="Also hash the tars, decode every image and check every sample.")
@click.option("--base-too", is_flag=True, help="Of a linked set: check the base in the same way.")
@json_option
@reports_errors
def verify(folder: str, base: str | None, deep: bool, base_too: bool, as_json: bool) -> None:
    """Check a set against what it says of itself. Exit code 1 where something is wrong.

    \b
    Example: datalth-shards verify shards --deep
    """
    import time

    from shards import verify as checks

    start = time.monotonic()
    opened = _open(folder, base)
    if base_too and opened.base is None:
        raise TicketSetError(f"--base-too: {folder} is not linked; its images are its own")
    shards = opened.manifest.totals.shards
    of_base = opened.base.manifest.totals.shards if opened.base and base_too else 0
    with click.progressbar(
        length=shards + of_base, label="verifying", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        problems = checks.verify(opened, deep, lambda name: bar.update(1), base_too)
    unread = opened.base.url if deep and opened.base and not base_too else None
    if as_json:
        print_json({"folder": folder, "deep": deep, "shards": shards, "problems": problems, "base_not_hashed": unread})
    else:
        for problem in problems:
            click.echo(printable(problem))
        samples = opened.manifest.totals.samples
        kind = "deep" if deep else "fast"
        verdict = f"{len(problems)} problems" if problems else "sound"
        click.echo(
            f"{printable(folder)}: {verdict} ({kind}: {shards} shards, {samples} samples, {duration(time.monotonic() - start)})"
        )
        if unread:
            click.echo(f"the tars of its base {printable(unread)} were not hashed; --base-too checks them")
    if problems:
        sys.exit(1)


@main.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@_split
@json_option
@reports_errors
def diff(a: str, b: str, split: str | None, as_json: bool) -> None:
    """How much the tickets of two sets agree, beside what random ones would.

    \b
    Example: datalth-shards diff shards shards-r.7
    """
    from shards.inspect.compare import overlap

    set_a, set_b = _open(a, images=False), _open(b, images=False)
    found = overlap(set_a, set_b, split or set_a.splits[0])
    if as_json:
        print_json(found)
        return
    click.echo(
        f"split {printable(found['split'])}: K = {found['k'][0]} and {found['k'][1]} of {found['n']}; {found['images']} images in both,"
        f" {found['only_a']} only in A, {found['only_b']} only in B, {found['other_views']} views have other boxes"
    )
    rows: list[list[object]] = [[str(v["view"]), v["count"], v["overlap"], v["iou"]] for v in found["views"]]
    rows.append(["random", None, found["random"]["overlap"], found["random"]["iou"]])
    click.echo(table(rows, ["view", "images", "overlap", "IoU"]))


@main.command()
@_folder
@_split
@click.option(
    "--masks",
    required=True,
    metavar="DIR",
    help="PNG masks, white on the object: DIR/train/bird/x.png for train/bird/x.jpg.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="K",
    help="K to score (repeatable).  [default: 25 %, 50 %, the set's own]",
)
@json_option
@reports_errors
def score(folder: str, split: str | None, masks: str, tokens: tuple[int, ...], as_json: bool) -> None:
    """Object-patch recall against true masks, with center and random beside it.

    A patch is an object patch where at least half of its pixels are inside the mask.

    \b
    Example: datalth-shards score shards --masks masks
    """
    from shards.inspect.score import recall

    opened = _open(folder, images=False)
    n = opened.num_patches
    if not Path(masks).is_dir():
        raise TicketSetError(f"--masks {masks}: no such folder")
    if any(k > n for k in tokens):
        raise TicketSetError(f"--tokens {max(tokens)}: expected at most {n}, the patches of a view")
    counts = list(tokens) or sorted({max(1, n // 4), max(1, n // 2), opened.k})
    found = recall(opened, split or opened.splits[0], masks, counts)
    if as_json:
        print_json(found)
        return
    click.echo(
        f"split {printable(found['split'])}: {found['images']} images scored, on average {found['mean_object_patches']:.1f} of {n}"
        f" patches are object; {found['without_mask']} without mask, {found['without_object']} without object patch"
    )
    rows = [[r["k"], f"{r['k'] / n:.0%}", r["ticket"], r["stderr"], r["center"], r["random"]] for r in found["rows"]]
    click.echo(table(rows, ["K", "share", "ticket", "std. error", "center", "random"]))


if __name__ == "__main__":
    main()
