"""The plan: everything that determines the bytes of a ticket set, written before the first image is read.

    plan.json = {format, plan_id, common: {...}, splits: {NAME: {..., plan_id}}, recorded: {...}}

A split's plan_id is a hash of `common` and the split, so that a split can be added later; the set's is
a hash of theirs. `recorded` (versions, device) is kept for people and never compared.
"""

import contextlib
import functools
import hashlib
import os
import platform
import posixpath
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from miner.lock import FolderLock
from miner.settings import NO_RANKINGS, OTHER_VIEWS, TRAIN_VIEWS, Geometry, Inputs, Output
from miner.sources import Source
from shards import format as fmt
from shards.errors import TicketSetError
from shards.index import read_parquet
from shards.permutation import permutation
from shards.schema import (
    MAX_SHARDS,
    BaseLink,
    Plan,
    PlanCommon,
    PlanSplit,
    SelectorIdentity,
    SplitViews,
)
from shards.store import ANY, Conflict, Store
from shards.views import CROP_PCT
from shards.writer import read_plan

# Raise when the same inputs and options would give other bytes than before.
# Since 2, gray of 12 bits and TIFFs whose white is 0 are scaled by what their file says; since 3, the index says how scores
# are spread.
ALGORITHM = 3
# A set without rankings has no such producer. Its plan and manifest say so in these words, K = 0 among them, since sets
# of before do: another spelling would be another plan.
NO_SELECTOR = SelectorIdentity(
    method=NO_RANKINGS, model=None, state=None, keep_rate=None, counts=(0,), blocks=(), input_size=None, mean=(), std=(),
    dtype="float32", compiled=False, code=None,
)  # fmt: skip


class PlanChanged(TicketSetError):
    """The folder's plan is another than the one that this process mines by."""


def make_plan(
    source: Source,
    inputs: Inputs,
    output: Output,
    geometry: Geometry,
    identities: dict[str, Any],
    batch_size: int,
) -> Plan:
    """Resolve a source and settings into a plan.

    Args:
        source: with the splits to mine. Views and shards of a base are inherited.
        identities: producer's name -> what identifies it, see `miner.producers`.
        batch_size: views in a batch.
    """
    said = {"selector": NO_SELECTOR, **identities}
    common = PlanCommon(
        **said,
        algorithm=ALGORITHM,
        img_size=geometry.img_size,
        patch_size=geometry.patch_size,
        grid=geometry.grid,
        k=said["selector"].counts[-1],
        crop_pct=CROP_PCT,
        interpolation="bicubic, antialias",
        images=output.images,
        exif=geometry.exif,
        store_side=geometry.store_side,
        val_share=inputs.val_share,
        seed=geometry.seed,
        batch_size=batch_size,
        base=source.base.manifest.set_id if source.base else None,
        classes=fmt.digest(source.classes),
    )
    return Plan.of(
        common, {name: _plan_split(source, name, common, inputs, output, geometry) for name in source.splits}
    )


def _plan_split(
    source: Source, name: str, common: PlanCommon, inputs: Inputs, output: Output, geometry: Geometry
) -> PlanSplit:
    """What the plan says of one split."""
    table, limit, size = source.splits[name], inputs.limit, output.shard_size
    if source.base:
        views = source.base.manifest.splits[name].part(SplitViews)
    else:
        usual = TRAIN_VIEWS if name == "train" else OTHER_VIEWS
        viewed = inputs.splits or ("train",)  # of the other splits only view 0 is ever used
        count = geometry.views if geometry.views and name in viewed else usual
        views = {"views": count, "scale": geometry.scale, "ratio": geometry.ratio, "hflip": geometry.hflip}
    planned = len(table) if limit is None else min(limit, len(table))
    split = PlanSplit(
        **views,
        inputs=inputs_hash(table),
        keys=fmt.digest(sorted(table["key"].to_pylist())),
        images=planned,
        limit=limit,
        shard_size=size,
        shards=len(source.base.shard_names(name)) if source.base else -(-planned // size),
        plan_id="",
    )
    if split.shards > MAX_SHARDS:
        raise TicketSetError(f"`shard_size` {size}: {split.shards} shards of split {name}; make them larger")
    return replace(split, plan_id=split.identity(name, common))


def inputs_hash(table: pa.Table) -> str:
    """sha256 of the listing: key, size and label of every input, sorted by key."""
    sha = hashlib.sha256()
    columns = (table[c].to_pylist() for c in ("key", "size", "label"))
    for key, size, label in sorted(zip(*columns, strict=True)):
        sha.update(f"{key} {size} {'' if label is None else label}\n".encode())
    return sha.hexdigest()


def shard_rows(plan: Plan, source: Source, split: str, number: int) -> np.ndarray:
    """Rows of the split's table that make one shard, in stored order.

    Inputs are permuted by the seed before they are cut into shards, so that no shard is of one class.
    Far-away inputs keep their order across shards and are permuted within. A source with a base keeps
    the base's shards.
    """
    table, size = source.splits[split], plan.splits[split].shard_size
    if source.base:
        name = fmt.shard_name(split, number)
        containers = table["container"].to_numpy()
        names = [n for s in source.base.splits for n in source.base.shard_names(s)]
        return np.flatnonzero(containers == names.index(name))
    images, seed = plan.splits[split].images, plan.common.seed
    first, last = number * size, min((number + 1) * size, images)
    if source.in_order:
        order = first + _permutation(last - first, "order", seed, split, number)
    else:
        order = _permutation(len(table), "order", seed, split)[first:last]
    return np.asarray(order)


_permutation = functools.lru_cache(maxsize=4)(permutation)


def write_plan(
    store: Store, plan: Plan, source: Source, device: str, retry: bool = False, lock: FolderLock | None = None
) -> Plan:
    """Write plan.json, or hold the plan against the one that is there.

    Splits that only the folder's plan has are kept: they were mined before.

    Args:
        retry: accept inputs that changed where they had failed.
        lock: whether somebody else mines into the folder; then its plan is only compared. None: nobody.
    Returns:
        The plan of the whole folder.
    Raises:
        TicketSetError: the folder's plan differs, its differing fields are named; or the manifest could not hold the
            base's path.
    """
    alone, locked = (True, True) if lock is None else (lock.alone, lock.locked)
    base_link(plan, source, store.url)  # now, not when all is mined
    if read_plan(store) is None:
        with contextlib.suppress(Conflict):  # another process has written one since: then that counts
            _record(store, plan, device, expected=ANY if alone and locked else None)
    tag = store.tag(fmt.PLAN)
    old = read_plan(store) or plan
    if alone and locked and old.plan_id != plan.plan_id and not any(map(fmt.SHARD_JSON.fullmatch, store.entries())):
        _record(store, plan, device)
        return plan
    there, here = _shared_splits(store, old, plan, source, retry)
    was, now = ({name: split.to_json() for name, split in splits.items()} for splits in (there, here))
    differing = _differences(old.common.to_json(), plan.common.to_json()) + _differences(was, now, "splits")
    if differing:
        raise _other_plan(store, differing, alone)
    whole = Plan.of(plan.common, {**old.splits, **plan.splits, **here})
    if whole.splits != old.splits or retry:
        if not alone:
            raise TicketSetError(
                f"{store}: another datalth-mine is at work in it, and this command would change its plan;"
                f" run it again when the other is done"
            )
        store.remove([fmt.MANIFEST])
        _record(store, whole, device, expected=ANY if locked else tag)
    return whole


def _shared_splits(
    store: Store, old: Plan, plan: Plan, source: Source, retry: bool
) -> tuple[dict[str, PlanSplit], dict[str, PlanSplit]]:
    """The splits that both plans have, as the folder's plan has them and as ours does.

    Inputs that were mended since, where they had failed, are no difference: ours then keeps the hash of the first
    listing, with which the shards that are done were mined, and both note that of the new one.
    """
    there = {name: old.splits[name] for name in plan.splits if name in old.splits}
    here = {}
    for name, was in there.items():
        split, retried = plan.splits[name], was.retried_inputs
        changed = split.inputs not in (was.inputs, retried)
        if changed and retry and split.keys == was.keys and _only_failed_changed(store, was, source, name):
            retried, changed = split.inputs, False
        if not changed:
            split = replace(split, inputs=was.inputs, plan_id=was.plan_id)
        there[name], here[name] = replace(was, retried_inputs=retried), replace(split, retried_inputs=retried)
    return there, here


def _other_plan(store: Store, differing: list[str], alone: bool) -> TicketSetError:
    """The refusal of a folder whose plan is another."""
    how = "; ".join(differing[:6])
    if not alone:
        return TicketSetError(
            f"{store}: another datalth-mine is at work in it by another plan ({how}); give another `out`, or stop the"
            f" other"
        )
    mended = all(difference.split(": ")[0].endswith(".inputs") for difference in differing)
    retry = ", or `retry_failed` where failed files were mended" if mended else ""
    return TicketSetError(
        f"{store}: holds a ticket set of another plan ({how}); give another `out`, or `overwrite`{retry}"
    )


def check_unchanged(store: Store, split: str, plan_id: str) -> None:
    """Before a commit: whether the folder's plan still is the one that a split is mined by.

    Raises:
        PlanChanged: it is another, none, or gone.
    """
    plan = read_plan(store)
    found = plan.splits[split].plan_id if plan and split in plan.splits else None
    if found != plan_id:
        raise PlanChanged(
            f"{store.at(fmt.PLAN)}: another datalth-mine has changed it since this one began; expected plan"
            f" {plan_id[:12]} of split {split}, got {str(found)[:12]}; give each its own `out`"
        )


def _record(store: Store, plan: Plan, device: str, expected: str | None = ANY) -> None:
    recorded = {
        "versions": {
            p: version(p) for p in ("torch", "torchvision", "timm", "pillow", "numpy", "pyarrow", "webdataset")
        },
        "python": platform.python_version(),
        "platform": platform.machine(),
        "device": device,
    }
    data = fmt.canonical_json(replace(plan, recorded=recorded).to_json())
    store.put(fmt.PLAN, data, expected)


def _only_failed_changed(store: Store, split: PlanSplit, source: Source, name: str) -> bool:
    """Whether every input that differs from what was mined had failed then."""
    columns = ["key", "source_bytes", "label", "status"]
    known = {}
    indexes = [f"{fmt.INDEX}/{fmt.shard_name(name, number)}.parquet" for number in range(split.shards)]
    for index in indexes:
        with contextlib.suppress(FileNotFoundError):
            rows = read_parquet(store.read(index), store.at(index), columns).to_pylist()
            known.update({row["key"]: row for row in rows})
    table = source.splits[name]
    for key, size, label in zip(*(table[c].to_pylist() for c in ("key", "size", "label")), strict=True):
        row = known.get(key)
        if row and row["status"] == "ok" and (row["label"] != label or size not in (-1, row["source_bytes"])):
            return False
    return len(table) >= split.images


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`selector.keep_rate: 0.9 there, 0.7 here`, for every leaf that differs and is not itself a hash of others."""
    if isinstance(old, dict) and isinstance(new, dict):
        out = []
        for key in sorted(old.keys() | new.keys()):
            if key != "plan_id":
                out += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if old == new else [f"{path}: {_brief(old)} there, {_brief(new)} here"]


def _brief(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def base_link(plan: Plan, source: Source, out: str) -> BaseLink | None:
    """What the manifest of a linked set says of its base.

    Raises:
        TicketSetError: the base's path is no UTF-8, which JSON cannot hold.
    """
    if plan.common.images != "link" or source.base is None:
        return None
    path = _relative(source.base.url, out)
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = path.encode("utf-8", "backslashreplace").decode()
        raise TicketSetError(f"`data`: expected a base whose path is UTF-8, got {shown}; rename its folder") from None
    return BaseLink(set_id=source.base.manifest.set_id, path=path)


def _relative(base: str, out: str) -> str:
    """A base's place from the linked set's folder; one in another store, or on another drive, stays absolute."""
    scheme, far, path = base.rpartition("://")
    out_scheme, _, out_path = out.rpartition("://")
    if far:
        alike = (scheme, path.partition("/")[0]) == (out_scheme, out_path.partition("/")[0])
        return posixpath.relpath(f"/{path}", f"/{out_path}") if alike else base
    if out_scheme:
        return os.path.abspath(base)
    try:
        return Path(os.path.relpath(os.path.abspath(base), os.path.abspath(out))).as_posix()
    except ValueError:  # another Windows drive
        return os.path.abspath(base)
