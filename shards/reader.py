"""Reading a ticket set: the manifest, the index as tables, the samples as a stream.

A linked set has no images of its own. Its samples take theirs from the base set, found at the path
its manifest holds (or `base`), joined by key within shards of the same name. Token labels may be in the
set itself, in its base, or in a further link beside it (`shards.rows.Rows`).
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards import format as fmt
from shards import storage, token_labels
from shards.errors import TicketSetError, first_line
from shards.tar import split_members


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
        token_labels: uint16 [2, T, G, G] as `shards.token_labels` says; None where neither set nor base has them.
    """

    key: str
    image: bytes
    label: int | None
    views: np.ndarray
    rankings: np.ndarray
    k: int
    token_labels: np.ndarray | None = None

    @property
    def tickets(self) -> np.ndarray:
        """[V, K]: the first K of each ranking."""
        return self.rankings[:, : self.k]


MANIFEST_FIELDS: dict[str, Any] = {
    **dict.fromkeys(["splits", "totals", "selector", "plan", "members"], dict),
    **dict.fromkeys(["k", "img_size", "patch_size", "seed"], int),
    **dict.fromkeys(["exif", "set_id", "plan_id"], str),
    **dict.fromkeys(["grid", "classes"], list),
    "base": (dict, type(None)),
    "store_side": (int, type(None)),
}


class TicketSet:
    """A finished ticket set. Use `TicketSet.open`.

    Attributes:
        url: where it is.
        manifest: manifest.json as a dict.
        base: the set that holds the images, where this one is linked.
    """

    def __init__(self, url: str, manifest: dict[str, Any], base: "TicketSet | None") -> None:
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
        link = manifest["base"]
        if link is None or not images:
            return cls(url, manifest, None)
        where = base or resolve_base(url, link["path"])
        try:
            base_set = cls.open(where)
        except TicketSetError as error:
            raise TicketSetError(
                f"{url}: its images are in a base set that cannot be opened ({error}); name its place with --base"
            ) from None
        if base_set.manifest["set_id"] != link["set_id"]:
            raise TicketSetError(
                f"{url}: base set {where} has changed: expected set_id {link['set_id'][:12]},"
                f" got {base_set.manifest['set_id'][:12]}; mine this link again"
            )
        return cls(url, manifest, base_set)

    @property
    def k(self) -> int:
        """K, patches in a ticket."""
        return self.manifest["k"]

    @property
    def grid(self) -> tuple[int, int]:
        """(gh, gw)"""
        return tuple(self.manifest["grid"])

    @property
    def num_patches(self) -> int:
        """N = gh * gw"""
        return self.grid[0] * self.grid[1]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of their labels."""
        return self.manifest["classes"]

    @property
    def splits(self) -> list[str]:
        """Names of the splits."""
        return list(self.manifest["splits"])

    @property
    def exif(self) -> str:
        """ "ignore" or "apply": the frame that boxes refer to; pass it to `render_view`."""
        return self.manifest["exif"]

    @property
    def base_id(self) -> str:
        """set_id of the set that holds the images: this one, or the one it links to."""
        return (self.manifest["base"] or self.manifest)["set_id"]

    @property
    def has_token_labels(self) -> bool:
        return fmt.TOKEN_LABELS in self.manifest["members"]

    @property
    def has_tickets(self) -> bool:
        return fmt.RANKING in self.manifest["members"]

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
            found = _read_manifest(self.url)["set_id"]
        except TicketSetError as error:
            raise TicketSetError(f"{self.url}: changed while it was read: {error}") from None
        if found != self.manifest["set_id"]:
            raise TicketSetError(
                f"{self.url}: mined anew while it was read: expected set_id {self.manifest['set_id'][:12]},"
                f" got {found[:12]}; start again on the new set"
            )

    def shard_names(self, split: str) -> list[str]:
        """Stems of a split's shards, in order.

        Raises:
            TicketSetError: no such split.
        """
        if split not in self.manifest["splits"]:
            raise TicketSetError(f"{self.url}: expected a split of {self.splits}, got {split!r}")
        return [fmt.shard_name(split, i) for i in range(self.manifest["splits"][split]["shards"])]

    def shard_table(self, name: str) -> pa.Table:
        """The index of one shard, one row per input sample."""
        url = storage.join(self.url, fmt.INDEX, f"{name}.parquet")
        try:
            return read_parquet(storage.read_bytes(url))
        except FileNotFoundError:
            raise TicketSetError(f"{url}: missing; expected the index of shard {name}") from None
        except pa.ArrowException as error:
            raise TicketSetError(f"{url}: not a readable parquet file: {first_line(error)}") from None

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
        own = self._extents(name)
        images = self.base._extents(name) if self.base else own
        tar_url = storage.join(self.url, f"{name}.tar")
        ranges = _open_tar(tar_url)
        image_url = storage.join(self.base.url, f"{name}.tar") if self.base else tar_url
        image_ranges = _open_tar(image_url) if self.base else ranges
        for key, extent in own.items():
            if keys is not None and key not in keys:
                continue
            members = split_members(ranges.read(*extent), key, tar_url)
            pictured = members
            if self.base:
                if key not in images:
                    raise TicketSetError(f"{image_url}: expected an image of {key}, which {self.url} links to")
                pictured = split_members(image_ranges.read(*images[key]), key, image_url)
            yield self.sample(key, members, pictured, image_url)

    def find(self, key: str, split: str | None = None) -> tuple[str, dict[str, Any]]:
        """(split, row of the index) of one key.

        Raises:
            TicketSetError: no such key, or it stands in several splits.
        """
        hits = []
        for name in [split] if split else self.splits:
            table = self.table(name)
            row = pc.index(table["key"], key).as_py()
            if row >= 0:
                hits.append((name, table.slice(row, 1).to_pylist()[0]))
        if not hits:
            raise TicketSetError(f"{self.url}: no sample has the key {key!r}; `datalth-shards ls` lists them")
        if len(hits) > 1:
            raise TicketSetError(f"{self.url}: {key!r} is in {[h[0] for h in hits]}; say which with --split")
        return hits[0]

    def ok_keys(self, name: str) -> list[str]:
        """Keys of one shard's samples that succeeded, in stored order."""
        return list(self._extents(name))

    def _extents(self, name: str) -> dict[str, tuple[int, int]]:
        table = self.shard_table(name).select(["key", "status", "offset", "bytes"])
        columns = (table[c].to_pylist() for c in table.column_names)
        return {key: (offset, size) for key, status, offset, size in zip(*columns, strict=True) if status == "ok"}

    def sample(self, key: str, members: dict[str, bytes], pictured: dict[str, bytes], where: str) -> Sample:
        """A sample from the members of its own tar and of the tar that holds its image.

        Raises:
            TicketSetError: a member is missing, or an array has another shape than the manifest says.
        """
        image = next((pictured[m] for m in fmt.IMAGE_MEMBERS if m in pictured), None)
        if image is None and self.manifest["base"] and self.base is None:
            image = b""  # opened without images
        boxes = (members if self.has_tickets else pictured).get(fmt.VIEWS)
        if image is None or boxes is None or (self.has_tickets and fmt.RANKING not in members):
            raise TicketSetError(f"{where}: {key}: expected an image, a ranking and views, got {sorted(pictured)}")
        views = fmt.decode_npy(boxes)
        n = self.num_patches if self.has_tickets else 0
        rankings = fmt.decode_npy(members[fmt.RANKING]) if n else np.empty((len(views), 0), np.uint8)
        if rankings.shape != (len(views), n):
            raise TicketSetError(
                f"{where}: {key}: expected rankings of {len(views)} views and {n} patches, got {list(rankings.shape)}"
            )
        digits = members.get(fmt.LABEL)
        if digits is not None and not digits.isdigit():
            raise TicketSetError(f"{where}: {key}: expected digits in .cls, got {digits[:20]!r}")
        label = None if digits is None else int(digits)
        labels = self.token_labels(key, members, where)
        if labels is None and self.base is not None:
            labels = self.base.token_labels(key, pictured, where)
        return Sample(key, image, label, views, rankings, self.k, labels)

    def token_labels(self, key: str, members: dict[str, bytes], where: str) -> np.ndarray | None:
        """uint16 [2, T, G, G] among the members of a sample of this very set; None where the set has none.

        Raises:
            TicketSetError: the member is missing, or is not what the manifest says.
        """
        if not self.has_token_labels:
            return None
        if fmt.TOKEN_LABELS not in members:
            raise TicketSetError(f"{where}: {key}: expected token labels, got {sorted(members)}")
        expected = self.manifest["members"][fmt.TOKEN_LABELS]
        return token_labels.decode(members[fmt.TOKEN_LABELS], expected, f"{where}: {key}")


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """A small parquet file in this thread: Arrow's pools cost more than they give, and may abort at exit."""
    return pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(columns, use_threads=False)


def resolve_base(url: str, path: str) -> str:
    """Where the base of a linked set is: a relative path starts at the set's own folder."""
    if storage.is_remote(path) or path.startswith("/"):
        return path
    if storage.is_remote(url):  # URLs know no `..`; walk it up
        head, _, tail = url.partition("://")
        parts = tail.split("/")
        for step in path.split("/"):
            parts = parts[:-1] if step == ".." else parts if step == "." else [*parts, step]
        return f"{head}://{'/'.join(parts)}"
    return os.path.normpath(os.path.join(url, path))


def _open_tar(url: str) -> storage.Ranges:
    try:
        return storage.open_ranges(url)
    except FileNotFoundError:
        raise TicketSetError(f"{url}: missing; the index lists its samples") from None


def _read_manifest(url: str) -> dict[str, Any]:
    where = storage.join(url, fmt.MANIFEST)
    try:
        manifest = json.loads(storage.read_bytes(where))
    except (FileNotFoundError, NotADirectoryError):
        if storage.exists(storage.join(url, fmt.PLAN)):
            raise TicketSetError(
                f"{url}: this ticket set is not finished (no {fmt.MANIFEST}); run its datalth-mine command again"
            ) from None
        raise TicketSetError(f"{url}: expected a ticket set, found no {fmt.MANIFEST}") from None
    except ValueError as error:
        raise TicketSetError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != fmt.KIND:
        raise TicketSetError(f"{where}: expected the manifest of a ticket set (kind {fmt.KIND!r})")
    fmt.check_format(manifest.get("format"), where)
    fields = [(manifest, name, kind) for name, kind in MANIFEST_FIELDS.items()]
    splits = manifest.get("splits")
    for split in splits.values() if isinstance(splits, dict) else []:
        fields += [(split, name, int) for name in ("shards", "samples", "failed", "views", "bytes", "image_bytes")]
    for owner, name, kind in fields:
        if not isinstance(owner, dict) or not isinstance(owner.get(name, ...), kind):
            raise TicketSetError(f"{where}: damaged: expected a field {name!r} of the right kind")
    return manifest
