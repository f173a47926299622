"""What every source comes down to: tables of inputs by split, and a function that reads one."""

import csv
import functools
import hashlib
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from shards.checks import CONTROL
from shards.errors import ImageError, TicketSetError
from shards.keys import natural_sorted, unique_keys
from shards.reader import TicketSet
from shards.schema import LabelerIdentity, SelectorIdentity

T = TypeVar("T")
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm"]
    + [".tif", ".tiff", ".avif", ".jp2", ".tga"]
)
JUNK = frozenset(  # what file managers, network disks and file systems leave behind; and whatever begins with a dot
    ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"]
    + ["Thumbs.db", "desktop.ini"]
)
JUNK_NOTE = "{count} hidden or system files and folders are skipped (first: {first})"
MAX_CLASSES = 1_000_000  # a number above is an id that somebody took for a label
MAX_IMAGE_BYTES = 1 << 30  # a file above is none that Pillow would decode
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),  # relative path, or the name in its tar
        ("label", pa.int32()),  # null where the image has none
        ("size", pa.int64()),  # bytes; -1 where the source cannot say
        ("container", pa.int32()),  # which tar, ticket-set shard, or 0
        ("offset", pa.int64()),  # where in it; the source's own affair
    ]
)


Read = Callable[[dict[str, Any]], tuple[bytes, np.ndarray | None]]


class Kept(NamedTuple):
    """What a ticket set has of one image: rankings [V, N], token labels, and what its row says of scores."""

    rankings: np.ndarray
    token_labels: np.ndarray | None
    mean_score: float | None
    entropy: float | None
    spread: bytes | None


class Tickets(NamedTuple):
    """Of a ticket set that has some: who ranked, who made token labels, if any, and a `Read` that gives them, too."""

    selector: SelectorIdentity
    labeler: LabelerIdentity | None
    read: Callable[[dict[str, Any]], tuple[bytes, np.ndarray, Kept]]


@dataclass(frozen=True)
class Source:
    """A listing, and a way to read one input of it. It can be pickled: another process reads the same bytes.

    Attributes:
        spec: as the user wrote it.
        classes: names in the order of their labels; empty where nothing is labeled.
        splits: name -> table of SCHEMA, in natural order of the source paths.
        read: row of such a table -> the file's bytes, and the views that a ticket set gave it, else None; called from
            several threads. A source that keeps files open opens them at need, in each process its own (`Cached`).
        notes: what a person should know of the listing.
        base: the ticket set behind it; its shards, views and seed are then inherited.
        tickets: of the ticket set itself, which may be linked to `base`; None where it has none.
        in_order: the images lie far away: keep their order across shards.
        own_val: it has a val split of its own, listed or not.
    """

    spec: str
    classes: list[str]
    splits: dict[str, pa.Table]
    read: Read
    notes: list[str] = field(default_factory=list)
    base: TicketSet | None = None
    tickets: Tickets | None = None
    in_order: bool = False
    own_val: bool = False

    def only(self, splits: Sequence[str]) -> "Source":
        """The same with some of its splits."""
        return replace(self, splits={name: self.splits[name] for name in splits})


class Cached(Generic[T]):
    """A function whose last `most` results are kept, open files mostly, for threads. Pickled it comes without them."""

    def __init__(self, function: Callable[..., T], most: int) -> None:
        self._made_of = function, most
        self._call = functools.lru_cache(most)(function)
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> T:
        with self._lock:  # or each thread would open the same file
            return self._call(*arguments)

    def __reduce__(self) -> Any:
        return Cached, self._made_of


@dataclass(slots=True)
class Entry:
    """One input while it is being listed; `name` is its class name, its label, or None."""

    source: str
    name: str | int | None
    size: int = -1
    container: int = 0
    offset: int = 0


class Tally:
    """What a listing leaves out or mends, counted by kind, so that thousands of them are one note."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """`kind` is the note, with places for {count} and the {first} example."""
        before, first = self.found.get(kind, (0, example))
        self.found[kind] = before + count, first

    def notes(self) -> list[str]:
        """A line a kind."""
        return [kind.format(count=count, first=first) for kind, (count, first) in self.found.items()]


def is_image(path: str) -> bool:
    """Whether a name ends as those of image files."""
    dot = path.rfind(".")
    return dot >= 0 and path[dot:].lower() in IMAGE_SUFFIXES


def is_junk(name: str) -> bool:
    """A hidden or system file or folder, by its own name."""
    return name in JUNK or (name.startswith(".") and name not in (".", ".."))


def open_plain(path: str | bytes, image: bool = False) -> BinaryIO:
    """Open a file for reading; never waits for a writer, as opening a FIFO does.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a socket or a device.
        ImageError: `image`, and it has more bytes than any.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("expected a plain file, got a FIFO, a socket, a device or a folder")
    if image:
        check_size(status.st_size)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def check_size(size: int) -> None:
    """
    Raises:
        ImageError: no image has that many bytes.
    """
    if size > MAX_IMAGE_BYTES:
        raise ImageError(f"expected an image file of at most {MAX_IMAGE_BYTES} bytes, got {size}")


def spelled(name: str) -> str:
    """A name as text that any file and any line can hold: control characters, ends of lines and bytes
    that are no UTF-8 are written as Python would, `\\n`, `\\udce9`."""
    return CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode(), name)


def spelled_classes(classes: list[str], where: str) -> list[str]:
    """Class names as a set holds them; their order, torchvision's, is that of the raw names.

    Raises:
        TicketSetError: two of them are spelled alike, or one is empty.
    """
    raw: dict[str, str] = {}
    for name in classes:
        text = spelled(name)
        if not text.strip():
            raise TicketSetError(f"{where}: expected a name for every class, got {name!r}")
        if text in raw:
            raise TicketSetError(
                f"{where}: classes {raw[text]!r} and {name!r} would both be spelled {text}; rename one"
            )
        raw[text] = name
    return list(raw)


def listing(entries: Iterable[Entry], classes: list[str], where: str, notes: list[str]) -> pa.Table:
    """Sort inputs in natural order, give them keys, and turn class names into labels.

    Raises:
        TicketSetError: a class that `classes` lacks.
    """
    by_path: dict[str, list[Entry]] = {}
    for entry in entries:
        by_path.setdefault(entry.source, []).append(entry)
    ordered = [e for path in natural_sorted(by_path) for e in by_path[path]]
    keys, renamed = unique_keys([e.source for e in ordered])
    if renamed:
        notes.append(f"{len(renamed)} inputs share a key with another and got -1, -2, ... (first: {renamed[0]})")
    label_of = {name: i for i, name in enumerate(classes)}
    for entry in ordered:
        name = entry.name
        if name is not None and (name not in label_of if isinstance(name, str) else name >= len(classes)):
            raise TicketSetError(f"{where}: class {name!r} ({entry.source}) is not among train's {len(classes)}")
    columns = [
        keys,
        [e.source.encode("utf-8", "backslashreplace").decode() for e in ordered],
        [label_of[e.name] if isinstance(e.name, str) else e.name for e in ordered],
        [e.size for e in ordered],
        [e.container for e in ordered],
        [e.offset for e in ordered],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def class_names(entries: Iterable[Entry], where: str) -> list[str]:
    """Classes of inputs that name them, sorted as torchvision does; of ints, their digits up to the highest.

    Raises:
        TicketSetError: some inputs have names and some numbers, or a number is negative or no label.
    """
    names = {entry.name for entry in entries} - {None}
    numbers = {name for name in names if isinstance(name, int)}
    if not numbers:
        return sorted(str(name) for name in names)
    odd = next(iter(names - numbers), None) if numbers != names else min(numbers) if min(numbers) < 0 else None
    if odd is not None:
        raise TicketSetError(
            f"{where}: expected labels that are all names or all numbers from 0, got {odd!r} and {max(numbers)}"
        )
    if max(numbers) >= MAX_CLASSES:
        raise TicketSetError(f"{where}: expected labels below {MAX_CLASSES}, got {max(numbers)}")
    return [str(i) for i in range(max(numbers) + 1)]


def empty_classes(classes: list[str], table: pa.Table, notes: list[str]) -> None:
    """Note classes without an image: they keep their label, so that labels stay torchvision's."""
    used = Counter(table["label"].to_pylist())
    empty = [name for i, name in enumerate(classes) if i not in used]
    if empty:
        notes.append(
            f"{len(empty)} of {len(classes)} classes hold no images (first: {empty[0]}); they keep their label"
        )


def read_labels(path: str) -> dict[str, str]:
    """filename -> class of a two-column CSV; a first line `filename,class` is a header.

    Raises:
        TicketSetError: not such a file, or it gives one file two classes.
    """
    labels: dict[str, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # Excel begins with a byte-order mark
            lines = csv.reader(file)
            for row in lines:
                row = [cell.strip() for cell in row]
                where = f"`labels` {path}, line {lines.line_num}"
                if not any(row) and len(row) < 2 or (not labels and row[0].lower() == "filename"):
                    continue
                if len(row) != 2 or not all(row):
                    raise TicketSetError(f"{where}: expected lines of filename,class, got {','.join(row)[:200]!r}")
                name, label = row
                if labels.setdefault(name, label) != label:
                    raise TicketSetError(f"{where}: {name} is of class {label!r} here, of {labels[name]!r} further up")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TicketSetError(f"`labels` {path}: {error}") from None
    return labels


def label_entries(entries: list[Entry], labels: dict[str, str] | None, where: str) -> None:
    """Give inputs without a class the one that `labels`, read from `where`, name for their file name.

    Raises:
        TicketSetError: a file is not among them.
    """
    if labels is None:
        return
    for entry in entries:
        if entry.name is None:
            base = entry.source.rpartition("/")[2]
            if base not in labels:
                raise TicketSetError(f"{where}: expected a class for every image, got none for {base}")
            entry.name = labels[base]


def split_off_val(source: Source, share: float, seed: int) -> Source:
    """Give a source without a val split one: `share` of each class, chosen by a hash of the key.

    Every class with two images or more gives at least one and keeps at least one.
    """
    if source.own_val or "val" in source.splits or "train" not in source.splits or share == 0:
        return source
    table = source.splits["train"]
    hashes = [hashlib.blake2b(f"val/{seed}/{k}".encode(), digest_size=8).hexdigest() for k in table["key"].to_pylist()]
    by_class: dict[int | None, list[int]] = {}
    for row, label in enumerate(table["label"].to_pylist()):
        by_class.setdefault(label, []).append(row)
    chosen = np.zeros(len(table), bool)
    for rows in by_class.values():
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        chosen[sorted(rows, key=lambda r: hashes[r])[:count]] = True
    if not chosen.any():
        note = "no val split: no class has an image to spare for one"
        return replace(source, notes=[*source.notes, note])
    splits = {**source.splits, "train": table.filter(pa.array(~chosen)), "val": table.filter(pa.array(chosen))}
    note = (
        f"no val split: {int(chosen.sum())} of {len(table)} images became one (`val_share` {share:g},"
        f" by hash of the key, from every class)"
    )
    return replace(source, splits=splits, notes=[*source.notes, note])


def note_unlabeled(source: Source) -> Source:
    """With a note of images without a label where others have one: mining does without, training does not."""
    notes = []
    for split, table in source.splits.items() if source.classes else ():
        if table["label"].null_count:
            first = table.filter(table["label"].is_null())["source"][0]
            notes.append(
                f"{split}: {table['label'].null_count} of {len(table)} images have no label (first: {first});"
                " training needs labels: mend them, or give `labels` FILE.csv"
            )
    return replace(source, notes=[*source.notes, *notes])
