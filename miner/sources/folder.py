"""ImageFolder: class folders, inside train/ and val/ or directly.

Labels are the indices of train's class folders in plain sorted() order, as torchvision's ImageFolder.
"""

import functools
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
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
    read_labels,
    spelled,
)
from miner.sources.tree import Item, Tree, join
from shards.errors import TicketSetError

SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
LOOP = "{count} links to folders are not followed: they lead back to a folder that they are in (first: {first})"
TWICE = "{count} folders behind links are not read: their class has them under another name (first: {first})"
ONE_CLASS = "all images are of one class, {first}; if its folders are the classes, they are what `data` expects"
_ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")  # a byte that is no UTF-8, as `source` spells it


def folder_source(spec: str, tree: Tree, splits: Sequence[str], labels: str | None) -> Source:
    """List a folder of images.

    Raises:
        TicketSetError: it holds no images, or a val class that train lacks; a folder in it cannot be listed;
            its folders may be meant in several ways.
    """
    notes: list[str] = []
    tally = Tally()
    label_map = read_labels(labels) if labels else None
    roots = split_folders(tree, notes, tally)
    classes = _subfolders(tree, roots["train"]) if "train" in roots else None
    tables = {}
    for split in sorted(roots, key=lambda s: s != "train"):
        if splits and split not in splits and split != "train":
            continue
        if splits and split not in splits and classes and any(s in roots for s in splits):
            continue  # train is only wanted for its class names
        entries = list(_images(tree, roots[split], notes, tally))
        label_entries(entries, label_map, f"`labels` {labels}")
        if not entries:
            why = "; ".join([*notes, *tally.notes()])
            place = spelled(os.path.join(tree.root, roots[split]))
            raise TicketSetError(f"`data` {spec}: no images in {place}{why and f' ({why})'}")
        if not classes:
            classes = class_names(entries, f"`data` {spec}")
        tables[split] = listing(entries, classes, f"`data` {spec}, split {split}", notes)
        if split == "train":
            empty_classes(classes, tables[split], notes)
    read = functools.partial(_read, tree.read)
    return Source(spec, classes or [], tables, read, [*notes, *tally.notes()], own_val="val" in roots)


def split_folders(tree: Tree, notes: list[str], tally: Tally) -> dict[str, str]:
    """split -> its folder under root; {"train": ""} where classes or images lie directly inside.

    Names in any case; test/ stands in for val where there is none and it has class folders.

    Raises:
        TicketSetError: two folders for one split, or train/ may as well be a class.
    """
    root, folders = tree.root, _subfolders(tree)
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
        if not _subfolders(tree, train):
            raise TicketSetError(
                f"`data` {root}: {train}/ has no class folders and stands beside {first}/: a split or a class?"
                f" Rename it where it is a class; move {first}/ away where it is a split"
            )
        notes.append(f"{len(others)} folders beside {train}/ are not read (first: {first})")
    _count_junk(tree, "", tally)
    if "val" not in roots and "test" in roots and _subfolders(tree, roots["test"]):
        roots["val"] = roots.pop("test")
    return roots


def _is_split(folder: str) -> bool:
    return any(folder.lower() in names for names in SPLIT_NAMES.values())


def _images(tree: Tree, split_folder: str, notes: list[str], tally: Tally) -> Iterator[Entry]:
    """Images under the class folders, however deep; where there are no folders, those lying directly inside."""
    classes = _subfolders(tree, split_folder)
    if len(classes) > 1 and all(map(_is_split, classes)):
        raise _too_high(tree.root, split_folder, classes)
    if classes:
        _count_junk(tree, split_folder, tally)
        files = (name for name, item in tree.scan(split_folder) if not item.is_folder)
        loose = [name for name in files if is_image(name) and not is_junk(name)]
        if loose:
            notes.append(
                f"{split_folder or tree.root}: {len(loose)} images lie beside the class folders and are left out"
                f" (first: {spelled(min(loose))})"
            )
    others: Counter[str] = Counter()
    tops: list[str | None] = [*classes] or [None]
    for name in tops:
        start = join(split_folder, name or "")
        if name and tree.leads_up(start, split_folder):
            tally.add(LOOP, spelled(start))
            continue
        check_level = functools.partial(_check_level, tree.root, start, len(classes) == 1, tally)
        for path, item in files_below(tree, start, split_folder, tally, check_level):
            if is_image(path):
                # `offset` says whether `source` spells the path with escaped bytes.
                yield Entry(path, name, item.size, offset=int(not _is_utf8(path)))
            else:
                others[ending(path)] += 1
    if others:
        notes.append(other_files(split_folder or tree.root, others))


def ending(path: str) -> str:
    """Of a file's name, for `other_files`."""
    return spelled(Path(path).suffix.lower()) or "(none)"


def other_files(place: str, endings: Counter[str]) -> str:
    """A note on files that are left out, counted by their endings."""
    kinds = ", ".join(f"{suffix} {count}" for suffix, count in endings.most_common(4))
    return f"{place}: {sum(endings.values())} files are not images by their ending: {kinds}"


def files_below(
    tree: Tree, start: str, top: str, tally: Tally, check: Callable[[list[str]], None] = lambda inside: None
) -> Iterator[tuple[str, Item]]:
    """(path below root, item) of every file under a folder, links to folders followed, each folder once.

    Links wait until all real folders were seen, so that a folder is listed under its own name. Whether one was
    seen is asked below links only: a real folder cannot be met twice elsewhere, whatever a file system's
    numbers say.

    Args:
        top: a link that leads to where this folder is, or above, is not followed.
        check: is given the sorted names of the folders that lie directly in `start`.
    """
    seen: set[object] = set()
    real, links = deque([(start, False)]), deque[str]()
    while real or links:
        path, linked = real.popleft() if real else (links.popleft(), True)
        number = tree.number(path)
        if linked and number in seen:
            tally.add(TWICE, spelled(path))
            continue
        seen.add(number)
        folders, hidden = [], []
        for name, item in tree.scan(path):
            if is_junk(name):
                hidden.append(join(path, name))
            elif item.is_folder:
                folders.append((name, item.is_link))
            else:
                yield join(path, name), item
        if hidden:
            tally.add(JUNK_NOTE, spelled(min(hidden)), len(hidden))
        for name, is_link in sorted(folders):
            below = join(path, name)
            if not is_link:
                real.append((below, linked))
            elif tree.leads_up(below, top):
                tally.add(LOOP, spelled(below))
            else:
                links.append(below)
        if path == start:
            check(sorted(name for name, _ in folders))


def _check_level(root: str, class_folder: str, only_class: bool, tally: Tally, inside: list[str]) -> None:
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


def _subfolders(tree: Tree, path: str = "") -> list[str]:
    """Sorted; hidden and system folders (.git, @eaDir) are no classes."""
    return sorted(name for name, item in tree.scan(path) if not is_junk(name) and item.is_folder)


def _count_junk(tree: Tree, path: str, tally: Tally) -> None:
    hidden = [name for name, _ in tree.scan(path) if is_junk(name)]
    if hidden:
        tally.add(JUNK_NOTE, spelled(join(path, min(hidden))), len(hidden))


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(read: Callable[[str, int], bytes], row: dict[str, Any]) -> tuple[bytes, None]:
    path = row["source"]
    if row["offset"]:
        path = _ESCAPED_BYTE.sub(lambda m: chr(int(m[1], 16)), path)
    return read(path, row["size"]), None
