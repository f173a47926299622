"""What of a plan is done, and the end of a set: its manifest, once all is."""

import math
from collections.abc import Iterable

import numpy as np

from miner.plan import base_link, check_unchanged
from miner.reading import Shard
from miner.sources import Source
from shards import format as fmt
from shards.errors import TicketSetError
from shards.schema import Plan, ShardStats
from shards.store import Store
from shards.writer import finalize, read_plan, read_shard_jsons


def committed(store: Store, plan: Plan, shards: list[Shard]) -> dict[Shard, ShardStats]:
    """What the JSON of those shards says that are done.

    Raises:
        TicketSetError: a shard of another plan.
    """
    there = store.entries()
    shards = [shard for shard in shards if f"{fmt.shard_name(*shard)}.json" in there]
    done = {}
    for (split, number), stats in zip(shards, read_shard_jsons(store, shards), strict=True):
        if stats is None:
            continue
        if stats.plan_id != plan.splits[split].plan_id:
            where = store.at(f"{fmt.shard_name(split, number)}.json")
            raise TicketSetError(f"{where}: a shard of another plan; remove it to mine it again")
        done[split, number] = stats
    return done


def forget_failed(store: Store, plan: Plan, shards: list[Shard]) -> None:
    """Take back the shards that hold failed images, so that they are mined again."""
    for shard, stats in committed(store, plan, shards).items():
        if stats.failed:
            store.remove([fmt.MANIFEST])  # first: the set is incomplete from here on
            store.remove([f"{fmt.shard_name(*shard)}.json"])


def shard_sizes(plan: Plan, source: Source) -> dict[Shard, int]:
    """Inputs in each shard of the source's splits, as `miner.plan.shard_rows` deals them out."""
    sizes: dict[Shard, int] = {}
    for split, table in source.splits.items():
        planned = plan.splits[split]
        if source.base:  # its shards are the containers, those of all splits counted together
            first = sum(len(source.base.shard_names(s)) for s in source.base.splits[: source.base.splits.index(split)])
            counts = np.bincount(table["container"].to_numpy(), minlength=first + planned.shards)[first:].tolist()
        else:
            starts = range(0, planned.images, planned.shard_size)
            counts = [min(planned.shard_size, planned.images - start) for start in starts]
        sizes |= {(split, number): counts[number] for number in range(planned.shards)}
    return sizes


def count_images(plan: Plan, source: Source, shards: list[Shard]) -> int:
    """Inputs in some shards."""
    sizes = shard_sizes(plan, source)
    return sum(sizes[shard] for shard in shards)


def finish(store: Store, plan: Plan, source: Source, max_failures: float = 1.0) -> bool:
    """Write the manifest if every shard of the folder's plan is done; says whether it is.

    Args:
        plan: of the folder when this command began; another may have added a split since, where there are no locks.
        max_failures: share of all images that may have failed.
    Raises:
        TicketSetError: more have; a shard of another plan; files of another size than its JSON says; or the folder's
            plan is another by now.
    """
    _check_splits(store, plan)
    plan = read_plan(store) or plan
    done = committed(store, plan, plan.shards())
    if len(done) < len(plan.shards()):
        return False
    failed = sum(stats.failed for stats in done.values())
    images = sum(split.images for split in plan.splits.values())
    if failed > max_failures * images:
        raise TicketSetError(
            f"{store}: {failed} of {images} images failed, `max_failures` allows {math.floor(max_failures * images)};"
            f" raise it and run the same command again, or mend them and give it `retry_failed`"
        )
    _check_sizes(store, done.values())
    _check_splits(store, plan)
    finalize(store, plan, source.classes, base_link(plan, source, store.url), list(done.values()))
    return True


def _check_splits(store: Store, plan: Plan) -> None:
    for split in plan.splits:
        check_unchanged(store, split, plan.splits[split].plan_id)


def _check_sizes(store: Store, shards: Iterable[ShardStats]) -> None:
    """Hold the files against what the shards' JSON says, by two listings."""
    tars, indexes = store.entries(), store.entries(fmt.INDEX)
    for stats in shards:
        for name, there, said in (
            (f"{stats.name}.tar", tars, stats.tar),
            (f"{stats.name}.parquet", indexes, stats.parquet),
        ):
            found = there[name].size if name in there else None
            if found != said.bytes:
                got = "none" if found is None else f"one of {found}"
                raise TicketSetError(
                    f"{store}: expected {name} of {said.bytes} bytes, as {stats.name}.json says, got {got}; remove that"
                    f" JSON to mine the shard again"
                )
