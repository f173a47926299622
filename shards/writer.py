"""Writing a ticket set: one shard at a time, each committed by its JSON, the set by its manifest.

Every file is put when it is whole, in the order tar, parquet, JSON: a shard whose JSON is there is done, whatever was
killed. `finalize` writes the manifest last.
"""

import contextlib
import hashlib
import io
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards import format as fmt
from shards.errors import TicketSetError
from shards.index import index_schema
from shards.schema import (
    MAX_JSON_BYTES,
    BaseLink,
    Counts,
    FileDigest,
    Manifest,
    Plan,
    Setting,
    ShardStats,
    SplitStats,
    SplitViews,
    members_of,
    parse_plan,
    parse_shard,
)
from shards.store import Conflict, Store
from shards.tar import SampleTarWriter


class _HashingFile:
    """Passes writes on and takes their sha256 and number."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


class ShardWriter:
    """Writes one shard; a context that leaves nothing behind unless `commit` was reached.

    Args:
        store: the folder of the ticket set.
        split: its name.
        number: of the shard within the split.
        num_patches: N.
        plan_id: of the split; goes into the parquet and the JSON, so that another plan's shard is noticed.
        version: of the format, (major, minor).
        spread: whether rows say how the views' scores are spread.
        shared: other processes may write the same shard, now or when this one is taken for dead.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        number: int,
        num_patches: int,
        plan_id: str,
        version: tuple[int, int] = fmt.FORMAT,
        spread: bool = False,
        shared: bool = False,
    ) -> None:
        self.store, self.split, self.number, self._version, self._shared = store, split, number, version, shared
        self.name = fmt.shard_name(split, number)
        self._plan_id = plan_id
        self._schema = index_schema(num_patches, spread)
        self._rows: list[dict[str, Any]] = []
        self._image_bytes = 0
        self._committed = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        self._file = _HashingFile(self._stack.enter_context(self.store.spool(f"{self.name}.tar")))
        self._tar = SampleTarWriter(self._file)
        return self

    def add(self, row: dict[str, Any], members: dict[str, bytes]) -> None:
        """Append a sample that succeeded."""
        self._image_bytes += sum(len(members[m]) for m in fmt.PIXEL_MEMBERS if m in members)
        offset, size = self._tar.write(row["key"], members)
        self._rows.append({**row, "status": "ok", "offset": offset, "bytes": size})

    def add_failure(self, row: dict[str, Any], error: str) -> None:
        """Note a sample that failed: a row, and nothing in the tar."""
        self._rows.append({**row, "status": "failed", "error": error})

    def commit(self, timing: dict[str, Any]) -> ShardStats:
        """Put tar, parquet and JSON, in this order.

        Returns:
            What the JSON says; where another process was first, his.
        Raises:
            Conflict: another process has taken the shard over and is at it.
        """
        self._tar.close()
        if self._shared:
            stats = self._commit_shared(timing)
        else:
            data, stats = self._files(timing)
            for name, content in data.items():
                self.store.put(name, content)
            self.store.put(self._json, fmt.canonical_json(stats.to_json()))
        self._committed = True
        return stats

    @property
    def _json(self) -> str:
        return f"{self.name}.json"

    def _files(self, timing: dict[str, Any] | None, **metadata: str) -> tuple[dict[str, bytes | Path], ShardStats]:
        """What is put before the JSON, by name, and what the JSON will say of it."""
        self._file.file.flush()
        said = {"datalth.shard": self.name, "datalth.plan_id": self._plan_id, **metadata}
        parquet = io.BytesIO()
        table = pa.Table.from_pylist(self._rows, self._schema.with_metadata(said))
        pq.write_table(table, parquet, compression="zstd")
        failed = [row for row in self._rows if row["status"] == "failed"]
        stats = ShardStats(
            format=self._version,
            plan_id=self._plan_id,
            split=self.split,
            shard=self.number,
            samples=len(self._rows) - len(failed),
            failed=len(failed),
            image_bytes=self._image_bytes,
            tar=FileDigest(bytes=self._file.bytes, sha256=self._file.sha256.hexdigest()),
            parquet=_digest_of(parquet.getvalue()),
            timing=timing,
        )
        tar = Path(self._file.file.name)
        return {f"{self.name}.tar": tar, f"{fmt.INDEX}/{self.name}.parquet": parquet.getvalue()}, stats

    def _commit_shared(self, timing: dict[str, Any]) -> ShardStats:
        """Commit where others may be at the same shard; one of them wins, and all files are his.

        Two miners on one kind of machine make the same bytes, and need not agree. On another kind of GPU the last bits of
        scores differ, and rankings with them; then a miner who was taken for dead and goes on must not mix his files with
        those of who took over. So nothing is replaced before the JSON, by which a shard is committed, is out of his reach:
        that is what `_take_over` is for.
        """
        data, stats = self._files(timing)
        try:
            try:
                for name, content in data.items():
                    self.store.put(name, content, expected=None)
                self.store.put(self._json, fmt.canonical_json(stats.to_json()), expected=None)
            except Conflict:
                return self._take_over(data, stats)
        except Conflict:
            done = read_shard_json(self.store, self.split, self.number)
            if done is None:
                raise
            return done
        return stats

    def _take_over(self, data: dict[str, bytes | Path], stats: ShardStats) -> ShardStats:
        """Commit a shard of which there are files of another content: somebody left them behind, or is writing them.

        First a mark of ours takes the place of the JSON, so that he cannot commit any more. A file is then replaced only
        if it still is the one that was there before the mark was seen to be ours: who takes over from us changes the mark
        first, so that one of us fails.

        Raises:
            Conflict: another process commits the shard, or has.
        """
        store, token = self.store, secrets.token_hex(16)
        mark = fmt.taken_mark(token)
        tag = store.tag(self._json)
        done = read_shard_json(store, self.split, self.number)
        if done is not None:
            return done
        store.put(self._json, mark, expected=tag)
        if tag is not None:
            data, stats = self._unlike_any(token, stats.timing)
        tag = store.tag(self._json)
        for name, content in data.items():
            while True:
                there = store.tag(name)
                if store.read(self._json) != mark:
                    raise Conflict(f"{store.at(self._json)}: another process has taken this shard over")
                with contextlib.suppress(Conflict):  # who was there before may write once more
                    store.put(name, content, expected=there)
                    break
        store.put(self._json, fmt.canonical_json(stats.to_json()), expected=tag)
        return stats

    def _unlike_any(self, token: str, timing: dict[str, Any] | None) -> tuple[dict[str, bytes | Path], ShardStats]:
        """The files again, with a token in them that no reader looks at.

        Somebody before us took the shard over, too, and may still be about to replace what he saw there. In S3 he would,
        if we left or put the very same bytes: a tag there is their hash. It costs no promise: where bytes are those of one
        process alone, there is nothing to take over.
        """
        file = self._stack.enter_context(self.store.spool(f"{self.name}.tar"))
        with open(
            self._file.file.name, "rb"
        ) as whole:  # a copy: where that is a hard link, the tar may be there already
            shutil.copyfileobj(whole, file, 1 << 20)
        self._file.file = file
        self._file.write(token.encode().ljust(512, b"\0"))  # behind the archive's end
        return self._files(timing, **{"datalth.taken_over": token})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert kind or self._committed, "a shard left its context without commit()"
        if kind:  # a tar that was never closed would still write when it is collected
            with contextlib.suppress(OSError, ValueError):
                self._tar.close()
        self._stack.__exit__(kind, error, traceback)


def _digest_of(data: bytes) -> FileDigest:
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def in_order(shards: Iterable[ShardStats]) -> list[ShardStats]:
    """Shards by (split, number)."""
    return sorted(shards, key=lambda stats: (stats.split, stats.shard))


def set_id(shards: Iterable[ShardStats]) -> str:
    """Identity of a set's contents: a hash of its shards' sha256s, in (split, number) order."""
    return fmt.digest([[s.split, s.shard, s.tar.sha256, s.parquet.sha256] for s in in_order(shards)])


def count(shards: Sequence[ShardStats]) -> Counts:
    """What is in some shards together."""
    return Counts(
        shards=len(shards),
        samples=sum(s.samples for s in shards),
        failed=sum(s.failed for s in shards),
        bytes=sum(s.tar.bytes for s in shards),
        image_bytes=sum(s.image_bytes for s in shards),
    )


def finalize(
    store: Store, plan: Plan, classes: Sequence[str], base: BaseLink | None, shards: Sequence[ShardStats]
) -> Manifest:
    """Write manifest.json, after the files by which timm and open_clip know a plain image set.

    Args:
        store: the folder of the ticket set; its plan.json is there.
        plan: of the whole set.
        classes: names, in the order of labels.
        base: the set that holds the images of a linked set.
        shards: every shard's JSON.
    """
    splits = {}
    for name in sorted({stats.split for stats in shards}):
        counts = count([stats for stats in shards if stats.split == name])
        splits[name] = SplitStats(**plan.splits[name].part(SplitViews), **counts.part(Counts))
    manifest = Manifest(
        **plan.common.part(Setting),
        format=plan.format,
        kind=fmt.KIND,
        plan_id=plan.plan_id,
        set_id=set_id(shards),
        plan=_digest_of(store.read(fmt.PLAN)),
        classes=tuple(classes),
        members=members_of(plan.common, len(classes), plan.common.images == "copy"),
        base=base,
        splits=splits,
        totals=count(shards),
    )
    manifest = replace(manifest, digest=manifest.identity())
    if plan.common.images == "copy":
        for name, content in interop_files(shards).items():
            store.put(name, fmt.canonical_json(content))
    store.put(fmt.MANIFEST, fmt.canonical_json(manifest.to_json()))
    return manifest


def interop_files(shards: Sequence[ShardStats]) -> dict[str, Any]:
    """`_info.json` for timm's wds/ reader and `sizes.json` for open_clip's, from the shards' JSON."""
    splits: dict[str, dict[str, Any]] = {}
    for name in sorted({stats.split for stats in shards}):
        own = [stats for stats in in_order(shards) if stats.split == name]
        splits[name] = {
            "name": name,
            "num_samples": count(own).samples,
            "filenames": [f"{stats.name}.tar" for stats in own],
            "shard_lengths": [stats.samples for stats in own],
        }
    return {
        fmt.TIMM_INFO: {"name": "datalth", "splits": splits},
        fmt.OPEN_CLIP_SIZES: {f"{stats.name}.tar": stats.samples for stats in shards},
    }


def read_plan(store: Store) -> Plan | None:
    """A folder's plan.json, or None where there is none.

    Raises:
        TicketSetError: the file is there but is no plan.
    """
    try:
        return parse_plan(store.read(fmt.PLAN, MAX_JSON_BYTES), store.at(fmt.PLAN))
    except FileNotFoundError:
        return None


def read_shard_json(store: Store, split: str, number: int) -> ShardStats | None:
    """A committed shard's JSON, or None where the shard is not done.

    Raises:
        TicketSetError: the file is there but is no shard's JSON.
    """
    return read_shard_jsons(store, [(split, number)])[0]


def read_shard_jsons(store: Store, shards: Iterable[tuple[str, int]]) -> list[ShardStats | None]:
    """`read_shard_json` of several, asked for side by side."""
    names = [f"{fmt.shard_name(split, number)}.json" for split, number in shards]
    found = store.read_all(names, MAX_JSON_BYTES)
    return [
        None if data is None else _parse_done(data, store.at(name)) for name, data in zip(names, found, strict=True)
    ]


def _parse_done(data: bytes, where: str) -> ShardStats | None:
    try:
        return None if fmt.is_mark(len(data)) else parse_shard(data, where)
    except TicketSetError as error:
        raise TicketSetError(f"{error} (without this file, its shard is mined again)") from None
