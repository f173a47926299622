"""datalth-mine: a labelled image set -> a ticket set."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from shards import format as fmt
from shards.console import reports_errors
from shards.errors import TicketSetError

if TYPE_CHECKING:
    from miner.plan import Plan
    from miner.selectors import Selector
    from miner.sources import Source

# A ticket set brings these along when it is the source.
INHERITED = ("views", "scale", "ratio", "hflip", "seed", "exif", "store_side", "val_share", "shard_size", "limit", "labels")

EXAMPLES = """
\b
Examples:
  datalth-mine --data photos --out tickets
  datalth-mine --data imagenet --out shards --keep-rate 0.8 --amp
  datalth-mine --data shards --images link --keep-rate 0.7 --out shards-r.7
  torchrun --no-python --nproc-per-node 8 datalth-mine --data imagenet --out shards
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--data", required=True, metavar="SPEC", help="Image folder, WebDataset tars, ImageNet tars, another ticket set, or timm:READER.")
@click.option("--out", required=True, metavar="DIR", help="Folder of the new ticket set; the same command again resumes it.")
@click.option("--split", "splits", multiple=True, metavar="S", help="Mine only this split (repeatable). A split can be added later.")
@click.option("--selector", default="deit_small", show_default=True, metavar="NAME", help="timm ViT that ranks, or deit_tiny|deit_small|deit_base.")
@click.option("--weights", metavar="FILE", help="Its weights, .safetensors or .pth. Default: timm's pretrained ones.")
@click.option("--method", default="evit", show_default=True, help="evit, cls-attention, rollout, random, center, or module:function.")
@click.option("--keep-rate", type=float, metavar="R", help="Share of patches kept at each of three stages.  [default: 0.9]")
@click.option("--drop-blocks", metavar="I,J,K", help="Blocks at which evit drops (default: quarter points, 3,6,9 of 12); the one block of cls-attention and rollout (default: the last).")
@click.option("--tokens", type=click.IntRange(min=1), metavar="K", help="Patches in a ticket, instead of --keep-rate.")
@click.option("--img-size", type=click.IntRange(min=1), default=224, show_default=True, help="Student's input, pixels.")
@click.option("--patch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Student's patch, pixels.")
@click.option("--views", type=click.IntRange(min=1), metavar="V", help="Views of every image, the canonical one included.  [default: 16 for train, 1 for other splits]")
@click.option("--scale", type=float, nargs=2, default=(0.08, 1.0), show_default=True, metavar="MIN MAX", help="Area of random views.")
@click.option("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), metavar="MIN MAX", help="Width / height of random views.  [default: 3/4 4/3]")
@click.option("--hflip", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Probability that a random view is flipped.")
@click.option("--images", type=click.Choice(["copy", "link"]), default="copy", show_default=True, help="link: from a ticket set, write tickets only and leave the images there.")
@click.option("--base", metavar="DIR", help="Where the base of a linked --data is now.")
@click.option("--exif", type=click.Choice(["ignore", "apply"]), default="ignore", show_default=True, help="EXIF orientation; timm and torchvision ignore it.")
@click.option("--store-side", type=click.IntRange(min=1), metavar="S", help="Store larger images as JPEGs of this short side.")
@click.option("--val-share", type=click.FloatRange(0, 0.9), default=0.1, show_default=True, help="Share of images that make a val split where there is none; 0: none.")
@click.option("--labels", metavar="FILE.csv", help="filename,class for images that carry no class.")
@click.option("--label-field", default="label", show_default=True, help="Label in a WebDataset sample's json.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of views, order and random tickets.")
@click.option("-b", "--batch-size", type=click.IntRange(min=1), default=128, show_default=True, help="Views per selector batch.")
@click.option("-j", "--workers", type=click.IntRange(min=1), help="Threads that read and decode.  [default: cores, 16 at most]")
@click.option("--device", help="cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.option("--amp", is_flag=True, help="Run the selector in bfloat16; scores stay float32.")
@click.option("--torchcompile", is_flag=True, help="torch.compile the selector's blocks.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1000, show_default=True, help="Images in a shard.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images of each split, for a try.")
@click.option("--max-failures", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Stop past this share of failed images.")
@click.option("--overwrite", is_flag=True, help="Remove the ticket set in --out and start anew.")
@click.option("--retry-failed", is_flag=True, help="Mine the shards that hold failed images again.")
@click.pass_context
@reports_errors
def main(context: click.Context, **options: Any) -> None:
    """Rank every image's patches once and write them beside the images into WebDataset shards.

    The first K patches of a ranking are the image's ticket. Training on tickets (datalth-train) then
    never runs the selector again. Interrupted runs resume at the shard.
    """
    check_options(options)
    folder = check_folder(options["out"], options["data"], options["overwrite"])
    run(context, options, folder)


def check_options(options: dict[str, Any]) -> None:
    """Refuse what cannot be meant, before anything slow is imported."""
    if options["tokens"] and options["keep_rate"] is not None:
        raise click.UsageError("--tokens and --keep-rate both say how many patches a ticket has; give one of them")
    if options["img_size"] % options["patch_size"]:
        raise click.UsageError(f"--img-size {options['img_size']} is no multiple of --patch-size {options['patch_size']}")
    for name in ("scale", "ratio"):
        low, high = options[name]
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise click.UsageError(f"--{name}: expected 0 < MIN <= MAX{' <= 1' if name == 'scale' else ''}, got {low:g} {high:g}")
    if _world() > 1 and options["overwrite"]:
        raise click.UsageError("--overwrite under torchrun: ranks would remove each other's work; remove the folder first")


def check_folder(out: str, data: str, overwrite: bool) -> Path:
    """The output folder, made if need be.

    Raises:
        TicketSetError: it holds something that is no ticket set, or lies inside the data.
    """
    if "://" in out:
        raise TicketSetError(f"--out {out}: expected a local folder (shards are renamed when whole); upload it afterwards")
    folder = Path(out)
    if folder.is_file():
        raise TicketSetError(f"--out {out}: expected a folder, got a file")
    if os.path.isdir(data) and folder.resolve().is_relative_to(Path(data).resolve()):
        raise TicketSetError(f"--out {out}: lies inside --data {data}; its shards would be taken for images")
    names = sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") if folder.is_dir() else []
    if "__init__.py" in names:
        raise TicketSetError(f"--out {out}: this is Python source code (it holds __init__.py); run in a work folder, or name another --out")
    if names and fmt.PLAN not in names:
        raise TicketSetError(f"--out {out}: holds other files (first: {names[0]}); give an empty or new folder")
    if overwrite:
        remove_set(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_set(folder: Path) -> None:
    """Remove a ticket set's own files, the manifest first; anything else in the folder stays."""
    ours = [fmt.MANIFEST, fmt.TIMM_INFO, fmt.OPEN_CLIP_SIZES, "*-[0-9]*.json", "*-[0-9]*.tar", f"{fmt.INDEX}/*.parquet", "*.tmp", f"{fmt.INDEX}/*.tmp", fmt.PLAN]
    for pattern in ours:
        for path in folder.glob(pattern):
            path.unlink()


def run(context: click.Context, options: dict[str, Any], folder: Path) -> None:
    """List, plan, mine what is not done yet, finalize when all is."""
    from miner.engine import Miner, Progress
    from miner.plan import write_plan
    from miner.screen import Screen, show_plan, show_summary
    from miner.sources import open_source

    quiet_libraries()
    rank, world = int(os.environ.get("RANK", 0)), _world()
    source = open_source(
        options["data"],
        options["splits"],
        options["labels"],
        options["label_field"],
        options["val_share"],
        options["seed"],
        options["base"],
    )
    inherit(context, options, source)
    selector, identity = build_selector(options)
    mined = plan_of(options, source, selector, identity)
    plan = write_plan(folder, mined, source, str(selector.device), options["retry_failed"])
    if rank == 0:
        show_plan(plan, source, folder, str(selector.device), list(mined.splits))

    own = [shard for i, shard in enumerate(mined.shards()) if i % world == rank]
    done = committed(folder, plan, own, options["retry_failed"])
    todo = [shard for shard in own if shard not in done]
    images = shard_images(plan, source, todo)
    allowed = options["max_failures"] * shard_images(plan, source, own) - sum(s["failed"] for s in done.values())
    if done and rank == 0:
        click.echo(f"resuming: {len(done)} of {len(own)} shards are done")
    progress, seconds = Progress(), 0.0
    if todo:
        screen = Screen(images) if rank == 0 else None
        workers = options["workers"] or min(os.cpu_count() or 1, 16)
        miner = Miner(plan, source, selector, folder, workers, screen.update if screen else lambda progress: None)
        try:
            miner.run(todo, allowed)
        finally:
            seconds = screen.close() if screen else 0.0
        progress = miner.progress
    if finish(folder, plan, source) and rank == 0:
        show_summary(folder, seconds, progress)
    elif rank == 0:
        click.echo("this rank is done; whichever rank is last finalizes the set")


def inherit(context: click.Context, options: dict[str, Any], source: "Source") -> None:
    """A ticket set as source brings its views, seed and frame; giving others is an error."""
    from click.core import ParameterSource

    if source.base is None:
        if options["images"] == "link":
            raise TicketSetError(f"--images link: --data {options['data']} is no ticket set; there is nothing to link to")
        return
    given = [n for n in INHERITED if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise TicketSetError(f"{flag}: inherited from the ticket set {options['data']}; leave it out")
    manifest = source.base.manifest
    options.update(seed=manifest["seed"], exif=manifest["exif"], store_side=None)


def build_selector(options: dict[str, Any]) -> tuple["Selector", dict[str, Any]]:
    """The selector, and what identifies it in the plan."""
    from miner import models
    from miner.drop import PAPER_STAGES, default_blocks, keep_counts, keep_counts_for
    from miner.selectors import MODEL_FREE, create_selector

    grid = (options["img_size"] // options["patch_size"],) * 2
    n, method = grid[0] * grid[1], options["method"]
    model, state = None, None
    if method not in MODEL_FREE:
        model = models.build_vit(options["selector"], grid, options["weights"])
        state = models.state_hash(model)
    blocks = parse_blocks(options["drop_blocks"])
    if method == "evit" and blocks is None and model is not None:
        blocks = default_blocks(len(model.blocks))
    stages = len(blocks) if method == "evit" and blocks else PAPER_STAGES
    rate = None if options["tokens"] else 0.9 if options["keep_rate"] is None else options["keep_rate"]
    try:
        counts = keep_counts_for(n, options["tokens"], stages) if rate is None else keep_counts(n, rate, stages)
    except ValueError as error:
        raise TicketSetError(f"--{'tokens' if rate is None else 'keep-rate'}: {error}") from None
    device = options["device"] or default_device()
    try:
        selector = create_selector(method, model, grid, counts, blocks, device, options["amp"], options["torchcompile"])
    except RuntimeError as error:
        raise TicketSetError(f"--device {device}: {str(error).splitlines()[0]}") from None
    identity: dict[str, Any] = {
        "method": method,
        "keep_rate": rate,
        "counts": list(counts),
        "model": None,
        "blocks": list(selector.blocks),
        "input_size": None,
        "mean": None,
        "std": None,
        "state": None,
        "dtype": "bfloat16" if options["amp"] and model else "float32",
        "compiled": options["torchcompile"],
        "code": code_hash(method),
    }
    if model is not None:
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(model)
        identity |= {
            "model": models.timm_name(options["selector"]),
            "input_size": grid[0] * models.square_patch(model),
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "state": state,
        }
    return selector, identity


def code_hash(method: str) -> str | None:
    """sha256 of a user's own method, so that another version of it is another plan."""
    if ":" not in method:
        return None
    import inspect

    from miner.selectors import METHODS

    return fmt.digest(inspect.getsource(METHODS[method]))


def parse_blocks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"--drop-blocks: expected block numbers like 3,6,9, got {text!r}") from None


def default_device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def plan_of(options: dict[str, Any], source: "Source", selector: "Selector", identity: dict[str, Any]) -> "Plan":
    from miner.plan import make_plan

    names = ("img_size", "patch_size", "views", "scale", "ratio", "hflip", "exif", "store_side", "images", "val_share", "seed", "batch_size", "shard_size", "limit")
    return make_plan(source, identity, k=selector.k, **{name: options[name] for name in names})


def committed(folder: Path, plan: "Plan", own: list[tuple[str, int]], retry: bool) -> dict[tuple[str, int], dict[str, Any]]:
    """The JSON of those shards that are done; with `retry`, shards with failures lose theirs.

    Raises:
        TicketSetError: a shard of another plan.
    """
    from shards.writer import read_shard_json

    done = {}
    for split, number in own:
        stats = read_shard_json(folder, split, number)
        if stats is None:
            continue
        name = fmt.shard_name(split, number)
        if stats["plan_id"] != plan.splits[split]["plan_id"]:
            raise TicketSetError(f"{folder / name}.json: a shard of another plan; remove it to mine it again")
        if retry and stats["failed"]:
            (folder / fmt.MANIFEST).unlink(missing_ok=True)  # first: the set is incomplete from here on
            (folder / f"{name}.json").unlink()
            continue
        done[split, number] = stats
    return done


def shard_images(plan: "Plan", source: "Source", shards: list[tuple[str, int]]) -> int:
    """Inputs in some shards."""
    if source.base:
        from miner.plan import shard_rows

        return sum(len(shard_rows(plan, source, split, number)) for split, number in shards)
    total = 0
    for split, number in shards:
        size = plan.splits[split]["shard_size"]
        total += min(size, plan.splits[split]["images"] - number * size)
    return total


def finish(folder: Path, plan: "Plan", source: "Source") -> bool:
    """Write the manifest if every shard of the folder's plan is done; says whether it is."""
    from shards.writer import finalize, read_shard_json

    from miner.plan import manifest_head

    stats = [read_shard_json(folder, split, number) for split, number in plan.shards()]
    if any(s is None for s in stats):
        return False
    finalize(folder, manifest_head(plan, source, folder), [s for s in stats if s])
    return True


def quiet_libraries() -> None:
    """Odd EXIF makes Pillow warn, once an image; the pixels are right."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("timm").setLevel(logging.ERROR)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


if __name__ == "__main__":
    sys.exit(main())
