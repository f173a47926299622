"""WebDataset tars as a source: headers are read once, images by offset.

A sample's label is its `cls` member, else `label` in its `json` member, else none.
"""

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from miner.sources.archive import REPLACED, Archive, Member, Pieces, member_bytes, open_archive
from miner.sources.listings import Listing, SharedListings
from miner.sources.source import (
    MAX_CLASSES,
    Cached,
    Entry,
    Source,
    Tally,
    class_names,
    empty_classes,
    is_image,
    label_entries,
    listing,
    read_labels,
    spelled,
)
from shards import storage
from shards.errors import TicketSetError
from shards.format import IMAGE_MEMBERS

SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation"], "val"),
    "test": "test",
}
MAX_LABEL_BYTES = 16 << 20  # of a cls or json member
LABELS = ("cls", "json")
_SAMPLE_NAME = re.compile(
    r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL
)  # WebDataset: the key ends at the basename's first dot
_DIGITS = re.compile(rb"\s*(-?[0-9]+)\s*")  # not what int() takes: 1_0, +1, digits of other scripts
_NO_IMAGE = f"{{count}} samples have no image member (.{', .'.join(IMAGE_MEMBERS)}, ...; first: {{first}})"
_SECOND = (
    "{count} images are left out: WebDataset's samples end at the first dot of a name, so that they share one with"
    " another image; rename them without that dot (first: {first})"
)
_PART = "{count} images with further dots in their names are taken for parts of samples and left out (first: {first})"


def tar_source(spec: str, urls: list[str], labels: str | None, shared: SharedListings | None = None) -> Source:
    """List the samples of tars; `split_of` says which split a tar belongs to.

    Args:
        shared: where several workers keep what they listed of remote tars.
    Raises:
        TicketSetError: a tar cannot be read, holds no images, or its labels are no labels.
    """
    tally = Tally()
    label_map = read_labels(labels) if labels else None
    read = TarReader(urls)
    remote = any(storage.is_remote(url) for url in urls)
    listings = shared.of(urls, _list) if shared and remote else map(_list, urls)
    by_split: dict[str, list[Entry]] = {}
    for container, (url, listing_) in enumerate(zip(urls, listings, strict=True)):
        entries = by_split.setdefault(split_of(url)[0], [])
        for image, label in zip(listing_.images, listing_.labels, strict=True):
            entry = read.entry(image.name, image, container)
            entry.name = label
            entries.append(entry)
        for kind, (count, first) in listing_.notes.items():
            tally.add(kind, first, count)
    notes = [*_split_notes(urls), *tally.notes()]
    for entries in by_split.values():
        label_entries(entries, label_map, f"`labels` {labels}")
    every = [e for entries in by_split.values() for e in entries]
    if not every:
        why = f" ({notes[-1]})" if notes else ""
        raise TicketSetError(f"`data` {spec}: no images in {len(urls)} tars{why}")
    classes = class_names(by_split.get("train") or every, f"`data` {spec}")
    if classes and all(isinstance(e.name, int) for e in every if e.name is not None):
        classes = class_names(every, f"`data` {spec}")
    tables = {s: listing(entries, classes, f"`data` {spec}, split {s}", notes) for s, entries in by_split.items()}
    if remote:  # read each tar once, from its beginning to its end
        tables = {split: table.take(_far_order(table)) for split, table in tables.items()}
    if "train" in tables:
        empty_classes(classes, tables["train"], notes)
    return Source(spec, classes, tables, read, notes, in_order=remote)


def _list(url: str) -> Listing:
    """One tar's images."""
    tally, found = Tally(), Listing()
    with open_archive(url, tally) as archive:
        for name, sample in _samples(archive, url, tally).items():
            where = f"{url}: {spelled(name)}"
            found.images.append(_image(sample, where, tally))
            found.labels.append(_label(archive, sample, found.images[-1], where))
    found.notes = tally.found
    return found


class TarReader:
    """Reads members by (container, offset, size). Few files stay open: a set may have thousands."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._odd: dict[tuple[int, int], Pieces | str] = {}  # of members that are no plain run of bytes
        self._open = Cached(storage.open_ranges, 16 if any(map(storage.is_remote, urls)) else 64)

    def entry(self, source: str, member: Member, container: int, shift: int = 0) -> Entry:
        """The input that a member is, and what this reader has to know of it.

        Args:
            shift: offset of the member's tar, where that lies in another.
        """
        offset = member.offset + shift
        if member.odd is not None:
            self._odd[container, offset] = member.odd
        return Entry(source, None, -1 if isinstance(member.odd, str) else member.size, container, offset)

    def __call__(self, row: dict[str, Any]) -> tuple[bytes, None]:
        url, offset = self._urls[row["container"]], row["offset"]
        odd = self._odd.get((row["container"], offset))
        return member_bytes(self._open(url).read, offset, row["size"], odd, url, row["source"]), None


def split_of(url: str) -> tuple[str, str]:
    """The split of a tar, and why: whole words of its name decide, else the one such word of its folder's name.

    A folder called test-run or latest_tests is nobody's test split: there, test counts only as the whole name.
    """
    folder, _, name = url.rpartition("/")
    words = _words(name.removesuffix(".tar"))
    word = next((w for split in ("train", "val", "test") for w in words if SPLIT_WORDS.get(w) == split), None)
    if word:
        return SPLIT_WORDS[word], f"by the word {word} in their names"
    words = _words(folder.rpartition("/")[2])
    found = {w for w in words if w in SPLIT_WORDS}
    if len({SPLIT_WORDS[w] for w in found}) == 1 and (found != {"test"} or len(words) == 1):
        return SPLIT_WORDS[min(found)], f"by the word {min(found)} in their folder's name"
    return "train", "without such a word"


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def _split_notes(urls: list[str]) -> list[str]:
    """Which tars went where, if not all to train."""
    counts = Counter(split_of(url) for url in urls)
    if all(split == "train" for split, _ in counts):
        return []
    return [f"split {split}: {count} tars {why}" for (split, why), count in counts.items()]


def _far_order(table: pa.Table) -> np.ndarray:
    return np.lexsort((table["offset"].to_numpy(), table["container"].to_numpy()))


def _samples(archive: Archive, url: str, tally: Tally) -> dict[str, dict[str, Any]]:
    """Sample name -> ending of its name -> image Member, or the bytes of its label.

    Of equal names the last counts, for images and labels alike, as when the tar is unpacked.
    """
    samples: dict[str, dict[str, Any]] = {}
    for member in archive:
        match = _SAMPLE_NAME.fullmatch(member.name.removeprefix("./"))
        if match is None:
            continue
        name, ending = match.groups()
        sample = samples.setdefault(name, {})
        stem, dot, last = ending.rpartition(".")
        if last.lower() in LABELS:
            ending = stem + dot + last.lower()
        elif not is_image("." + ending):
            continue
        if ending in sample:
            tally.add(REPLACED, f"{url}: {spelled(member.name)}")
        # A label is read while its place in the tar is near; that of a link is not known yet.
        # What has further dots, x.v0.cls, may be an annotation of any size: it is read if x.v0.jpg is the image.
        sample[ending] = _label_bytes(archive, member, url) if ending in LABELS else member
    archive.follow(part for sample in samples.values() for part in sample.values() if isinstance(part, Member))
    pictured = {name: s for name, s in samples.items() if not all(map(_is_label, s))}
    if len(pictured) < len(samples):
        odd = next(name for name in samples if name not in pictured)
        tally.add(_NO_IMAGE, f"{url}: {spelled(odd)}", len(samples) - len(pictured))
    return pictured


def _is_label(ending: str) -> bool:
    return ending.rpartition(".")[2] in LABELS


def _label_bytes(archive: Archive, member: Member, url: str) -> bytes | Member:
    if member.target is not None:
        return member
    if isinstance(member.odd, str) or member.size > MAX_LABEL_BYTES:
        why = member.odd if isinstance(member.odd, str) else f"expected a label, got {member.size} bytes"
        raise TicketSetError(f"{url}: {spelled(member.name)}: {why}")
    return archive.read(member)


def _image(sample: dict[str, Any], where: str, tally: Tally) -> Member:
    """The member with the plainest name: x.jpg before x.seg.png, whichever comes first."""
    images = [part for ending, part in sample.items() if not _is_label(ending)]
    plainest = min(image.name.count(".") for image in images)
    image: Member = next(image for image in images if image.name.count(".") == plainest)
    for other in images:
        if other is not image:
            second = other.name.count(".") == plainest
            tally.add(_SECOND if second else _PART, f"{where}: {spelled(other.name)}")
    return image


def _label(archive: Archive, sample: dict[str, Any], image: Member, where: str) -> int | str | None:
    """Of the member that is called as the image, x.v0.cls of x.v0.jpg, else of the sample's own."""
    ending = next(ending for ending, part in sample.items() if part is image)
    own = [f"{ending.rpartition('.')[0]}.{kind}" for kind in LABELS]
    found = next((name for name in (*own, *LABELS) if name in sample), None)
    if found is None:
        return None
    kind, data = found.rpartition(".")[2], sample[found]
    if isinstance(data, Member):
        data = _label_bytes(archive, data, where)
    if kind == "cls":
        match = _DIGITS.fullmatch(data)
        if match is None or len(match[1]) > 18:
            got = data[:40].decode("ascii", "backslashreplace")
            raise TicketSetError(f"{where}: expected digits in .cls or an object in .json, got {got!r}")
        return int(match[1])
    try:
        value = json.loads(data).get("label")
    except (ValueError, AttributeError, RecursionError):
        raise TicketSetError(f"{where}: expected digits in .cls or an object in .json") from None
    if value is None or (isinstance(value, str) and value.strip()) or (type(value) is int and 0 <= value < MAX_CLASSES):
        return value
    raise TicketSetError(
        f"{where}: expected a name or a number in its json's label, got {repr(value)[:40]};"
        f" numbers go from 0 to {MAX_CLASSES - 1}"
    )
