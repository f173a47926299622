"""One datalth-mine: list the source, settle the plan, mine what is not done, finalize when all is."""

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from miner import models
from miner.done import committed, count_images, finish, forget_failed
from miner.elastic import mine_elastic
from miner.folder import check_alone, check_target, remove_claims, remove_set, remove_temporary
from miner.job import Job, mine_shards
from miner.lock import FolderLock
from miner.plan import make_plan, write_plan
from miner.producers import Producer, build_models, build_producers, check_settings, device_of, is_blind
from miner.progress import ProgressBar, show_plan, show_summary
from miner.ray_pool import RayPool
from miner.settings import GROUPS, Fleet, Geometry, Inputs, Labeling, Machine, Output, Selection
from miner.sources import Source, open_source
from miner.sources.listings import SharedListings
from shards import format as fmt
from shards.errors import TicketSetError, first_line
from shards.flags import marked
from shards.ranks import rank_and_world
from shards.schema import Plan
from shards.store import Store, open_store
from shards.writer import read_plan


def mine(
    inputs: Inputs,
    output: Output,
    selection: Selection = Selection(),
    geometry: Geometry = Geometry(),
    labeling: Labeling = Labeling(),
    machine: Machine = Machine(),
    fleet: Fleet = Fleet(),
    given: frozenset[str] = frozenset(),
) -> None:
    """Mine a ticket set; under torchrun each rank mines its own shards and speaks to no other.

    Args:
        given: fields that somebody typed: of those that a ticket set as source decides, they are refused.
    Raises:
        TicketSetError: whatever a person can mend.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)  # it logs what the plan says anyway
    check_alone(output, fleet, world=rank_and_world()[1])
    check_target(output.out, inputs.data)
    store = open_store(output.out)
    if fleet.ray is not None and find_spec("ray") is None:
        raise TicketSetError("`ray`: Ray is not installed; pip install 'datalth[ray]'")
    if fleet.elastic or fleet.ray is not None:
        store.clock()  # before hours of listing: it refuses a store where several would undo each other's shards
    source = open_source(inputs, geometry.seed, SharedListings(store) if fleet.elastic else None)
    geometry = inherit(inputs, output, geometry, source, given)
    selects = None if keeps_rankings(output, selection, source, given) else selection
    check_settings(selects, labeling, output, machine)
    pool = None if fleet.ray is None else RayPool(fleet, machine, is_blind(selects, labeling))
    device = device_of(selects, labeling, machine) if pool is None else pool.device
    batch_size = machine.batch_size or default_batch_size(store, output, device)
    machine = replace(machine, batch_size=batch_size)
    try:
        here = machine if pool is None else replace(machine, device="cpu")  # for what the plan says of the models
        loaded = build_models(selects, labeling, geometry, here, tuple(source.classes))
        producers = build_producers(loaded, selects, output, geometry, source)
        identities = {producer.name: producer.identity for producer in producers}
        plan = make_plan(source, inputs, output, geometry, identities, batch_size)
        with FolderLock(store) as lock, models.compiling():
            whole = settle(store, lock, output, plan, source, device)
            shared = fleet.elastic or pool is not None
            job = Job(whole, source, store, selects, labeling, geometry, machine, output, shared)
            if fleet.elastic:
                mine_elastic(job, plan, producers, fleet, device)
            else:
                mine_missing(job, plan, producers, device, pool)
    except torch.OutOfMemoryError as error:  # the device's; the host's is a MemoryError
        raise TicketSetError(f"`device` {device}: {first_line(error)} Take a smaller `batch_size`") from None
    finally:
        if pool is not None:
            pool.close()


def settle(store: Store, lock: FolderLock, output: Output, mined: Plan, source: Source, device: torch.device) -> Plan:
    """Agree on the folder's plan, and let others of the same plan in.

    Returns:
        The plan of the whole folder: it may have splits that were mined before.
    Raises:
        TicketSetError: the folder holds, or another process mines, a set of another plan.
    """
    if not lock.alone and (output.overwrite or output.retry_failed):
        raise TicketSetError(
            f"`{'overwrite' if output.overwrite else 'retry_failed'}`: another datalth-mine is at work in {store};"
            f" stop it, or wait until it is done"
        )
    if output.overwrite:
        remove_set(store)
    first = lock.alone and lock.locked
    if first:
        remove_temporary(store)
    plan = write_plan(store, mined, source, device.type, output.retry_failed, lock)
    if output.retry_failed:
        forget_failed(store, plan, mined.shards())
    if first:
        lock.share()
        plan = write_plan(store, mined, source, device.type, lock=lock)
    return plan


def mine_missing(
    job: Job, mined: Plan, producers: Sequence[Producer], device: torch.device, pool: RayPool | None
) -> None:
    """Mine those of this rank's shards that are not done, and finalize the set when all ranks' are.

    Args:
        mined: what this command mines of the job's plan.
        pool: of workers that mine instead of this process.
    """
    plan, source, store = job.plan, job.source, job.store
    rank, world = rank_and_world()
    own = [shard for i, shard in enumerate(mined.shards()) if i % world == rank]
    done = committed(store, plan, own)
    todo = [shard for shard in own if shard not in done]
    if rank == 0:
        where = str(device) if pool is None else f"{device}: workers of Ray, {pool.need} each"
        show_plan(plan, source, store, where, list(mined.splits))
        if done:
            print(f"resuming: {len(done)} of {len(own)} shards are done")
    allowed = job.output.max_failures * count_images(plan, source, own) - sum(s.failed for s in done.values())
    started = time.monotonic()
    progress = ProgressBar(count_images(plan, source, todo), allowed, shown=rank == 0 and bool(todo))
    with contextlib.closing(progress), progress.stoppable():
        if pool is None:
            mine_shards(job, todo, producers, progress)
        else:
            pool.mine(job, todo, progress)
    seconds = time.monotonic() - started
    if finish(store, plan, source):
        remove_claims(store)  # of those who began it with `elastic`
        if pool is not None:
            remove_temporary(store)  # of workers that were killed
        if rank == 0 or todo:
            show_summary(store, seconds, progress, f"rank {rank} of {world} mined" if world > 1 else "mined")
    elif rank == 0:
        plan = read_plan(store) or plan  # it may be that of another command by now, with a split more
        done = committed(store, plan, plan.shards())
        missing = [fmt.shard_name(*shard) for shard in plan.shards() if shard not in done]
        if missing:
            print(f"not complete yet: {len(missing)} shards are missing (first: {missing[0]});", end=" ")
            print("other ranks are at them" if world > 1 else "run the command that mines them again")


def inherit(inputs: Inputs, output: Output, geometry: Geometry, source: Source, given: frozenset[str]) -> Geometry:
    """The geometry, with what a ticket set as source brings: seed, frame and sizes. Its views are in the plan's splits.

    Raises:
        TicketSetError: one of these was given, or `images` link has nothing to link to.
    """
    data = inputs.data
    if source.base is None:
        if output.images == "link":
            raise TicketSetError(f"`images` link: `data` {data} is no ticket set; there is nothing to link to")
        return geometry
    if Path(output.out).resolve() == Path(source.base.url).resolve():
        raise TicketSetError(f"`out` {output.out}: is the set that holds the images of `data` {data}")
    for name in sorted(marked("inherited", *GROUPS) & given):
        raise TicketSetError(f"`{name}`: inherited from the ticket set {data}; leave it out")
    sizes = marked("size", *GROUPS)
    inherited = {name: getattr(source.base.manifest, name) for name in ("seed", "exif", *sizes)}
    for name in sorted(sizes & given):
        if getattr(geometry, name) != inherited[name]:
            raise TicketSetError(
                f"`{name}`: the ticket set {data} is of {inherited[name]} pixels, got {getattr(geometry, name)};"
                f" leave it out"
            )
    return replace(geometry, **inherited)


def keeps_rankings(output: Output, selection: Selection, source: Source, given: frozenset[str]) -> bool:
    """Whether the rankings of a ticket set are kept: it is stored in ranked views, and no other selection was asked for."""
    asked = selection != Selection() or given & {field.name for field in fields(Selection)}
    return output.images == "ranked" and source.tickets is not None and not asked


def default_batch_size(store: Store, output: Output, device: torch.device) -> int:
    """That of the plan which is there, for a run may be resumed on another kind of device; else what suits this one."""
    plan = None if output.overwrite else read_plan(store)
    if plan:
        return plan.common.batch_size
    return 16 if device.type == "cpu" else 128  # small batches stay in a CPU's caches: measured 1.25 times 128's rate
