"""datalth-mine: a labelled image set -> a ticket set."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from shards import format as fmt
from shards.console import reports_errors
from shards.errors import TicketSetError
from shards.ranks import rank_and_world
from shards.schema import MAX_SEED, MAX_SHARD_IMAGES, MAX_SIDE, MAX_STORE_SIDE, MAX_VIEWS

EXAMPLES = """
\b
Examples:
  datalth-mine --data photos --out tickets
  datalth-mine --data imagenet --out shards --keep-rate 0.8 --amp
  datalth-mine --data shards --images link --keep-rate 0.7 --out shards-r.7
  datalth-mine --data shards --images link --method none --token-labels dm_nfnet_f6 --out shards-labels
  torchrun --no-python --nproc-per-node 8 datalth-mine --data imagenet --out shards
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help="Image folder, WebDataset tars (quote globs), ImageNet tars, another ticket set, or timm:READER.",
)
@click.option(
    "--out", required=True, metavar="DIR", help="Folder of the new ticket set; the same command again resumes it."
)
@click.option(
    "--split",
    "splits",
    multiple=True,
    metavar="S",
    help="Mine only this split (repeatable). A split can be added later.",
)
@click.option(
    "--selector",
    default="deit_small",
    show_default=True,
    metavar="NAME",
    help="timm ViT that ranks, or deit_tiny|deit_small|deit_base; a method of your own is given one where this is typed, or where it says `needs_model`.",
)
@click.option("--weights", metavar="FILE", help="Its weights, .safetensors or .pth. Default: timm's pretrained ones.")
@click.option(
    "--method",
    default="evit",
    show_default=True,
    metavar="NAME",
    help="How patches are ranked; see above.",
)
@click.option(
    "--keep-rate", type=float, metavar="R", help="Share of patches kept at each of three stages.  [default: 0.9]"
)
@click.option(
    "--drop-blocks",
    metavar="I,J,K",
    help="Blocks at which evit drops (default: quarter points, 3,6,9 of 12); the one block of cls-attention and rollout (default: the last).",
)
@click.option("--tokens", type=click.IntRange(min=1), metavar="K", help="Patches in a ticket, instead of --keep-rate.")
@click.option(
    "--img-size",
    type=click.IntRange(1, MAX_SIDE),
    default=224,
    show_default=True,
    metavar="PX",
    help="Student's input, pixels.",
)
@click.option(
    "--patch-size",
    type=click.IntRange(1, MAX_SIDE),
    default=16,
    show_default=True,
    metavar="PX",
    help="Student's patch, pixels.",
)
@click.option(
    "--views",
    type=click.IntRange(1, MAX_VIEWS),
    metavar="V",
    help="Views of a train image, the canonical one included; of other splits only where --split names them.  [default: 16 for train, 1 for other splits]",
)
@click.option(
    "--scale",
    type=float,
    nargs=2,
    default=(0.08, 1.0),
    show_default=True,
    metavar="MIN MAX",
    help="Area of random views.",
)
@click.option(
    "--ratio",
    type=float,
    nargs=2,
    default=(3 / 4, 4 / 3),
    metavar="MIN MAX",
    help="Width / height of random views.  [default: 3/4 4/3]",
)
@click.option(
    "--hflip",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    metavar="P",
    help="Probability that a random view is flipped.",
)
@click.option(
    "--images",
    type=click.Choice(["copy", "link"]),
    default="copy",
    show_default=True,
    help="link: from a ticket set, write tickets only and leave the images there; copy: mine them into a whole set.",
)
@click.option("--base", metavar="DIR", help="Where the base of a linked --data is now.")
@click.option(
    "--exif",
    type=click.Choice(["ignore", "apply"]),
    default="ignore",
    show_default=True,
    help="EXIF orientation; timm and torchvision ignore it.",
)
@click.option(
    "--store-side",
    type=click.IntRange(1, MAX_STORE_SIDE),
    metavar="S",
    help="Store larger images as JPEGs of this short side.",
)
@click.option(
    "--val-share",
    type=click.FloatRange(0, 0.9),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of images that make a val split where there is none; 0: none.",
)
@click.option("--labels", metavar="FILE.csv", help="filename,class for images that carry no class.")
@click.option(
    "--label-field", default="label", show_default=True, metavar="NAME", help="Label in a WebDataset sample's json."
)
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    metavar="N",
    help="Of views, order and random tickets.",
)
@click.option(
    "-b",
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Views per selector batch.  [default: 128, on a CPU 16; a resumed run keeps its own]",
)
@click.option(
    "-j",
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads that read and decode.  [default: cores, 16 at most]",
)
@click.option("--device", metavar="NAME", help="cuda, cuda:1, mps, cpu.  [default: the best there is]")
@click.option("--amp", is_flag=True, help="Run the selector in bfloat16; scores stay float32.")
@click.option("--torchcompile", is_flag=True, help="torch.compile the selector's blocks.")
@click.option(
    "--token-labels",
    metavar="NAME",
    help="Also mine the likeliest five classes at every place (18 x 18) of every whole image, by this timm classifier of the set's classes.",
)
@click.option("--token-label-weights", metavar="FILE", help="Its weights.  [default: timm's pretrained ones]")
@click.option(
    "--token-label-size",
    type=click.IntRange(min=1),
    metavar="PX",
    help="Side of the whole image as it sees it; near the size that it was trained at.  [default: that of 18 places]",
)
@click.option(
    "--shard-size",
    type=click.IntRange(1, MAX_SHARD_IMAGES),
    default=1000,
    show_default=True,
    metavar="N",
    help="Images in a shard.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only N images of each split, for a try.")
@click.option(
    "--max-failures",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="SHARE",
    help="Stop past this share of failed images.",
)
@click.option("--overwrite", is_flag=True, help="Remove the ticket set in --out and start anew.")
@click.option("--retry-failed", is_flag=True, help="Mine the shards that hold failed images again.")
@click.pass_context
@reports_errors
def main(context: click.Context, **options: Any) -> None:
    """Rank every image's patches once and write them beside the images into WebDataset shards.

    The first K patches of a ranking are the image's ticket. Training on tickets (datalth-train) then
    never runs the selector again. Interrupted runs resume at the shard.

    \b
    Methods:
      evit            the paper's: dropped in three stages by the class token's attention
      cls-attention   the class token's attention at one block, all patches present
      rollout         attention rolled out from the first block
      center, random  controls that use no model
      none            no tickets: a linked set of token labels alone
      module:function your own; docs/ARCHITECTURE.md shows one
    """
    check_options(options)
    check_folder(options["out"], options["data"])
    from miner.run import Options, run  # imports torch

    given = {n for n in options if context.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    try:
        with stopped_by_sigterm():
            run(Options(**options, given=frozenset(given)))
    except OSError as error:
        error.filename = error.filename or options["out"]  # a full disk says no more than that
        raise
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        click.echo(
            f"{number.name}: stopped; finished shards are safe, and the same command goes on from there", err=True
        )
        raise SystemExit(128 + number) from None


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the work inside as Ctrl-C does, with everything put away; in a thread it cannot be asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_options(options: dict[str, Any]) -> None:
    """Refuse what cannot be meant, before anything slow is imported.

    Raises:
        click.UsageError: flags that do not go together.
        TicketSetError: RANK and WORLD_SIZE that name no place.
    """
    if options["tokens"] and options["keep_rate"] is not None:
        raise click.UsageError("--tokens and --keep-rate both say how many patches a ticket has; give one of them")
    for name in ("token_label_weights", "token_label_size"):
        if options[name] and not options["token_labels"]:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag}: expected --token-labels NAME beside it, the model that it is of")
    if options["img_size"] % options["patch_size"]:
        raise click.UsageError(
            f"--img-size {options['img_size']} is no multiple of --patch-size {options['patch_size']}"
        )
    for name in ("scale", "ratio"):
        low, high = options[name]
        if not 0 < low <= high or (name == "scale" and high > 1):
            raise click.UsageError(
                f"--{name}: expected 0 < MIN <= MAX{' <= 1' if name == 'scale' else ''}, got {low:g} {high:g}"
            )
    ranks = rank_and_world()[1]
    if ranks > 1 and options["overwrite"]:
        raise click.UsageError(
            "--overwrite under torchrun: ranks would remove each other's work; remove the folder first"
        )
    if ranks > 1 and options["retry_failed"]:
        raise click.UsageError(
            "--retry-failed under torchrun: a rank could finalize what another takes back; run it once without torchrun"
            " and stop it, then run torchrun without the flag"
        )
    if not options["out"] or not options["data"]:
        raise click.UsageError("--data and --out: expected names, got an empty one")


def check_folder(out: str, data: str) -> None:
    """Refuse an output folder that is none of ours.

    Raises:
        TicketSetError: it holds something that is no ticket set, or lies inside the data.
    """
    if "://" in out:
        raise TicketSetError(
            f"--out {out}: expected a local folder (shards are renamed when whole); upload it afterwards"
        )
    folder = Path(out)
    if folder.is_file():
        raise TicketSetError(f"--out {out}: expected a folder, got a file")
    roots = [data, os.path.join(os.environ.get("DATALTH_DATA", data), data)]
    if any(os.path.isdir(root) and folder.resolve().is_relative_to(Path(root).resolve()) for root in roots):
        raise TicketSetError(f"--out {out}: lies inside --data {data}; its shards would be taken for images")
    names = sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") if folder.is_dir() else []
    if "__init__.py" in names:
        raise TicketSetError(
            f"--out {out}: this is Python source code (it holds __init__.py); run in a work folder, or name another --out"
        )
    if names and fmt.PLAN not in names:
        raise TicketSetError(f"--out {out}: holds other files (first: {names[0]}); give an empty or new folder")
    if names:
        from shards.writer import read_plan  # imports pyarrow

        try:
            read_plan(folder)
        except TicketSetError as error:
            raise TicketSetError(
                f"{folder / fmt.PLAN}: not readable as a plan ({error}); empty the folder yourself, or give another --out"
            ) from None


if __name__ == "__main__":
    sys.exit(main())
