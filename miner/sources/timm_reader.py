"""timm's map-style dataset readers as a source: `timm:hfds/NAME` and what else timm can index."""

import contextlib
import itertools
import numbers
import threading
from collections.abc import Sequence
from typing import Any

from miner.sources.source import Entry, Source, class_names, empty_classes, listing, spelled
from shards.errors import ImageError, TicketSetError, first_line

_ITERABLE = ("wds", "tfds", "hfids")
_ADVICE = {
    "wds": "give the tars themselves: `data` 'DIR/train-{0000..0127}.tar'",
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
        raise TicketSetError(f"`data` {spec}: {prefix} can only be read in order; {_ADVICE[prefix]}")
    if prefix == name:
        raise TicketSetError(f"`data` {spec}: expected timm:READER/NAME, such as timm:hfds/uoft-cs/cifar10")
    found = _readers(spec, name, splits)
    readers = {split: reader for split, (_, reader) in found.items() if split in (*splits, "train") or not splits}
    if not readers:
        raise TicketSetError(f"`data` {spec}: timm finds no split {' or '.join(splits)}")
    notes: list[str] = []
    entries = {split: _entries(spec, reader, i, split) for i, (split, reader) in enumerate(readers.items())}
    classes = class_names([e for split in entries.values() for e in split], f"`data` {spec}")
    names = _names(next(iter(readers.values())))
    if len(names) >= len(classes):
        classes = names
    tables = {split: listing(e, classes, f"`data` {spec}", notes) for split, e in entries.items()}
    if "train" in tables:
        empty_classes(classes, tables["train"], notes)
    read = _TimmRead(spec, [found[split][0] for split in readers], list(readers.values()))
    return Source(spec, classes, tables, read, notes, own_val="val" in found)


def _readers(spec: str, name: str, splits: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """split -> timm's name of it and its reader; val also where it is not wanted: is there one?"""
    found = {}
    if not splits or "train" in splits or "val" in splits:
        found["train"] = "train", _create(spec, name, "train")
    for split in dict.fromkeys((*splits, "val")):
        for theirs in _VAL_NAMES if split == "val" else (split,):
            if split not in found:
                with contextlib.suppress(TicketSetError):
                    found[split] = theirs, _create(spec, name, theirs)
    return found


def _create(spec: str, name: str, split: str) -> Any:
    from timm.data.readers import create_reader

    try:
        reader = create_reader(name, root=None, split=split)
    except Exception as error:  # timm, datasets and the network each have their own
        reason = first_line(error)
        if isinstance(error, ImportError):
            reason += "; pip install 'datalth[timm-readers]'"
        raise TicketSetError(
            f"`data` {spec}: timm cannot open split {split}: {reason}; expected such as timm:hfds/uoft-cs/cifar10"
        ) from None
    if not hasattr(reader, "__getitem__") or not hasattr(reader, "__len__"):
        raise TicketSetError(
            f"`data` {spec}: {type(reader).__name__} can only be read in order; use a map-style reader"
        )
    return reader


def _names(reader: Any) -> list[str]:
    """A reader's class names by their numbers; none where these are not 0, 1, 2, ..."""
    numbered = getattr(reader, "class_to_idx", None)
    names = {number: str(name) for name, number in numbered.items()} if isinstance(numbered, dict) else {}
    return [names[i] for i in range(len(names))] if names.keys() == set(range(len(names))) else []


def _entries(spec: str, reader: Any, container: int, split: str) -> list[Entry]:
    """Targets without images where the reader can; the key of input 7 is `train/00000007`.

    A reader's own file names are left alone: hfds would decode every image for them.
    """
    out = []
    try:
        count = len(reader)
        targets = reader.iter_targets() if hasattr(reader, "iter_targets") else (reader[i][1] for i in range(count))
        for i, target in enumerate(itertools.islice(targets, count + 1)):
            name = f"{split}/{i:08d}"
            if target is not None and not isinstance(target, numbers.Integral):
                raise TicketSetError(f"`data` {spec}: {name}: expected a class number, got {target!r}")
            out.append(Entry(name, None if target is None or target < 0 else int(target), -1, container, i))
    except TicketSetError:
        raise
    except Exception as error:  # whatever the reader's backend raises
        raise TicketSetError(
            f"`data` {spec}: timm cannot list split {split}: {type(error).__name__}: {first_line(error)}"
        ) from None
    if len(out) != count:
        raise TicketSetError(
            f"`data` {spec}: split {split}: expected a class number for each of {count}, got {len(out)}"
        )
    return out


class _TimmRead:
    """One image of a reader; readers are not made for threads, so one at a time.

    Args:
        splits: timm's name of the split that each container is.
        readers: of them; None where they are to be opened at need, in a process that did not list them.
    """

    def __init__(self, spec: str, splits: list[str], readers: list[Any]) -> None:
        self._spec, self._splits, self._readers = spec, splits, readers
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _TimmRead, (self._spec, self._splits, [None] * len(self._splits))

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, None]:
        number = row["container"]
        with self._lock:
            if self._readers[number] is None:
                self._readers[number] = _create(self._spec, self._spec.removeprefix("timm:"), self._splits[number])
            try:
                with self._readers[number][row["offset"]][0] as image:
                    return image.read(), None
            except OSError:
                raise  # with its number: the machine's errors are no image's
            except Exception as error:  # whatever the reader's backend raises: this image failed, not the run
                raise ImageError(f"cannot be read: {type(error).__name__}: {spelled(first_line(error))}") from error
