"""ImageFolder: class folders, inside train/ and val/ or directly.

Labels are the indices of train's class folders in plain sorted() order, as torchvision's ImageFolder.
Names are what the bytes on the disk spell in UTF-8, whatever the locale would make of them.
"""

import functools
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miner.sources.source import (
    JUNK_NOTE,
    Entry,
    Source,
    Tally,
    class_names,
    empty_classes,
    is_image,
    is_junk,
    label_entries,
    listing,
    open_plain,
    read_labels,
    spelled,
)
from shards.errors import TicketSetError

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
LOOP = "{count} links to folders are not followed: they lead back to a folder that they are in (first: {first})"
TWICE = "{count} folders behind links are not read: their class has them under another name (first: {first})"
ONE_CLASS = "all images are of one class, {first}; if its folders are the classes, they are what `data` expects"
_ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")  # a byte that is no UTF-8, as `source` spells it


def folder_source(spec: str, root: str, splits: Sequence[str], labels: str | None) -> Source:
    """List a folder of images.

    Raises:
        TicketSetError: it holds no images, or a val class that train lacks; a folder in it cannot be listed;
            its folders may be meant in several ways.
    """
    notes: list[str] = []
    tally = Tally()
    label_map = read_labels(labels) if labels else None
    roots = split_folders(root, notes, tally)
    classes = _subfolders(root, roots["train"]) if "train" in roots else None
    tables = {}
    for split in sorted(roots, key=lambda s: s != "train"):
        if splits and split not in splits and split != "train":
            continue
        if splits and split not in splits and classes and any(s in roots for s in splits):
            continue  # train is only wanted for its class names
        entries = list(_images(root, roots[split], notes, tally))
        label_entries(entries, label_map, f"`labels` {labels}")
        if not entries:
            why = "; ".join([*notes, *tally.notes()])
            place = spelled(os.path.join(root, roots[split]))
            raise TicketSetError(f"`data` {spec}: no images in {place}{why and f' ({why})'}")
        if not classes:
            classes = class_names(entries, f"`data` {spec}")
        tables[split] = listing(entries, classes, f"`data` {spec}, split {split}", notes)
        if split == "train":
            empty_classes(classes, tables[split], notes)
    read = functools.partial(_read, root)
    return Source(spec, classes or [], tables, read, [*notes, *tally.notes()], own_val="val" in roots)


def split_folders(root: str, notes: list[str], tally: Tally) -> dict[str, str]:
    """split -> its folder under root; {"train": ""} where classes or images lie directly inside.

    Names in any case; test/ stands in for val where there is none and it has class folders.

    Raises:
        TicketSetError: two folders for one split, or train/ may as well be a class.
    """
    folders = _subfolders(root)
    found = {split: [f for f in folders if f.lower() in names] for split, names in SPLIT_NAMES.items()}
    others = [f for f in folders if not _is_split(f)]
    if not found["train"] and (others or not (found["val"] or found["test"])):
        return {"train": ""}
    for split, named in found.items():
        if len(named) > 1:
            both = " and ".join(f"{spelled(folder)}/" for folder in named)
            raise TicketSetError(f"`data` {root}: {both} both stand for split {split}; expected one folder a split")
    roots = {split: named[0] for split, named in found.items() if named}
    if others:
        train, first = roots["train"], spelled(others[0])
        if not _subfolders(root, train):
            raise TicketSetError(
                f"`data` {root}: {train}/ has no class folders and stands beside {first}/: a split or a class?"
                f" Rename it where it is a class; move {first}/ away where it is a split"
            )
        notes.append(f"{len(others)} folders beside {train}/ are not read (first: {first})")
    _count_junk(root, "", tally)
    if "val" not in roots and "test" in roots and _subfolders(root, roots["test"]):
        roots["val"] = roots.pop("test")
    return roots


def _is_split(folder: str) -> bool:
    return any(folder.lower() in names for names in SPLIT_NAMES.values())


def _images(root: str, split_folder: str, notes: list[str], tally: Tally) -> Iterator[Entry]:
    """Images under the class folders, however deep; where there are no folders, those lying directly inside."""
    classes = _subfolders(root, split_folder)
    if len(classes) > 1 and all(map(_is_split, classes)):
        raise _too_high(root, split_folder, classes)
    if classes:
        _count_junk(root, split_folder, tally)
        files = (name for name, entry in _scan(root, split_folder) if not _is_folder(entry))
        loose = [name for name in files if is_image(name) and not is_junk(name)]
        if loose:
            notes.append(
                f"{split_folder or root}: {len(loose)} images lie beside the class folders and are left out"
                f" (first: {spelled(min(loose))})"
            )
    others: Counter[str] = Counter()
    above = _above(root, split_folder)
    tops: list[str | None] = [*classes] or [None]
    for name in tops:
        start = _join(split_folder, name or "")
        if name and os.path.islink(_on_disk(root, start)) and _leads_up(root, start, above):
            tally.add(LOOP, spelled(start))
            continue
        for path, entry in _files(root, start, above, len(classes) == 1, tally):
            if is_image(path):
                # `offset` says whether `source` spells the path with escaped bytes.
                yield Entry(path, name, _size(entry), offset=int(not _is_utf8(path)))
            else:
                others[spelled(Path(path).suffix.lower()) or "(none)"] += 1
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(4))
        notes.append(f"{split_folder or root}: {sum(others.values())} files are not images by their ending: {kinds}")


def _files(
    root: str, start: str, above: set[bytes], only_class: bool, tally: Tally
) -> Iterator[tuple[str, "os.DirEntry[bytes]"]]:
    """(path below root, entry) of every file under a class folder, links to folders followed, each folder once.

    Links wait until all real folders were seen, so that a folder is listed under its own name. Whether one was
    seen is asked below links only: a real folder cannot be met twice elsewhere, whatever a file system's
    numbers say.
    """
    seen: set[tuple[int, int]] = set()
    real, links = deque([(start, False)]), deque[str]()
    while real or links:
        path, linked = real.popleft() if real else (links.popleft(), True)
        number = _number(root, path)
        if linked and number in seen:
            tally.add(TWICE, spelled(path))
            continue
        seen.add(number)
        folders, hidden = [], []
        for name, entry in _scan(root, path):
            if is_junk(name):
                hidden.append(_join(path, name))
            elif _is_folder(entry):
                folders.append((name, entry.is_symlink()))
            else:
                yield _join(path, name), entry
        if hidden:
            tally.add(JUNK_NOTE, spelled(min(hidden)), len(hidden))
        for name, is_link in sorted(folders):
            below = _join(path, name)
            if not is_link:
                real.append((below, linked))
            elif _leads_up(root, below, above):
                tally.add(LOOP, spelled(below))
            else:
                links.append(below)
        if path == start:
            _check_level(root, start, sorted(name for name, _ in folders), only_class, tally)


def _check_level(root: str, class_folder: str, inside: list[str], only_class: bool, tally: Tally) -> None:
    """A `data` one level too high would make one class of train's and val's images.

    Raises:
        TicketSetError: the class folder holds splits.
    """
    splits = [name for name in inside if _is_split(name)]
    if len(splits) > 1 or (splits and only_class):
        raise _too_high(root, class_folder, splits)
    if only_class and len(inside) > 1:
        tally.add(ONE_CLASS, spelled(class_folder))


def _too_high(root: str, folder: str, splits: list[str]) -> TicketSetError:
    right = spelled(os.path.join(root, folder)).rstrip("/")
    return TicketSetError(
        f"`data` {root}: {' and '.join(splits)} in {right} would not be taken for splits; give `data` {right}"
    )


def _scan(root: str, path: str = "") -> "Iterator[tuple[str, os.DirEntry[bytes]]]":
    """(name, entry) of all that is in a folder, in the file system's order.

    Raises:
        TicketSetError: it cannot be listed, or a link in it that may be a folder's leads nowhere: nobody knows how
            many images are missing then.
    """
    try:
        with os.scandir(_on_disk(root, path)) as entries:
            for entry in entries:
                name = entry.name.decode("utf-8", "surrogateescape")
                if entry.is_symlink() and "." not in name and not os.path.exists(entry.path):
                    place = spelled(os.path.join(root, path, name))
                    raise TicketSetError(
                        f"{place}: a link that leads nowhere, maybe to a folder; mend it, or remove it"
                    )
                yield name, entry
    except OSError as error:
        raise _closed(root, path, error) from None


def _closed(root: str, path: str, error: OSError) -> TicketSetError:
    place = spelled(os.path.join(root, path))
    return TicketSetError(f"{place}: cannot be listed: {error.strerror}; mend it, or move it away")


def _number(root: str, path: str) -> tuple[int, int]:
    """What tells one folder from another.

    Raises:
        TicketSetError: it is not there any more, or closed to us.
    """
    try:
        status = os.stat(_on_disk(root, path))
    except OSError as error:
        raise _closed(root, path, error) from None
    return status.st_dev, status.st_ino


def _subfolders(root: str, path: str = "") -> list[str]:
    """Sorted; hidden and system folders (.git, @eaDir) are no classes."""
    return sorted(name for name, entry in _scan(root, path) if not is_junk(name) and _is_folder(entry))


def _is_folder(entry: "os.DirEntry[bytes]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or to where we may not look
        return False


def _count_junk(root: str, path: str, tally: Tally) -> None:
    hidden = [name for name, _ in _scan(root, path) if is_junk(name)]
    if hidden:
        tally.add(JUNK_NOTE, spelled(_join(path, min(hidden))), len(hidden))


def _above(root: str, split_folder: str) -> set[bytes]:
    """Real paths of the folders that the class folders are in."""
    above = set()
    for path in {os.path.realpath(_on_disk(root, path)) for path in ("", split_folder)}:
        while path not in above:
            above.add(path)
            path = os.path.dirname(path)
    return above


def _leads_up(root: str, link: str, above: set[bytes]) -> bool:
    """Whether a link leads to a folder that it is in itself, which would go on for ever."""
    path = _on_disk(root, link)
    target, folder = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    return target in above or os.path.commonpath([target, folder]) == target


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _on_disk(root: str, path: str) -> bytes:
    return os.path.join(os.fsencode(root), path.encode("utf-8", "surrogateescape"))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(entry: "os.DirEntry[bytes]") -> int:
    """Bytes of a file; -1 for a dangling link or a FIFO: it becomes a failed row when it is read."""
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _read(root: str, row: dict[str, Any]) -> tuple[bytes, None]:
    path = row["source"]
    if row["offset"]:
        path = _ESCAPED_BYTE.sub(lambda m: chr(int(m[1], 16)), path)
    with open_plain(_on_disk(root, path), image=True) as file:
        return file.read(), None
