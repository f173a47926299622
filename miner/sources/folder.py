"""ImageFolder: class folders, inside train/ and val/ or directly.

Labels are the indices of train's class folders in plain sorted() order, as torchvision's ImageFolder.
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from miner.sources.source import (
    Entry,
    Source,
    class_names,
    empty_classes,
    is_image,
    label_entries,
    listing,
    read_labels,
)
from shards.errors import TicketSetError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid")
_ESCAPED_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")  # a byte that is no UTF-8, as `source` spells it


def folder_source(spec: str, root: str, splits: Sequence[str], labels: str | None) -> Source:
    """List a folder of images.

    Raises:
        TicketSetError: it holds no images, or a val class that train lacks.
    """
    notes: list[str] = []
    label_map = read_labels(labels) if labels else None
    roots = split_folders(root)
    classes = _subfolders(os.path.join(root, roots["train"])) if "train" in roots else None
    tables = {}
    for split in sorted(roots, key=lambda s: s != "train"):
        if splits and split not in splits and split != "train":
            continue
        if splits and split not in splits and classes and any(s in roots for s in splits):
            continue  # train is only wanted for its class names
        entries = list(_images(root, roots[split], notes))
        label_entries(entries, label_map, f"--labels {labels}")
        if not entries:
            why = f" ({notes[-1]})" if notes else ""
            raise TicketSetError(f"--data {spec}: no images in {os.path.join(root, roots[split])}{why}")
        if not classes:
            classes = class_names(entries, f"--data {spec}")
        tables[split] = listing(entries, classes, f"--data {spec}, split {split}", notes)
        if split == "train":
            empty_classes(classes, tables[split], notes)
    read = functools.partial(_read, root)
    return Source(spec, classes or [], tables, read, notes, own_val="val" in roots)


def split_folders(root: str) -> dict[str, str]:
    """split -> its folder under root; {"train": ""} where classes or images lie directly inside.

    Names in any case; test/ stands in for val where there is none and it has class folders.
    """
    found = {name.lower(): name for name in _subfolders(root)}
    train = next((found[name] for name in TRAIN_NAMES if name in found), None)
    val = next((found[name] for name in VAL_NAMES if name in found), None)
    test = found.get("test")
    if train is None and (not (val or test) or found.keys() - {*VAL_NAMES, "test"}):
        return {"train": ""}
    roots = {"train": train} if train else {}
    if val is None and test and _subfolders(os.path.join(root, test)):
        val, test = test, None
    return roots | ({"val": val} if val else {}) | ({"test": test} if test else {})


def _subfolders(path: str) -> list[str]:
    """Sorted; hidden ones (.git, .ipynb_checkpoints) are no classes."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(root: str, split_folder: str, notes: list[str]) -> Iterator[Entry]:
    """Images under the class folders, however deep; where there are no folders, those lying directly inside."""
    top = os.path.join(root, split_folder)
    classes = _subfolders(top)
    if classes:
        loose = sorted(file for file in os.listdir(top) if is_image(file) and not file.startswith("."))
        if loose:
            notes.append(
                f"{split_folder or root}: {len(loose)} images lie beside the class folders and are left out"
                f" (first: {loose[0]})"
            )
    others: Counter[str] = Counter()
    tops: list[str | None] = [*classes] or [None]
    for name in tops:
        for folder, subfolders, files in os.walk(os.path.join(top, name or ""), followlinks=True):
            subfolders[:] = [s for s in subfolders if not s.startswith(".")]
            for file in files:
                path = os.path.join(folder, file)
                if file.startswith("."):
                    continue
                if not is_image(file):
                    others[Path(file).suffix.lower() or "(none)"] += 1
                    continue
                yield Entry(Path(os.path.relpath(path, root)).as_posix(), name, _size(path))
    if others:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in others.most_common(4))
        notes.append(f"{split_folder or root}: {sum(others.values())} files are not images by their ending: {kinds}")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a dangling link: it becomes a failed row when it is read
        return -1


def _read(root: str, row: dict[str, Any]) -> tuple[bytes, None]:
    path = row["source"]
    if "%5Cudc" not in row["key"]:  # the key tells such a byte from a name that holds this very text
        path = _ESCAPED_BYTE.sub(lambda m: chr(int(m[1], 16)), path)
    with open(os.path.join(root, path), "rb") as file:
        return file.read(), None
