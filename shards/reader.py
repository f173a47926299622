"""Reading a ticket set: the manifest, the index as tables, the samples as a stream.

A linked set has no images of its own. Its samples take theirs from the base set, found at the path
its manifest holds (or `base`), joined by key within shards of the same name. Token labels may be in the
set itself, in its base, or in a further link beside it (`shards.rows.Rows`).

A set may come from anywhere: JSON is checked by `shards.schema`, the index by `shards.index`, and what a sample holds
where it is read, here.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import format as fmt
from shards import schema, storage, token_labels
from shards.errors import ImageError, TicketSetError
from shards.images import decode, render_pixels
from shards.index import read_index
from shards.schema import Manifest
from shards.tar import split_members


class Row(NamedTuple):
    """What the index says of a sample, and its members are checked against.

    Attributes:
        key: of the sample.
        label: class index; None where the image has none.
        height: of the image in the frame that boxes refer to, in pixels.
        width: as `height`.
    """

    key: str
    label: int | None
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its tickets.

    Attributes:
        key: of the sample.
        image: encoded, as stored.
        label: class index; None where the image has none.
        views: int32 [V, 5], columns top, left, height, width, flip.
        rankings: [V, N] patch indices, most informative first; [V, 0] where the set holds token labels alone.
        k: patches in a ticket.
        size: height and width of the image in the frame that boxes refer to.
        exif: "ignore" or "apply": which frame that is.
        token_labels: uint16 [2, T, G, G] as `shards.token_labels` says; None where neither set nor base has them.
    """

    key: str
    image: bytes
    label: int | None
    views: np.ndarray
    rankings: np.ndarray
    k: int
    size: tuple[int, int]
    exif: str
    token_labels: np.ndarray | None = None

    @property
    def tickets(self) -> np.ndarray:
        """[V, K]: the first K of each ranking."""
        return self.rankings[:, : self.k]

    def pixels(self) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3], in the frame that boxes refer to.

        Raises:
            ImageError: it cannot be decoded, or is not of the size that the index says.
        """
        pixels = decode(self.image, self.exif)
        if pixels.shape[:2] != self.size:
            (height, width), found = self.size, pixels.shape
            raise ImageError(f"{self.key}: expected an image of {width}x{height} pixels, got {found[1]}x{found[0]}")
        return pixels

    def render(self, views: int | Sequence[int], size: int) -> np.ndarray:
        """The pixels of stored views, as the selector saw them and a student is fed them.

        Args:
            views: number of a view, or several numbers, which then share one decode.
            size: S, pixels of a side.
        Returns:
            uint8 [S, S, 3], or [n, S, S, 3] of n numbers.
        Raises:
            ImageError: as `pixels`.
        """
        rendered = render_pixels(self.pixels(), self.views[np.atleast_1d(views)], size)
        return rendered[0] if np.ndim(views) == 0 else rendered


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
                f"{url}: its images are in a base set that cannot be opened ({error}); name its place with --base"
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
        return fmt.TOKEN_LABELS in self.manifest.members

    @property
    def has_tickets(self) -> bool:
        return fmt.RANKING in self.manifest.members

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
            return read_index(storage.read_bytes(url), url, self.num_patches, len(self.manifest.classes))
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
        read = self.open_shard(name)
        for row in self.joined(name).to_pylist():
            if keys is None or row["key"] in keys:
                yield read(row)

    def joined(self, name: str) -> pa.Table:
        """One shard's samples that succeeded, in stored order, with the place of each one's image.

        Returns:
            key, label, height, width; offset and bytes in the set's own tar; base_offset and base_bytes in the tar that
            holds the image, which is the base's in a linked set.
        Raises:
            TicketSetError: the base lacks an image, or its image has another size than the index of the link says.
        """
        own = _ok(self, name)
        if self.base is None:
            return own.append_column("base_offset", own["offset"]).append_column("base_bytes", own["bytes"])
        base = _ok(self.base, name)
        places = pc.index_in(own["key"], base["key"])
        if places.null_count:
            missing = own.filter(pc.is_null(places))["key"][0].as_py()
            raise TicketSetError(f"{self.base.url}: expected an image of {missing}, which {self.url} links to")
        found = base.take(places)
        for column in ("height", "width", "label"):
            if found[column] != own[column]:
                raise TicketSetError(
                    f"{self.url}: {name}: its index has another {column} of an image than {self.base.url}"
                )
        return own.append_column("base_offset", found["offset"]).append_column("base_bytes", found["bytes"])

    def open_shard(self, name: str) -> Callable[[dict[str, Any]], Sample]:
        """Open the tars of one shard.

        Returns:
            A function: a row of `joined` -> its sample; raises as `sample`.
        Raises:
            TicketSetError: a tar is missing, or the set was mined anew.
        """
        own_url = storage.join(self.url, f"{name}.tar")
        own = _open_tar(own_url)
        image_url = storage.join(self.base.url, f"{name}.tar") if self.base else own_url
        images = _open_tar(image_url) if self.base else own
        self.check_unchanged()
        if self.base:
            self.base.check_unchanged()

        def read(row: dict[str, Any]) -> Sample:
            said = Row(*(row[field] for field in Row._fields))
            members = split_members(own.read(row["offset"], row["bytes"]), said.key, own_url)
            pictured = members
            if self.base:
                pictured = split_members(images.read(row["base_offset"], row["base_bytes"]), said.key, image_url)
            return self.sample(name, said, members, pictured, image_url)

        return read

    def find(self, key: str, split: str | None = None) -> tuple[str, dict[str, Any]]:
        """(split, row of the index) of one key.

        Raises:
            TicketSetError: no such key, or it stands in several splits.
        """
        hits = []
        for name in [split] if split else self.splits:
            table = self.table(name)
            row = pc.index(table["key"], key.encode("utf-8", "backslashreplace").decode()).as_py()
            if row >= 0:
                hits.append((name, table.slice(row, 1).to_pylist()[0]))
        if not hits:
            raise TicketSetError(f"{self.url}: no sample has the key {key!r}; `datalth-shards ls` lists them")
        if len(hits) > 1:
            raise TicketSetError(f"{self.url}: {key!r} is in {[h[0] for h in hits]}; say which with --split")
        return hits[0]

    def ok_keys(self, name: str) -> list[str]:
        """Keys of one shard's samples that succeeded, in stored order."""
        return _ok(self, name)["key"].to_pylist()

    def sample(self, name: str, row: Row, members: dict[str, bytes], pictured: dict[str, bytes], where: str) -> Sample:
        """A sample from the members of its own tar and of the tar that holds its image.

        Args:
            name: of its shard.
            row: what the index says of it.
            members: of its own tar.
            pictured: of the tar that holds its image.
            where: for errors.
        Raises:
            TicketSetError: a member is missing, or is not what manifest and index say: rankings that are no
                permutations, boxes outside the image, another label.
        """
        where = f"{where}: {row.key}"
        image = next((pictured[m] for m in fmt.IMAGE_MEMBERS if m in pictured), None)
        if image is None and self.manifest.base and self.base is None:
            image = b""  # opened without images
        boxes = (members if self.has_tickets else pictured).get(fmt.VIEWS)
        if image is None or boxes is None or (self.has_tickets and fmt.RANKING not in members):
            raise TicketSetError(f"{where}: expected an image, a ranking and views, got {sorted(pictured)}")
        _check_label(members.get(fmt.LABEL), row.label, where)
        count = self.manifest.splits[name.rpartition("-")[0]].views
        views = fmt.decode_npy(boxes, where)
        _check_views(views, count, row, where)
        if self.has_tickets:
            rankings = fmt.decode_npy(members[fmt.RANKING], where)
            _check_rankings(rankings, count, self.num_patches, where)
        else:
            rankings = np.empty((count, 0), np.uint8)
        labels = self.token_labels(row.key, members, where)
        if labels is None and self.base is not None:
            labels = self.base.token_labels(row.key, pictured, where)
        size = (row.height, row.width)
        return Sample(row.key, image, row.label, views, rankings, self.k, size, self.exif, labels)

    def token_labels(self, key: str, members: dict[str, bytes], where: str) -> np.ndarray | None:
        """uint16 [2, T, G, G] among the members of a sample of this very set; None where the set has none.

        Raises:
            TicketSetError: the member is missing, or is not what the manifest says.
        """
        if self.manifest.token_labels is None or not self.has_token_labels:
            return None
        if fmt.TOKEN_LABELS not in members:
            raise TicketSetError(f"{where}: expected token labels, got {sorted(members)}")
        num_classes = len(self.manifest.classes)
        shape = token_labels.shape(num_classes, self.manifest.token_labels.grid[0])
        return token_labels.decode(members[fmt.TOKEN_LABELS], shape, num_classes, where)


def _ok(opened: TicketSet, name: str) -> pa.Table:
    table = opened.shard_table(name)
    return table.filter(pc.equal(table["status"], "ok")).select(["key", "label", "height", "width", "offset", "bytes"])


def _check_label(digits: bytes | None, label: int | None, where: str) -> None:
    expected = None if label is None else str(label).encode("ascii")
    if digits != expected:
        raise TicketSetError(f"{where}: expected label {label} (index) in .cls, got {digits and digits[:20]!r}")


def _check_views(views: np.ndarray, count: int, row: Row, where: str) -> None:
    if views.dtype != np.int32 or views.shape != (count, len(fmt.VIEW_COLUMNS)):
        raise TicketSetError(
            f"{where}: expected int32 boxes of {count} views, got {views.dtype} of shape {list(views.shape)}"
        )
    for number, (top, left, height, width, flip) in enumerate(views.tolist()):  # faster than numpy on so few numbers
        inside = 0 <= top <= row.height - height and 0 <= left <= row.width - width
        if not (inside and height > 0 and width > 0 and 0 <= flip <= 1):
            raise TicketSetError(f"{where}: view {number} is not inside the {row.width}x{row.height} image")


def _check_rankings(rankings: np.ndarray, count: int, num_patches: int, where: str) -> None:
    expected = fmt.ranking_dtype(num_patches)
    if rankings.dtype != expected or rankings.shape != (count, num_patches):
        raise TicketSetError(
            f"{where}: expected {expected} rankings of {count} views and {num_patches} patches, got {rankings.dtype}"
            f" {list(rankings.shape)}"
        )
    most = 1 << 8 * expected.itemsize  # whatever the type can hold
    seen = np.zeros(count * most, bool)
    seen[rankings + _first_places(count, most)] = True
    if not seen.reshape(count, most)[:, :num_patches].all():
        raise TicketSetError(f"{where}: expected rankings that are permutations of {num_patches} patches")


@functools.lru_cache(maxsize=8)
def _first_places(count: int, most: int) -> np.ndarray:
    return np.arange(0, count * most, most)[:, None]


def resolve_base(url: str, path: str) -> str:
    """Where the base of a linked set is: a relative path starts at the set's own folder.

    A downloaded manifest decides what is opened here. So the base of a local set is a local path, that of a remote set
    is on the same store; another place is the user's to name, with --base.

    Raises:
        TicketSetError: it is elsewhere.
    """
    advice = "name its place with --base if you trust it"
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


def _open_tar(url: str) -> storage.Ranges:
    try:
        return storage.open_ranges(url)
    except FileNotFoundError:
        raise TicketSetError(f"{url}: missing; the index lists its samples") from None


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
