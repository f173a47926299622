"""WebDataset tars as a source: headers are read once, images by offset.

A sample's label is its `cls` member, else a field of its `json` member, else none.
"""

import functools
import json
import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

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
from shards import storage
from shards.errors import TicketSetError
from shards.format import IMAGE_MEMBERS

_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset: the key ends at the basename's first dot
_SPLIT_WORDS = (("train", "train"), ("val", "val"), ("test", "test"))


def tar_source(spec: str, urls: list[str], label_field: str, labels: str | None) -> Source:
    """List the samples of tars; a tar's split is the word train, val or test in its file name, else train.

    Raises:
        TicketSetError: a tar cannot be read, holds no images, or its labels are no labels.
    """
    notes: list[str] = []
    label_map = read_labels(labels) if labels else None
    by_split: dict[str, list[Entry]] = {}
    for container, url in enumerate(urls):
        entries = by_split.setdefault(split_of(url), [])
        with open_tar(url) as (tar, _):
            entries.extend(_samples(tar, url, container, label_field, notes))
    for entries in by_split.values():
        label_entries(entries, label_map, f"--labels {labels}")
    every = [e for entries in by_split.values() for e in entries]
    if not every:
        raise TicketSetError(f"--data {spec}: no images in {len(urls)} tars")
    classes = class_names(by_split.get("train") or every, f"--data {spec}")
    if classes and all(isinstance(e.name, int) for e in every if e.name is not None):
        classes = class_names(every, f"--data {spec}")
    remote = any(storage.is_remote(url) for url in urls)
    tables = {s: listing(entries, classes, f"--data {spec}, split {s}", notes) for s, entries in by_split.items()}
    if remote:  # read each tar once, from its beginning to its end
        tables = {split: table.take(_far_order(table)) for split, table in tables.items()}
    if "train" in tables:
        empty_classes(classes, tables["train"], notes)
    return Source(spec, classes, tables, TarReader(urls), notes, in_order=remote)


class TarReader:
    """Reads members by (container, offset, size). Few files stay open: a set may have thousands."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._open = functools.lru_cache(2 if any(map(storage.is_remote, urls)) else 64)(storage.open_ranges)

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, None]:
        url = self._urls[row["container"]]
        data = self._open(url).read(row["offset"], row["size"])
        if len(data) != row["size"]:
            raise OSError(f"{url} ends inside {row['source']}")
        return data, None


class open_tar:
    """A tar opened for listing, local or remote, as a context: (tar, file)."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> tuple[tarfile.TarFile, BinaryIO]:
        try:
            self._file = storage.open_file(self._url)
            return tarfile.open(fileobj=self._file, mode="r:"), self._file
        except FileNotFoundError:
            raise TicketSetError(f"{self._url}: no such file") from None
        except (OSError, tarfile.TarError) as error:
            raise TicketSetError(f"{self._url}: not a readable tar: {error}") from None

    def __exit__(self, *error: object) -> None:
        self._file.close()


def members(tar: tarfile.TarFile, where: str) -> Iterator[tarfile.TarInfo]:
    """The files of a tar, one at a time and without keeping them.

    tarfile takes a broken header, and a file that is cut between two members, for the end of the tar.

    Raises:
        TicketSetError: the tar ends early, or without its end mark.
    """
    try:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it saw
            if member.isfile():
                yield member
    except tarfile.TarError as error:
        raise TicketSetError(f"{where}: not a readable tar: {error}") from None
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        got = "something else" if len(block) == tarfile.BLOCKSIZE else "the end of the file"
        raise TicketSetError(
            f"{where}: not a readable tar: expected a member or the end mark at {tar.offset}, got {got}"
        )


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "members() gives regular files only"
    return file.read()


def split_of(url: str) -> str:
    name = url.rpartition("/")[2].lower()
    return next((split for word, split in _SPLIT_WORDS if word in name), "train")


def _far_order(table: pa.Table) -> np.ndarray:
    return np.lexsort((table["offset"].to_numpy(), table["container"].to_numpy()))


def _samples(tar: tarfile.TarFile, url: str, container: int, label_field: str, notes: list[str]) -> Iterator[Entry]:
    """The image of a sample is its member with the plainest name: x.jpg before x.seg.png, whichever comes first."""
    grouped: dict[str, dict[str, Any]] = {}
    for member in members(tar, url):
        match = _SAMPLE_NAME.match(member.name)
        if match is None:
            continue
        name, extension = match[1], match[2].lower()
        sample = grouped.setdefault(name, {})
        if extension in ("cls", "json"):
            sample[extension] = read_member(tar, member)
        elif is_image("." + extension):
            sample.setdefault("images", []).append((member.name, member.size, member.offset_data))
    pictured = {name: sample for name, sample in grouped.items() if "images" in sample}
    if len(pictured) < len(grouped):
        odd = next(name for name in grouped if name not in pictured)
        notes.append(
            f"{url}: {len(grouped) - len(pictured)} samples have no image member (.{', .'.join(IMAGE_MEMBERS)}, ...;"
            f" first: {odd})"
        )
    several = []
    for name, sample in pictured.items():
        plainest = min(path.count(".") for path, _, _ in sample["images"])
        images = [image for image in sample["images"] if image[0].count(".") == plainest]
        if len(images) > 1:
            several.append(f"{name}: {images[0][0]}")
        path, size, offset = images[0]
        yield Entry(path, _label(sample, name, url, label_field), size, container, offset)
    if several:
        notes.append(f"{url}: {len(several)} samples have several images, one of each is taken (first: {several[0]})")


def _label(sample: dict[str, Any], name: str, url: str, label_field: str) -> int | str | None:
    try:
        if "cls" in sample:
            return int(sample["cls"])
        if "json" in sample:
            value = json.loads(sample["json"]).get(label_field)
        else:
            return None
    except (ValueError, AttributeError):
        raise TicketSetError(f"{url}: {name}: expected digits in .cls or an object in .json") from None
    if value is None or isinstance(value, str) or type(value) is int:
        return value
    raise TicketSetError(f"{url}: {name}: expected a name or a number in its json's {label_field}, got {value!r}")
