"""timm's map-style dataset readers as a source: `timm:hfds/NAME` and what else timm can index."""

import re
import threading
from collections.abc import Sequence
from typing import Any

from miner.sources.source import Entry, Source, class_names, empty_classes, listing
from shards.errors import TicketSetError

_ITERABLE = ("wds", "tfds", "hfids")
_ADVICE = {
    "wds": "give the tars themselves: --data 'DIR/train-{0000..0127}.tar'",
    "tfds": "use timm:hfds/NAME, or write the images into folders first",
    "hfids": "use timm:hfds/NAME",
}
_VAL_NAMES = ("validation", "val", "test")


def timm_source(spec: str, splits: Sequence[str]) -> Source:
    """List a timm reader that can be indexed.

    Raises:
        TicketSetError: an iterable-only reader, or timm cannot open it.
    """
    name = spec.removeprefix("timm:")
    prefix = name.partition("/")[0]
    if prefix in _ITERABLE:
        raise TicketSetError(f"--data {spec}: {prefix} can only be read in order; {_ADVICE[prefix]}")
    readers = {}
    if not splits or "train" in splits or "val" in splits:
        readers["train"] = _create(spec, name, "train")
    for split in splits or ("val",):
        if split != "train":
            reader = next(filter(None, (_try(name, s) for s in (_VAL_NAMES if split == "val" else (split,)))), None)
            if reader is not None:
                readers[split] = reader
    notes: list[str] = []
    entries = {split: _entries(reader, i, split) for i, (split, reader) in enumerate(readers.items())}
    classes = class_names([e for split in entries.values() for e in split], f"--data {spec}")
    names = getattr(next(iter(readers.values())), "class_to_idx", None) or {}
    if len(names) >= len(classes):
        classes = [str(n) for n, _ in sorted(names.items(), key=lambda item: item[1])]
    tables = {split: listing(e, classes, f"--data {spec}", notes) for split, e in entries.items()}
    if "train" in tables:
        empty_classes(classes, tables["train"], notes)
    return Source(spec, classes, tables, _TimmRead(list(readers.values())), notes)


def _create(spec: str, name: str, split: str) -> Any:
    from timm.data.readers import create_reader

    try:
        reader = create_reader(name, root=None, split=split)
    except Exception as error:  # timm, datasets and the network each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TicketSetError(f"--data {spec}: timm cannot open split {split}: {reason}") from None
    if not hasattr(reader, "__getitem__") or not hasattr(reader, "__len__"):
        raise TicketSetError(
            f"--data {spec}: {type(reader).__name__} can only be read in order; use a map-style reader"
        )
    return reader


def _try(name: str, split: str) -> Any | None:
    try:
        return _create(name, name, split)
    except TicketSetError:
        return None


def _entries(reader: Any, container: int, split: str) -> list[Entry]:
    """Targets without images where the reader can; the key of input 7 is `train/00000007-its-file-name`."""
    targets = reader.iter_targets() if hasattr(reader, "iter_targets") else (reader[i][1] for i in range(len(reader)))
    out = []
    for i, target in enumerate(targets):
        try:
            path = str(reader.filename(i, basename=True) or "")
        except Exception:  # a reader without file names
            path = ""
        path = re.sub(r".*[/\\]", "", path)
        name = f"{split}/{i:08d}" + (f"-{path}" if path else "")
        out.append(Entry(name, None if target is None or target < 0 else int(target), -1, container, i))
    return out


class _TimmRead:
    """One image of a reader; readers are not made for threads, so one at a time."""

    def __init__(self, readers: list[Any]) -> None:
        self._readers, self._lock = readers, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, None]:
        with self._lock:
            image = self._readers[row["container"]][row["offset"]][0]
            with image:
                return image.read(), None
