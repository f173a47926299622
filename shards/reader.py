"""Reading a ticket set: the manifest, the index as tables, the samples in stored order or by their place.

A linked set has no images of its own. Its samples take theirs from the base set, found at the path
its manifest holds (or `base`), joined by key within shards of the same name. Token labels may be in the
set itself, in its base, or in a further link beside it.

A set may come from anywhere: JSON is checked by `shards.schema`, the index by `shards.index`, and what a sample holds
by `shards.sample`.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from shards import format as fmt
from shards import schema, storage
from shards.errors import TicketSetError
from shards.index import read_index
from shards.ranked import Mosaic, Ranked
from shards.sample import Row, Sample, bytes_before_views, decode, decode_token_labels
from shards.schema import Manifest
from shards.tar import BLOCK, member_places, split_members

INDEXED = ["key", "label", "height", "width", "source", "offset", "bytes"]  # columns that `joined` hands on
# What a person may call a sample, the first that there is: its key, its file, that file as seen from elsewhere.
_MEANINGS: tuple[Callable[[pa.Table, str], Any], ...] = (
    lambda table, name: pc.equal(table["key"], name),
    lambda table, name: pc.equal(table["source"], name),
    lambda table, name: pa.array([name.endswith(f"/{source}") for source in table["source"].to_pylist()], pa.bool_()),
)
EXTENTS = ("offset", "bytes", "base_offset", "base_bytes", "labels_offset", "labels_bytes")


class TicketSet:
    """A finished ticket set. Use `TicketSet.open`.

    Attributes:
        url: where it is.
        manifest: what manifest.json says.
        base: the set that holds the images, where this one is linked.
    """

    def __init__(self, url: str, manifest: Manifest, base: "TicketSet | None") -> None:
        self.url, self.manifest, self.base = url, manifest, base

    @classmethod
    def open(cls, url: str, base: str | None = None, images: bool = True) -> "TicketSet":
        """Open a finished set.

        Args:
            url: a folder, or an fsspec URL of one.
            base: where the base of a linked set is now; by default where the manifest says.
            images: False leaves the base of a linked set alone; its samples then have no image.
        Raises:
            TicketSetError: not a ticket set, not finished, of a newer major format, or its base is missing or changed.
        """
        url = storage.local(str(url)).rstrip("/") or "/"
        manifest = _read_manifest(url)
        link = manifest.base
        if link is None or not images:
            return cls(url, manifest, None)
        where = base or resolve_base(url, link.path)
        try:
            base_manifest = _read_manifest(where)
        except TicketSetError as error:
            raise TicketSetError(
                f"{url}: its images are in a base set that cannot be opened ({error}); name its place with `base`"
            ) from None
        if base_manifest.base is not None:
            raise TicketSetError(
                f"{url}: its base {where} is a linked set itself; expected the set that holds the images"
            )
        if base_manifest.set_id != link.set_id:
            raise TicketSetError(
                f"{url}: base set {where} has changed: expected set_id {link.set_id[:12]},"
                f" got {base_manifest.set_id[:12]}; mine this link again"
            )
        return cls(url, manifest, cls(storage.local(where).rstrip("/"), base_manifest, None))

    @property
    def k(self) -> int:
        """K, patches in a ticket."""
        return self.manifest.k

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw)"""
        return self.manifest.grid

    @property
    def num_patches(self) -> int:
        """N = gh * gw"""
        return self.manifest.num_patches

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return list(self.manifest.classes)

    def class_name(self, label: int | None) -> str:
        """Name of a class; "-" for an image without a label."""
        return "-" if label is None else self.manifest.classes[label]

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest.splits)

    @property
    def exif(self) -> str:
        """ "ignore" or "apply": the frame that boxes refer to."""
        return self.manifest.exif

    @property
    def base_id(self) -> str:
        """set_id of the set that holds the images: this one, or the one it links to."""
        return (self.manifest.base or self.manifest).set_id

    @property
    def has_token_labels(self) -> bool:
        """Whether its own tars hold token labels; those of its base do not count."""
        return fmt.TOKEN_LABELS in self.manifest.members

    @property
    def has_tickets(self) -> bool:
        """Whether there are rankings; a linked set may hold token labels alone."""
        return fmt.RANKING in self.manifest.members

    @property
    def says_spread(self) -> bool:
        """Whether its index says how each view's scores are spread, where they are a distribution."""
        return self.has_tickets and self.manifest.format >= fmt.SPREAD_FORMAT

    @property
    def holds_whole_views(self) -> bool:
        """Whether any patch of a view can be had; of ranked views the last may be cut off."""
        return self.stored_tokens == self.num_patches

    @property
    def stored_tokens(self) -> int:
        """Patches of a view that can be had, best first: N, but for ranked views that were cut."""
        return self.manifest.ranked.tokens if self.manifest.ranked else self.num_patches

    def require_tickets(self) -> None:
        """
        Raises:
            TicketSetError: the set holds token labels alone.
        """
        if not self.has_tickets:
            raise TicketSetError(f"{self.url}: expected a set with tickets, got one of token labels alone")

    def check_unchanged(self) -> None:
        """Hold what is there now against what was opened; call it after a file of the set was opened.

        Mining anew takes the manifest away before it touches a shard, so a file opened before this passes is of this set.

        Raises:
            TicketSetError: the set was mined anew, or is being.
        """
        try:
            found = _read_manifest(self.url).set_id
        except TicketSetError as error:
            raise TicketSetError(f"{self.url}: changed while it was read: {error}") from None
        if found != self.manifest.set_id:
            raise TicketSetError(
                f"{self.url}: mined anew while it was read: expected set_id {self.manifest.set_id[:12]},"
                f" got {found[:12]}; start again on the new set"
            )

    def shard_names(self, split: str) -> list[str]:
        """Stems of a split's shards, in order.

        Raises:
            TicketSetError: no such split.
        """
        if split not in self.manifest.splits:
            raise TicketSetError(f"{self.url}: expected a split of {self.splits}, got {split!r}")
        return [fmt.shard_name(split, i) for i in range(self.manifest.splits[split].shards)]

    def shard_table(self, name: str) -> pa.Table:
        """The index of one shard, one row per input sample.

        Raises:
            TicketSetError: it is missing, or not what an index should be.
        """
        url = storage.join(self.url, fmt.INDEX, f"{name}.parquet")
        try:
            views = self.manifest.splits[name.rpartition("-")[0]].views if self.says_spread else None
            return read_index(storage.read_bytes(url), url, self.num_patches, len(self.manifest.classes), views)
        except FileNotFoundError:
            raise TicketSetError(f"{url}: missing; expected the index of shard {name}") from None

    def table(self, split: str) -> pa.Table:
        """The index of a split: the columns of docs/FORMAT.md and `shard`."""
        tables = []
        for name in self.shard_names(split):
            table = self.shard_table(name).replace_schema_metadata(None)
            tables.append(table.append_column("shard", pa.array([name] * len(table), pa.string())))
        return pa.concat_tables(tables, promote_options="default")

    def stream(self, split: str) -> Iterator[Sample]:
        """Every sample of a split that succeeded, in stored order."""
        for name in self.shard_names(split):
            yield from self.stream_shard(name)

    def stream_shard(self, name: str, keys: set[str] | None = None) -> Iterator[Sample]:
        """The samples of one shard in stored order; with `keys`, only these."""
        table = self.joined(name)
        scattered = keys is not None and len(keys) < len(table) / 4
        reader = SampleReader(self, open_tar=lambda url, _: storage.open_ranges(url, scattered))
        for row in rows_of(table):
            if keys is None or row.key in keys:
                yield reader.read(name, row)

    def joined(self, name: str, token_labels: "TicketSet | None" = None) -> pa.Table:
        """One shard's samples that succeeded, in stored order, with the place of each part of them.

        Args:
            name: of the shard.
            token_labels: another set over the same images that holds the token labels; samples that it lacks are left out.
        Returns:
            key, label, height, width, source; offset and bytes in the set's own tar; base_offset and base_bytes in the
            tar that holds the image, which is the base's in a linked set; labels_offset and labels_bytes in the tar of
            `token_labels`, where it is given.
        Raises:
            TicketSetError: the base lacks an image, or its image has another size than the index of the link says.
        """
        own = _ok(self, name)
        # By key, never by place: a link may lack samples of its base.
        base = own if self.base is None else _ok(self.base, name)
        places = pc.index_in(own["key"], base["key"])
        if self.base is not None and places.null_count:
            missing = own.filter(pc.is_null(places))["key"][0].as_py()
            raise TicketSetError(f"{self.base.url}: expected an image of {missing}, which {self.url} links to")
        found = base.take(places)
        for column in ("height", "width", "label"):
            if self.base is not None and found[column] != own[column]:
                raise TicketSetError(
                    f"{self.url}: {name}: its index has another {column} of an image than {self.base.url}"
                )
        own = own.append_column("base_offset", found["offset"]).append_column("base_bytes", found["bytes"])
        if token_labels is None:
            return own
        theirs = token_labels.joined(name)
        own = own.filter(pc.is_in(own["key"], theirs["key"]))
        found = theirs.take(pc.index_in(own["key"], theirs["key"]))
        return own.append_column("labels_offset", found["offset"]).append_column("labels_bytes", found["bytes"])

    def find(self, key: str, split: str | None = None) -> tuple[str, dict[str, Any]]:
        """(split, row of the index) of one key, or of the file that a sample was mined from.

        Args:
            key: or, where there is no such key, a source path, also one that goes on to its left: photos/train/a.jpg.
        Raises:
            TicketSetError: no such key, or it stands in several splits.
        """
        wanted = key.encode("utf-8", "backslashreplace").decode()
        tables = {name: self.table(name) for name in ([split] if split else self.splits)}
        for is_meant in _MEANINGS:
            hits = [
                (name, row)
                for name, table in tables.items()
                for row in table.filter(is_meant(table, wanted)).to_pylist()
            ]
            if len(hits) == 1:
                return hits[0]
            if hits:
                several = ", ".join(f"{row['key']} in {name}" for name, row in hits[:3])
                raise TicketSetError(f"{self.url}: {key!r} is {several}; give a key, and its `split`")
        raise TicketSetError(f"{self.url}: no sample has the key {key!r}; `datalth-shards ls` lists them")

    def ok_keys(self, name: str) -> list[str]:
        """Keys of one shard's samples that succeeded, in stored order."""
        keys: list[str] = _ok(self, name)["key"].to_pylist()
        return keys


class SampleReader:
    """Reads samples by their place; reading in stored order and in any other both come down to it.

    A tar is opened when a sample of it is asked for, and the last few stay open.

    Args:
        opened: the set.
        token_labels: another set over the same images, whose token labels the samples get.
        keep: tars that stay open; by default those of one shard and its base.
        open_tar: (url of a tar, its set) -> the tar; by default `storage.open_ranges` of the URL.
    """

    def __init__(
        self,
        opened: TicketSet,
        token_labels: TicketSet | None = None,
        keep: int = 2,
        open_tar: Callable[[str, TicketSet], storage.Ranges] | None = None,
    ) -> None:
        self._made_of = opened, token_labels, keep, open_tar
        self._set, self._link, self._open_tar = opened, token_labels, open_tar
        holders = (token_labels, opened, opened.base)
        self._labels = next((each for each in holders if each is not None and each.has_token_labels), None)
        self._kept, self._opening = functools.lru_cache(keep)(self._open_unchanged), threading.Lock()
        self._mosaic = Mosaic.of(opened.manifest) if opened.manifest.ranked else None
        self._before = functools.cache(functools.partial(bytes_before_views, opened.manifest))

    def __reduce__(self) -> tuple[Any, ...]:
        """Open tars stay behind when it is sent to another process."""
        return SampleReader, self._made_of

    @property
    def has_token_labels(self) -> bool:
        """Whether samples come with token labels."""
        return self._labels is not None

    def open(self, name: str) -> None:
        """Open the tars of a shard now.

        Raises:
            TicketSetError: one is missing, or its set was mined anew.
        """
        for each in (self._set, self._set.base, self._link):
            if each is not None:
                self._open(each, name)

    def read(self, name: str, row: Row, numbers: Sequence[int] | None = None) -> Sample:
        """One sample.

        Args:
            name: of its shard.
            row: of `rows_of(opened.joined(name, token_labels))`.
            numbers: of the views that will be used: only their boxes and rankings are checked. None: all.
        Raises:
            TicketSetError: as `open`, or a tar is not what the index says.
        """
        opened, base, views = self._set, self._set.base, None
        if self._mosaic is None:
            members, where = self._members(opened, name, row, 0)
        else:
            members, views, where = self._before_views(name, row, self._mosaic)
        pictured: dict[str, bytes] | None = members
        if base is not None:
            pictured, where = self._members(base, name, row, 2)
        elif opened.manifest.base is not None:
            pictured = None  # opened without images
        labels = None
        if self._labels is not None:
            held, place = (members if self._labels is opened else pictured), where
            if self._labels is self._link:
                held, place = self._members(self._link, name, row, 4)
            assert held is not None
            labels = decode_token_labels(self._labels.manifest, held, place)
        split = name.rpartition("-")[0]
        return decode(row, opened.manifest, split, members, pictured, labels, where, views, numbers)

    def head(self, name: str, row: Row) -> tuple[storage.Ranges, int, int]:
        """What stands before the views of a sample of ranked views: file, first byte, bytes.

        Raises:
            TicketSetError: as `open`.
        """
        offset, size = row.extents[:2]
        before = self._before(name.rpartition("-")[0], row.label is not None)
        return self._open(self._set, name)[0], offset, min(size, before)

    def _before_views(self, name: str, row: Row, mosaic: Mosaic) -> tuple[dict[str, bytes], Ranked, str]:
        """What stands before the views of a sample of ranked views, the views, not yet read, and where they are, for errors."""
        tar, offset, before = self.head(name, row)
        url, size = self._open(self._set, name)[1], row.extents[1]
        where = f"{url}: {row.key}"
        data = tar.read(offset, before)
        places = member_places(data, row.key, url, size)
        if fmt.RANKED not in places and before < size:  # others stand before it, of a higher minor version
            data = tar.read(offset, size)
            places = member_places(data, row.key, url)
        members = {member: data[start : start + length] for member, (start, length) in places.items()}
        start, length = places.get(fmt.RANKED, (0, 0))
        if start + -(-length // BLOCK) * BLOCK != size:
            raise TicketSetError(f"{where}: expected ranked views last, got {sorted(places)}")
        count = self._set.manifest.splits[name.rpartition("-")[0]].views
        table = data[start : start + count * mosaic.entry.itemsize]
        return members, Ranked(mosaic, table, count, tar, offset + start, length, where), where

    def _members(self, opened: TicketSet, name: str, row: Row, at: int) -> tuple[dict[str, bytes], str]:
        """The members of a sample in one of its tars, and where they are, for errors. `at`: place of the extent."""
        tar, url = self._open(opened, name)
        return split_members(tar.read(row.extents[at], row.extents[at + 1]), row.key, url), f"{url}: {row.key}"

    def _open(self, opened: TicketSet, name: str) -> tuple[storage.Ranges, str]:
        with self._opening:  # or each thread would open the same tar
            return self._kept(opened, name)

    def _open_unchanged(self, opened: TicketSet, name: str) -> tuple[storage.Ranges, str]:
        url = storage.join(opened.url, f"{name}.tar")
        try:
            tar = self._open_tar(url, opened) if self._open_tar else storage.open_ranges(url)
        except FileNotFoundError:
            opened.check_unchanged()
            raise TicketSetError(f"{url}: missing; the index lists its samples") from None
        opened.check_unchanged()  # the index was read before, so both are of this set
        return tar, url


def rows_of(table: pa.Table) -> Iterator[Row]:
    """The rows of `TicketSet.joined`."""
    names = ["key", "label", "height", "width", *(name for name in EXTENTS if name in table.column_names)]
    for key, label, height, width, *extents in zip(*(table[name].to_pylist() for name in names), strict=True):
        yield Row(key, label, height, width, extents)


def _ok(opened: TicketSet, name: str) -> pa.Table:
    table = opened.shard_table(name)
    return table.filter(pc.equal(table["status"], "ok")).select(INDEXED)


def resolve_base(url: str, path: str) -> str:
    """Where the base of a linked set is: a relative path starts at the set's own folder.

    A downloaded manifest decides what is opened here. So the base of a local set is a local path, that of a remote set
    is on the same store; another place is the user's to name, as `base`.

    Raises:
        TicketSetError: it is elsewhere.
    """
    advice = "name its place with `base` if you trust it"
    if not storage.is_remote(url):
        if "://" in path or "::" in path:
            raise TicketSetError(
                f"{url}: its base is said to be at {path}, but a local set's is a local folder; {advice}"
            )
        return os.path.normpath(os.path.join(url, path))
    scheme, _, tail = url.partition("://")
    parts = tail.split("/")
    store = f"{scheme}://{parts[0]}/"
    if path.startswith(store) and "::" not in path:
        parts, path = [parts[0]], path.removeprefix(store)
    if "://" in path or "::" in path or path.startswith("/"):
        raise TicketSetError(f"{url}: its base is said to be at {path}, expected a place on {store}; {advice}")
    for step in path.split("/"):  # URLs know no `..`; walk it up
        parts = parts[:-1] if step == ".." else parts if step == "." else [*parts, step]
        if not parts:
            raise TicketSetError(f"{url}: its base is said to be at {path}, above {store}; {advice}")
    return f"{scheme}://{'/'.join(parts)}"


def _read_manifest(url: str) -> Manifest:
    where = storage.join(url, fmt.MANIFEST)
    try:
        return schema.parse_manifest(storage.read_bytes(where, schema.MAX_JSON_BYTES), where)
    except (FileNotFoundError, NotADirectoryError):
        if storage.exists(storage.join(url, fmt.PLAN)):
            raise TicketSetError(
                f"{url}: this ticket set is not finished (no {fmt.MANIFEST}); run its datalth-mine command again"
            ) from None
        raise TicketSetError(f"{url}: expected a ticket set, found no {fmt.MANIFEST}") from None
