"""The original ILSVRC2012 archives, read as they are: a tar of class tars, and a flat val tar.

Keys and labels are those of the extracted train/WNID and val/WNID folders. The val tar says nothing
of classes: they come from the devkit archive beside it, or from `labels`.
"""

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from miner.sources.archive import REPLACED, Archive, Member, open_archive
from miner.sources.source import (
    Entry,
    Source,
    Tally,
    class_names,
    is_image,
    is_junk,
    label_entries,
    listing,
    read_labels,
    spelled,
)
from miner.sources.tars import TarReader
from shards.errors import TicketSetError, first_line

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"


def is_imagenet(path: str) -> bool:
    """One of the two archives, or a folder that holds one."""
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, name)) for name in (TRAIN, VAL))
    return os.path.basename(path) in (TRAIN, VAL)


def imagenet_source(spec: str, path: str, splits: Sequence[str], labels: str | None) -> Source:
    """List the archives of a folder, or the one that `path` is.

    Raises:
        TicketSetError: the val tar's classes are nowhere to be had, or an archive cannot be read.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    wanted = {"train": TRAIN, "val": VAL}
    archives = {
        split: os.path.join(folder, name)
        for split, name in wanted.items()
        if os.path.exists(os.path.join(folder, name)) and (os.path.isdir(path) or os.path.basename(path) == name)
    }
    entries: dict[str, list[Entry]] = {}
    tally, read = Tally(), TarReader(list(archives.values()))
    for container, (split, archive) in enumerate(archives.items()):
        if splits and split not in splits and split != "train":
            continue
        list_archive = _train if split == "train" else _val
        entries[split] = list(list_archive(archive, container, read, tally))
        if split == "val":
            if labels:
                label_entries(entries[split], read_labels(labels), f"`labels` {labels}")
            else:
                label_entries(entries[split], _devkit_labels(spec, folder), DEVKIT)
            for entry in entries[split]:
                entry.source = f"val/{entry.name}/{entry.source.rpartition('/')[2]}"
    if not entries:
        raise TicketSetError(f"`data` {spec}: expected a split of {list(archives)}, got `splits` {splits[0]}")
    classes = class_names(entries["train" if "train" in entries else "val"], f"`data` {spec}")
    notes = tally.notes()
    beside = sorted(e.name for e in os.scandir(path) if e.is_dir() and not is_junk(e.name)) if path == folder else []
    if beside:
        notes.append(f"{len(beside)} folders beside the archives are not read (first: {spelled(beside[0])})")
    tables = {split: listing(e, classes, f"`data` {spec}, split {split}", notes) for split, e in entries.items()}
    return Source(spec, classes, tables, read, notes, own_val="val" in archives)


def _train(archive: str, container: int, read: TarReader, tally: Tally) -> Iterator[Entry]:
    with open_archive(archive, tally) as outer:
        for class_tar in _latest(outer, lambda name: True, archive, tally):
            where = f"{archive}: {spelled(class_tar.name)}"
            if class_tar.odd is not None:
                why = class_tar.odd if isinstance(class_tar.odd, str) else "is a sparse file"
                raise TicketSetError(f"{where}: expected a plain tar, got a member that {why}")
            wnid = os.path.basename(class_tar.name).removesuffix(".tar")
            # A view of the class tar's bytes inside the archive: nothing is unpacked.
            section: Any = _Section(outer.file, class_tar.offset, class_tar.size)
            for member in _latest(Archive(section, where, tally), is_image, where, tally):
                source = f"train/{wnid}/{os.path.basename(member.name)}"
                entry = read.entry(source, member, container, class_tar.offset)
                entry.name = wnid
                yield entry


def _val(archive: str, container: int, read: TarReader, tally: Tally) -> Iterator[Entry]:
    with open_archive(archive, tally) as tar:
        for member in _latest(tar, is_image, archive, tally):
            yield read.entry(os.path.basename(member.name), member, container)


def _latest(archive: Archive, wanted: Callable[[str], bool], where: str, tally: Tally) -> list[Member]:
    """The wanted members, of equal names the last, their links followed."""
    found: dict[str, Member] = {}
    for member in archive:
        if wanted(member.name):
            name = member.name.removeprefix("./")
            if name in found:
                tally.add(REPLACED, f"{where}: {spelled(member.name)}")
            found[name] = member
    archive.follow(found.values())
    return list(found.values())


class _Section(io.RawIOBase):
    """Bytes start..start+size of another file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data


@functools.cache
def _devkit_labels(spec: str, folder: str) -> dict[str, str]:
    """File name in the val tar -> WordNet id."""
    devkit = os.path.join(folder, DEVKIT)
    if not os.path.exists(devkit):
        raise TicketSetError(
            f"`data` {spec}: {VAL} names no classes; put {DEVKIT} beside it, or give `labels` FILE.csv (filename,class)"
        )
    from scipy.io import loadmat  # meta.mat is a Matlab file; torchvision reads it the same way

    found = {}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for member in tar:
                for wanted in (_TRUTH, _META):
                    if member.isfile() and member.name.endswith(wanted):
                        found[wanted] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except Exception as error:  # also zlib's and whatever tarfile trips over
        raise TicketSetError(f"{devkit}: not a readable tar: {first_line(error)}") from None
    if len(found) != 2:
        raise TicketSetError(f"{devkit}: expected {_TRUTH} and {_META} in it, got {sorted(found) or 'neither'}")
    try:
        synsets = loadmat(io.BytesIO(found[_META]), squeeze_me=True)["synsets"]
        wnid_of = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0}
        truth = found[_TRUTH].decode("ascii").split()
        return {f"ILSVRC2012_val_{i:08d}.JPEG": wnid_of[int(number)] for i, number in enumerate(truth, 1)}
    except Exception as error:  # scipy has no class of its own for a file that is none of Matlab's
        raise TicketSetError(
            f"{devkit}: expected the synsets of ILSVRC2012 and a number of one of them a line, got"
            f" {type(error).__name__}: {first_line(error)}"
        ) from None
