"""One datalth-mine command: list the source, settle the plan, mine what is not done, finalize when all is."""

import contextlib
import hashlib
import inspect
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from miner import models
from miner.claim import Claim
from miner.drop import PAPER_STAGES, default_blocks, keep_counts, keep_counts_for, parse_blocks
from miner.engine import Miner, Progress
from miner.plan import base_link, check_unchanged, make_plan, shard_rows, write_plan
from miner.screen import Screen, show_plan, show_summary
from miner.selectors import BLIND, Selector, create_selector, find_method, needs_model
from miner.sources import Source, open_source
from miner.token_labels import VIEWS_AN_IMAGE, Labeller, build_labeller
from shards import format as fmt
from shards.errors import TicketSetError, first_line
from shards.ranks import rank_and_world
from shards.schema import Plan, SelectorIdentity, ShardStats
from shards.writer import finalize, read_plan, read_shard_json

DEFAULT_KEEP_RATE = 0.9
# A ticket set that is the source brings these along.
INHERITED = frozenset(
    ["views", "scale", "ratio", "hflip", "seed", "exif", "store_side", "val_share", "shard_size", "limit", "labels"]
)
SIZES = frozenset(["img_size", "patch_size"])  # too, and giving the same again is no mistake


@dataclass(frozen=True)
class Options:
    """datalth-mine's flags, checked one by one; `given` names those that were typed."""

    data: str
    out: str
    splits: tuple[str, ...]
    selector: str
    weights: str | None
    method: str
    keep_rate: float | None
    drop_blocks: str | None
    tokens: int | None
    img_size: int
    patch_size: int
    views: int | None
    scale: tuple[float, float]
    ratio: tuple[float, float]
    hflip: float
    images: str
    base: str | None
    exif: str
    store_side: int | None
    val_share: float
    labels: str | None
    label_field: str
    seed: int
    batch_size: int | None
    workers: int | None
    device: str | None
    amp: bool
    torchcompile: bool
    token_labels: str | None
    token_label_weights: str | None
    token_label_size: int | None
    shard_size: int
    limit: int | None
    max_failures: float
    overwrite: bool
    retry_failed: bool
    given: frozenset[str]


def run(options: Options) -> None:
    """Mine; under torchrun each rank mines its own shards and speaks to no other.

    Raises:
        TicketSetError: whatever a person can mend.
    """
    quiet_libraries()
    rank, world = rank_and_world()
    folder = Path(options.out)
    source = open_source(
        options.data,
        options.splits,
        options.labels,
        options.label_field,
        options.val_share,
        options.seed,
        options.base,
    )
    options = inherit(options, source)
    check_method(options)
    selector, identity = build_selector(options)
    labeller = token_labeller(options, source)
    device = labeller.device if labeller else selector.device
    mined = plan_of(options, source, selector.k, identity, labeller, device)
    folder.mkdir(parents=True, exist_ok=True)
    own = [shard for i, shard in enumerate(mined.shards()) if i % world == rank]
    with Claim(folder) as claim:
        plan, done = settle(claim, options, mined, source, device, own)
        if rank == 0:
            show_plan(plan, source, folder, str(device), list(mined.splits))
        if done and rank == 0:
            print(f"resuming: {len(done)} of {len(own)} shards are done")
        todo = [shard for shard in own if shard not in done]
        seconds, progress = 0.0, Progress()
        if todo:
            started = time.monotonic()
            screen = Screen(shard_images(plan, source, todo)) if rank == 0 else None
            workers = options.workers or min(os.cpu_count() or 1, 16)
            on_batch: Callable[[Progress], None] = screen.update if screen else lambda progress: None
            miner = Miner(plan, source, selector, folder, workers, on_batch, labeller=labeller)
            allowed = options.max_failures * shard_images(plan, source, own) - sum(s.failed for s in done.values())
            try:
                with models.compiling():
                    miner.run(todo, allowed)
            except torch.OutOfMemoryError as error:  # the device's; the host's is a MemoryError
                raise TicketSetError(f"--device {device}: {first_line(error)} Take a smaller --batch-size") from None
            finally:
                if screen:
                    screen.close()
                seconds, progress = time.monotonic() - started, miner.progress
        complete = finish(folder, plan, source)
    if complete:
        if rank == 0 or todo:
            show_summary(folder, seconds, progress, f"rank {rank} of {world} mined" if world > 1 else "mined")
    elif rank == 0:
        missing = [fmt.shard_name(*s) for s in plan.shards() if read_shard_json(folder, *s) is None]
        if missing:
            print(f"not complete yet: {len(missing)} shards are missing (first: {missing[0]});", end=" ")
            print("other ranks are at them" if world > 1 else "run the command that mines them again")


def settle(
    claim: Claim,
    options: Options,
    mined: Plan,
    source: Source,
    device: torch.device,
    own: list[tuple[str, int]],
) -> tuple[Plan, dict[tuple[str, int], ShardStats]]:
    """Agree on the folder's plan, and let others of the same plan in.

    Returns:
        The plan of the whole folder, and the JSON of those of this process's shards that are done.
    Raises:
        TicketSetError: the folder holds, or another process mines, a set of another plan.
    """
    folder = Path(options.out)
    if not claim.alone and (options.overwrite or options.retry_failed):
        raise TicketSetError(
            f"--{'overwrite' if options.overwrite else 'retry-failed'}: another datalth-mine is at work in {folder};"
            f" stop it, or wait until it is done"
        )
    if options.overwrite:
        remove_set(folder)
    if claim.alone and claim.locked:
        remove_temporary(folder)
    plan = write_plan(folder, mined, source, device.type, options.retry_failed, claim.alone)
    done = committed(folder, plan, own, options.retry_failed)
    if claim.alone and claim.locked:
        claim.share()
        plan = write_plan(folder, mined, source, device.type, alone=False)
    return plan, done


def inherit(options: Options, source: Source) -> Options:
    """A ticket set as source brings its views, seed, frame and sizes.

    Raises:
        TicketSetError: one of these was given, or --images link has nothing to link to.
    """
    if source.base is None:
        if options.images == "link":
            raise TicketSetError(f"--images link: --data {options.data} is no ticket set; there is nothing to link to")
        return options
    if Path(options.out).resolve() == Path(source.base.url).resolve():
        raise TicketSetError(f"--out {options.out}: is the set that holds the images of --data {options.data}")
    for name in sorted(INHERITED & options.given):
        raise TicketSetError(f"--{name.replace('_', '-')}: inherited from the ticket set {options.data}; leave it out")
    inherited = {name: getattr(source.base.manifest, name) for name in ("seed", "exif", *SIZES)}
    for name in sorted(SIZES & options.given):
        if getattr(options, name) != inherited[name]:
            raise TicketSetError(
                f"--{name.replace('_', '-')}: the ticket set {options.data} is of {inherited[name]} pixels, got"
                f" {getattr(options, name)}; leave it out"
            )
    return replace(options, **inherited)


def build_selector(options: Options) -> tuple[Selector, SelectorIdentity]:
    """The selector, and what identifies it in the plan."""
    grid = (options.img_size // options.patch_size,) * 2
    n, method = grid[0] * grid[1], options.method
    model = models.build_vit(options.selector, grid, options.weights) if uses_model(options) else None
    state = models.state_hash(model) if model else None
    blocks = parse_blocks(options.drop_blocks)
    if method == "evit" and model and blocks is None:
        blocks = default_blocks(len(model.blocks))
    stages = len(blocks) if method == "evit" and blocks else PAPER_STAGES
    rate = DEFAULT_KEEP_RATE if options.keep_rate is None else options.keep_rate
    try:
        if method == "none":
            counts: tuple[int, ...] = (0,)
        else:
            counts = keep_counts_for(n, options.tokens, stages) if options.tokens else keep_counts(n, rate, stages)
    except ValueError as error:
        raise TicketSetError(f"--{'tokens' if options.tokens else 'keep-rate'}: {error}") from None
    device = options.device or default_device()
    try:
        selector = create_selector(method, model, grid, counts, blocks, device, options.amp, options.torchcompile)
    except (RuntimeError, AssertionError) as error:  # torch's word on a device that is not there
        raise TicketSetError(f"--device {device}: {first_line(error)}") from None
    blind = method in BLIND
    if model:
        config = resolve_model_data_config(model)
    else:
        config = {"mean": (), "std": ()} if blind else {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return selector, SelectorIdentity(
        method=method,
        model=models.timm_name(options.selector) if model else None,
        state=state,
        keep_rate=None if options.tokens or method == "none" else rate,
        counts=tuple(counts),
        blocks=tuple(selector.blocks),
        input_size=grid[0] * models.square_patch(model) if model else None if blind else options.img_size,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        dtype="bfloat16" if options.amp and not blind else "float32",
        compiled=options.torchcompile,
        # Another version of a user's own method is another plan.
        code=source_hash(find_method(method)) if ":" in method else None,
    )


def token_labeller(options: Options, source: Source) -> Labeller | None:
    """The model of --token-labels."""
    if options.token_labels is None:
        return None
    device = options.device or default_device()
    try:
        return build_labeller(
            options.token_labels,
            options.token_label_weights,
            source.classes,
            device,
            options.amp,
            options.token_label_size,
        )
    except (RuntimeError, AssertionError) as error:
        raise TicketSetError(f"--device {device}: {first_line(error)}") from None


def check_method(options: Options) -> None:
    """Refuse an unknown method before weights are loaded, and flags that one without a model would ignore.

    Raises:
        TicketSetError: see above.
    """
    unused = [] if uses_model(options) else ["selector", "weights", "drop_blocks", "torchcompile"]
    if options.method in BLIND and options.token_labels is None:
        unused.append("amp")
    for name in unused:
        if name in options.given:
            raise TicketSetError(f"--{name.replace('_', '-')}: --method {options.method} uses no model; leave it out")
    if options.method != "none":
        return
    for name in ("keep_rate", "tokens"):
        if name in options.given:
            raise TicketSetError(f"--{name.replace('_', '-')}: --method none mines no tickets; leave it out")
    if options.token_labels is None or options.images != "link":
        raise TicketSetError(
            "--method none: mines token labels alone; expected --token-labels and --images link beside it"
        )


def uses_model(options: Options) -> bool:
    """Whether --selector's model is to be loaded: the method needs one, or one was asked for that it may use.

    Raises:
        TicketSetError: there is no such method.
    """
    asked = bool({"selector", "weights"} & options.given) and options.method not in BLIND
    return needs_model(options.method) or asked


def source_hash(function: Callable[..., Any]) -> str:
    """sha256 of the file that a user's method is in.

    Raises:
        TicketSetError: it is in none.
    """
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        raise TicketSetError(f"--method: expected a function in a Python file, got {function!r}") from None


def default_device() -> str:
    """This rank's GPU, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def plan_of(
    options: Options,
    source: Source,
    k: int,
    identity: SelectorIdentity,
    labeller: Labeller | None,
    device: torch.device,
) -> Plan:
    planned = None if options.overwrite else planned_batch_size(options.out)
    on_cpu = device.type == "cpu"  # where small batches stay in the caches: measured 1.25 times 128's rate
    batch_size = options.batch_size or planned or (16 if on_cpu else 128)
    return make_plan(
        source,
        identity,
        img_size=options.img_size,
        patch_size=options.patch_size,
        k=k,
        views=options.views,
        viewed=options.splits or ("train",),
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        exif=options.exif,
        store_side=options.store_side,
        images=options.images,
        val_share=options.val_share,
        seed=options.seed,
        batch_size=batch_size,
        shard_size=options.shard_size,
        limit=options.limit,
        token_labels=labeller.identity(max(1, batch_size // VIEWS_AN_IMAGE)) if labeller else None,
    )


def planned_batch_size(folder: str) -> int | None:
    """That of the plan which is there: a run may be resumed on another kind of device."""
    plan = read_plan(Path(folder))
    return plan.common.batch_size if plan else None


def remove_set(folder: Path) -> None:
    """Remove a ticket set's own files, the manifest first; anything else in the folder stays."""
    number = "-" + "[0-9]" * 6
    remove_temporary(folder)
    shards = [f"*{number}.json", f"*{number}.tar", f"{fmt.INDEX}/*{number}.parquet"]
    for pattern in [fmt.MANIFEST, fmt.TIMM_INFO, fmt.OPEN_CLIP_SIZES, *shards]:
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):  # not there, or not empty
        (folder / fmt.INDEX).rmdir()
    (folder / fmt.PLAN).unlink(missing_ok=True)  # last: until then the folder is known to be ours


def remove_temporary(folder: Path) -> None:
    """Remove what killed runs left; nobody else may be writing."""
    for stale in [*folder.glob("*.tmp"), *(folder / fmt.INDEX).glob("*.tmp")]:
        stale.unlink(missing_ok=True)


def committed(folder: Path, plan: Plan, own: list[tuple[str, int]], retry: bool) -> dict[tuple[str, int], ShardStats]:
    """The JSON of those shards that are done; with `retry`, shards with failures lose theirs.

    Raises:
        TicketSetError: a shard of another plan.
    """
    done = {}
    for split, number in own:
        stats = read_shard_json(folder, split, number)
        if stats is None:
            continue
        path = folder / f"{fmt.shard_name(split, number)}.json"
        if stats.plan_id != plan.splits[split].plan_id:
            raise TicketSetError(f"{path}: a shard of another plan; remove it to mine it again")
        if retry and stats.failed:
            (folder / fmt.MANIFEST).unlink(missing_ok=True)  # first: the set is incomplete from here on
            path.unlink()
            continue
        done[split, number] = stats
    return done


def shard_images(plan: Plan, source: Source, shards: list[tuple[str, int]]) -> int:
    """Inputs in some shards."""
    return sum(len(shard_rows(plan, source, split, number)) for split, number in shards)


def finish(folder: Path, plan: Plan, source: Source) -> bool:
    """Write the manifest if every shard of the folder's plan is done; says whether it is.

    Raises:
        TicketSetError: a shard of another plan, or the folder's plan is another by now.
    """
    done = committed(folder, plan, plan.shards(), retry=False)
    if len(done) < len(plan.shards()):
        return False
    for split in plan.splits:
        check_unchanged(folder, split, plan.splits[split].plan_id)
    finalize(folder, plan, source.classes, base_link(plan, source, folder), list(done.values()))
    return True


def quiet_libraries() -> None:
    """timm logs what the plan says anyway."""
    logging.getLogger("timm").setLevel(logging.ERROR)
