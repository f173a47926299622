"""Checking a ticket set against what it says of itself.

Fast: the plan, every shard's JSON and index, and the tars' sizes; the index is small, so it is hashed
in any case. Deep: every tar is hashed too, and every sample opened. A tar alone proves nothing: one
that was cut at a member's edge reads without an error.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from shards import format as fmt
from shards import storage, token_labels
from shards.errors import ImageError, TicketSetError, first_line
from shards.images import decode
from shards.reader import TicketSet, read_parquet
from shards.views import canonical_view
from shards.writer import interop_files, set_id

HASH_BLOCK = 8 << 20


def verify(opened: TicketSet, deep: bool = False, on_shard: Callable[[str], None] = lambda name: None) -> list[str]:
    """Everything that is wrong with a set, one line each; empty where it is sound.

    Args:
        opened: the set.
        deep: hash the tars, decode every image, and check every sample.
        on_shard: called after each shard, for the screen.
    """
    problems: list[str] = []
    if fmt.manifest_digest(opened.manifest) != opened.manifest.get("digest"):
        problems.append(f"{fmt.MANIFEST}: not as it was written: its digest is of other contents")
    try:
        problems += _check_set(opened, deep, on_shard)
    except (KeyError, TypeError, AttributeError) as error:  # a name in a JSON file was damaged
        problems.append(f"{fmt.MANIFEST}: lacks what a manifest holds ({type(error).__name__}: {error})")
    return problems


def _check_set(opened: TicketSet, deep: bool, on_shard: Callable[[str], None]) -> list[str]:
    problems = list(_check_file(opened, fmt.PLAN, opened.manifest["plan"], hashed=True))
    plan = None if problems else _read_json(opened, fmt.PLAN, problems)
    if plan:
        problems += _check_plan(opened, plan)
    shards = []
    keys: dict[str, set[str]] = {}
    for split in opened.splits:
        keys[split] = set()
        for name in opened.shard_names(split):
            stats, found = _check_shard(opened, split, name, plan, keys[split])
            problems += found
            if opened.base is not None:
                problems += _check_base(opened.base, name)
            if stats is not None:
                shards.append(stats)
                if deep and not found:
                    problems += _check_tar(opened, name, stats)
            on_shard(name)
    if len(shards) == sum(split["shards"] for split in opened.manifest["splits"].values()):
        problems += _check_totals(opened, shards)
    return problems + list(_strangers(opened))


def _check_base(base: TicketSet, name: str) -> list[str]:
    """The tar that a linked shard takes its images from, as the base's own JSON has it; its bytes are the base's matter."""
    problems: list[str] = []
    stats = _read_json(base, f"{name}.json", problems)
    if stats is not None:
        problems += _check_file(base, f"{name}.tar", stats["tar"], hashed=False)
    return [f"base {base.url}: {problem}" for problem in problems]


def _read_json(opened: TicketSet, name: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(storage.read_bytes(storage.join(opened.url, name)))
    except FileNotFoundError:
        problems.append(f"{name}: missing")
    except ValueError:
        problems.append(f"{name}: not readable as JSON")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{name}: expected an object, got {type(content).__name__}")
    return None


def _check_plan(opened: TicketSet, plan: dict[str, Any]) -> Iterator[str]:
    try:
        for name, split in plan["splits"].items():
            if fmt.split_plan_id(plan["common"], name, split) != split["plan_id"]:
                yield f"{fmt.PLAN}: split {name} is not what its plan_id {split['plan_id'][:12]} was made of"
        if not fmt.plan_id(plan["splits"]) == plan["plan_id"] == opened.manifest["plan_id"]:
            yield f"{fmt.PLAN}: expected plan_id {opened.manifest['plan_id'][:12]} (manifest), got {plan['plan_id'][:12]}"
        if fmt.digest(opened.classes) != plan["common"]["classes"]:
            yield f"{fmt.MANIFEST}: its class names are not those of {fmt.PLAN}"
        for name, split in opened.manifest["splits"].items():
            for field in ("views", "scale", "ratio", "hflip", "shards"):
                if split[field] != plan["splits"][name][field]:
                    yield f"{fmt.MANIFEST}: split {name}: {field} is {split[field]}, but {fmt.PLAN} says otherwise"
        for name in ("k", "grid", "exif", "seed", "img_size", "patch_size", "selector", "token_labels"):
            said, planned = opened.manifest.get(name), plan["common"].get(name)
            if said != planned:
                yield f"{fmt.MANIFEST}: {name} is {said}, but {fmt.PLAN} says {planned}"
        yield from _check_members(opened, plan["common"])
    except (KeyError, TypeError, AttributeError) as error:
        yield f"{fmt.PLAN}: expected common, splits and plan_id ({type(error).__name__}: {error})"


def _check_members(opened: TicketSet, common: dict[str, Any]) -> Iterator[str]:
    """What the manifest says of tickets and token labels, against what the plan would have made."""
    labels = common.get("token_labels")
    shape = labels and token_labels.shape(len(opened.classes), labels["grid"][0])
    found = opened.manifest["members"].get(fmt.TOKEN_LABELS, {}).get("shape")
    if found != shape:
        yield f"{fmt.MANIFEST}: its members have token labels of shape {found}, but {fmt.PLAN} says {shape}"
    if opened.has_tickets != bool(common["k"]):
        yield f"{fmt.MANIFEST}: its members do not go with {common['k']} patches a ticket, which {fmt.PLAN} says"


def _check_shard(
    opened: TicketSet, split: str, name: str, plan: dict[str, Any] | None, keys: set[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """A shard's JSON, and what is wrong with it, its index, and its tar from outside. Adds its keys to `keys`."""
    problems: list[str] = []
    stats = _read_json(opened, f"{name}.json", problems)
    if stats is None:
        return None, problems
    try:
        expected = opened.manifest["splits"][split]
        plan_id = plan["splits"][split]["plan_id"] if plan else stats["plan_id"]
        if fmt.shard_name(stats["split"], stats["shard"]) != name:
            problems.append(f"{name}.json: says it is {fmt.shard_name(stats['split'], stats['shard'])}")
        if stats["format"] != opened.manifest["format"]:
            problems.append(f"{name}.json: expected format {opened.manifest['format']}, got {stats['format']}")
        if stats["plan_id"] != plan_id:
            problems.append(f"{name}.json: of another plan: expected {plan_id[:12]}, got {stats['plan_id'][:12]}")
        problems += _check_file(opened, f"{name}.tar", stats["tar"], hashed=False)
        problems += _check_file(opened, f"{fmt.INDEX}/{name}.parquet", stats["parquet"], hashed=True)
        if not problems:
            problems += _check_index(opened, name, stats, plan_id, expected, keys)
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(f"{name}.json: lacks what a shard's JSON holds ({type(error).__name__}: {error})")
        return None, problems
    return stats, problems


def _check_file(opened: TicketSet, name: str, expected: dict[str, Any], hashed: bool) -> Iterator[str]:
    url = storage.join(opened.url, name)
    try:
        size = storage.size_of(url)
    except FileNotFoundError:
        yield f"{name}: missing"
        return
    if size != expected["bytes"]:
        yield f"{name}: expected {expected['bytes']} bytes, got {size}"
    elif hashed and (found := _sha256(url, size)) != expected["sha256"]:
        yield f"{name}: expected sha256 {expected['sha256'][:12]}, got {found[:12]}"


def _sha256(url: str, size: int) -> str:
    sha, ranges = hashlib.sha256(), storage.open_ranges(url)
    for offset in range(0, size, HASH_BLOCK):
        sha.update(ranges.read(offset, min(HASH_BLOCK, size - offset)))
    return sha.hexdigest()


def _check_index(
    opened: TicketSet, name: str, stats: dict[str, Any], plan_id: str, split: dict[str, Any], keys: set[str]
) -> Iterator[str]:
    """The index against the JSON: whose it is, counts, and extents that fill the tar without a gap."""
    where = f"{fmt.INDEX}/{name}.parquet"
    try:
        index = read_parquet(storage.read_bytes(storage.join(opened.url, where)))
    except pa.ArrowException as error:
        yield f"{where}: not a readable parquet file: {first_line(error)}"
        return
    said = {k.decode(): v.decode() for k, v in (index.schema.metadata or {}).items()}
    if said.get("datalth.shard") != name or said.get("datalth.plan_id") != plan_id:
        yield f"{where}: of another shard or plan: {said.get('datalth.shard')}, {str(said.get('datalth.plan_id'))[:12]}"
    rows = index.select(["key", "status", "label", "offset", "bytes", "k"]).to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    if (len(ok), len(rows) - len(ok)) != (stats["samples"], stats["failed"]):
        yield f"{where}: expected {stats['samples']} samples and {stats['failed']} failures, got {len(ok)}, {len(rows) - len(ok)}"
    position = 0
    for row in ok:
        if row["offset"] != position:
            yield f"{where}: {row['key']}: expected at offset {position} of the tar, got {row['offset']}"
            break
        position += row["bytes"]
    if position + 1024 > stats["tar"]["bytes"]:
        yield f"{where}: its samples end at {position}, beyond the tar's {stats['tar']['bytes']} bytes"
    names = [row["key"] for row in rows]
    twice = [name for name, count in Counter(names).items() if count > 1 or name in keys]
    keys.update(names)
    if twice:
        yield f"{where}: {len(twice)} keys stand twice in the split (first: {twice[0]})"
    classes = len(opened.classes)
    bad = next((r for r in rows if r["label"] is not None and not 0 <= r["label"] < classes), None)
    if bad:
        yield f"{where}: {bad['key']}: expected a label below {classes}, got {bad['label']}"
    if any(row["k"] != opened.k for row in rows):
        yield f"{where}: expected k = {opened.k} in every row"


def _check_tar(opened: TicketSet, name: str, stats: dict[str, Any]) -> Iterator[str]:
    """The tar's sha256 and every sample in it."""
    yield from _check_file(opened, f"{name}.tar", stats["tar"], hashed=True)
    rows = {row["key"]: row for row in opened.shard_table(name).to_pylist() if row["status"] == "ok"}
    try:
        for sample in opened.stream_shard(name):
            yield from (f"{name}.tar: {sample.key}: {p}" for p in _check_sample(opened, sample, rows[sample.key]))
    except TicketSetError as error:
        yield str(error)


def _check_sample(opened: TicketSet, sample: Any, row: dict[str, Any]) -> Iterator[str]:
    n, views, rankings = opened.num_patches, sample.views, sample.rankings
    try:
        height, width = decode(sample.image, opened.exif).shape[:2]
    except ImageError as error:
        yield f"image {error}"
        return
    if (width, height) != (row["width"], row["height"]):
        yield f"expected an image of {row['width']}x{row['height']}, got {width}x{height}"
    if not opened.has_tickets:
        yield from [] if row["ticket"] is None else ["expected no ticket in the index"]
    elif rankings.dtype != fmt.ranking_dtype(n) or not (np.sort(rankings, axis=1) == np.arange(n)).all():
        yield f"expected rankings that are permutations of {n} patches, as {fmt.ranking_dtype(n)}"
    elif row["ticket"] != fmt.pack_ticket(rankings[0, : opened.k], n):
        yield "the index holds another ticket of view 0"
    top, left, h, w, flip = views.T
    inside = (top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)
    if not (inside & ((flip == 0) | (flip == 1))).all():
        yield f"view {int(np.argmin(inside))} is not inside the {width}x{height} image"
    elif tuple(views[0]) != canonical_view(width, height):
        yield f"expected the canonical view first, got {views[0].tolist()}"
    if opened.has_token_labels:
        yield from token_labels.problems(sample.token_labels, len(opened.classes))
    if sample.label != row["label"]:
        yield f"expected label {row['label']} (index), got {sample.label}"


def _check_totals(opened: TicketSet, shards: list[dict[str, Any]]) -> Iterator[str]:
    manifest = opened.manifest
    for name, split in manifest["splits"].items():
        for field in ("samples", "failed", "image_bytes"):
            total = sum(s[field] for s in shards if s["split"] == name)
            if total != split[field]:
                yield f"{fmt.MANIFEST}: split {name} has {split[field]} {field}, its shards {total}"
    if set_id(shards) != manifest["set_id"]:
        yield f"{fmt.MANIFEST}: expected set_id {set_id(shards)[:12]} (its shards), got {manifest['set_id'][:12]}"
    if manifest["base"] is None:
        problems: list[str] = []
        for name, content in interop_files(shards).items():
            found = _read_json(opened, name, problems)
            if found is not None and found != content:
                problems.append(f"{name}: does not list the shards of this set")
        yield from problems


def _strangers(opened: TicketSet) -> Iterator[str]:
    """Shards that the manifest does not count, and what a killed run left."""
    known = {name for split in opened.splits for name in opened.shard_names(split)}
    for folder, suffixes in (
        (opened.url, (".tar", ".tmp")),
        (storage.join(opened.url, fmt.INDEX), (".parquet", ".tmp")),
    ):
        for file in storage.list_names(folder):
            stem, dot, suffix = file.rpartition(".")
            if dot + suffix in suffixes and stem not in known:
                yield f"{file}: not one of this set's shards"
