"""datalth-train: a ticket set -> a trained ViT. Flags have timm's names, defaults are DeiT's recipe."""

import sys
from typing import Any

import click

from miner.drop import parse_blocks
from shards.console import Finite, reports_errors
from shards.errors import TicketSetError
from trainer.config import RECIPES, read_config

EXAMPLES = """
\b
Examples:
  datalth-train --shards shards --model deit_tiny --experiment winning
  datalth-train --shards shards --model deit_tiny --tickets random --experiment random
  datalth-train --shards shards -c quick --experiment try
  torchrun --no-python --nproc-per-node 8 datalth-train --shards shards --model deit_small --amp
"""


def key_values(context: click.Context, parameter: click.Parameter, texts: Any) -> dict[str, Any]:
    """--model-kwargs a=1 b=x, values as Python literals where they are some."""
    import ast
    import json

    out: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"expected NAME=VALUE, got {text!r}")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # text, or what is no literal
            out[name] = value
        try:
            json.dumps(out[name])  # config.json holds them too
        except (TypeError, ValueError, RecursionError):
            raise click.BadParameter(
                f"{name}: expected numbers, text, True, False, None or lists of them, got {value:.80}"
            ) from None
    return out


def block_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """3,6,9"""
    try:
        return parse_blocks(text)
    except TicketSetError as error:
        raise click.BadParameter(str(error)) from None


def cores() -> int:
    """Worker processes where none are asked for; outside Linux, whose sockets and memory they need, none."""
    import os

    return min(4, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 0


POSITIVE, COUNT = click.IntRange(min=1), click.IntRange(min=0)
SHARE, AMOUNT = Finite(0, 1), Finite(min=0)
OPTIONS: list[Any] = [
    click.option("-c", "--config", metavar="NAME|FILE.yaml", is_eager=True, callback=read_config, expose_value=False, help=f"Defaults for these flags: a recipe ({', '.join(RECIPES)}) or a file."),
    click.option("--shards", metavar="DIR", help="Ticket set, plain or linked.  [required, but for --eval --resume: the run's own]"),
    click.option("--token-labels", metavar="DIR|none", help="Set with token labels of the same images, for LV-ViT; none: use none.  [default: the ticket set's own]"),
    click.option("--base", metavar="DIR", help="Where the base of a linked set is now."),
    click.option("--model", default="deit_tiny", show_default=True, help="timm ViT, Swin, Hiera or CNN, lvvit_t|s|m, or deit_tiny|deit_small|deit_base."),
    click.option("--feed", metavar="NAME", help="What a ticket becomes: small-dense or zero for Swin, late or early for LV-ViT; other models have one way.  [default: the first]"),
    click.option("--tickets", type=click.Choice(["winning", "random", "random-fixed", "center", "inverse", "full"]), default="winning", show_default=True, help="Which patches to train on."),
    click.option("--tokens", type=POSITIVE, metavar="K", help="Another K of the same rankings.  [default: the set's]"),
    click.option("--resize-to-tokens", is_flag=True, help="The control of the same cost: the whole view at K coarser patches."),
    click.option("--unmask-epochs", type=COUNT, default=0, show_default=True, help="Train the last E epochs on all patches."),
    click.option("--drop-blocks", metavar="B,B,...", callback=block_numbers, help="Train a ticket selector: drop patches inside, at these blocks."),
    click.option("--keep-rate", type=Finite(0, 1, min_open=True), help="Of each drop block.  [default: 0.9]"),
    click.option("--fuse-token", is_flag=True, help="EViT's: what a block drops goes on as one token."),
    click.option("--shrink-start-epoch", type=COUNT, default=0, show_default=True, help="Keep all patches until then."),
    click.option("--shrink-epochs", type=COUNT, default=0, show_default=True, help="Then go down to --keep-rate over as many epochs."),
    click.option("--repeats", type=POSITIVE, default=3, show_default=True, help="Views replayed per decode (repeated augmentation)."),
    click.option("--train-split", default="train", show_default=True),
    click.option("--val-split", default="val", show_default=True),
    click.option("--pretrained", is_flag=True, help="Start from timm's pretrained weights."),
    click.option("--initial-checkpoint", metavar="FILE", help="Start from these weights."),
    click.option("--model-kwargs", multiple=True, callback=key_values, metavar="NAME=VALUE", help="For timm.create_model (repeatable)."),
    click.option("--drop-path", type=SHARE, default=0.1, show_default=True, help="Stochastic depth."),
    click.option("--grad-checkpointing", is_flag=True, help="Less memory, more time."),
    click.option("-b", "--batch-size", type=POSITIVE, default=128, show_default=True, help="Per device."),
    click.option("--grad-accum-steps", type=POSITIVE, default=1, show_default=True, help="Batches summed before an update."),
    click.option("--epochs", type=POSITIVE, default=300, show_default=True, help="Each as many views as there are images."),
    click.option("--opt", default="adamw", show_default=True, help="A timm optimizer."),
    click.option("--opt-kwargs", multiple=True, callback=key_values, metavar="NAME=VALUE", help="For the optimizer (repeatable)."),
    click.option("--momentum", type=Finite(), default=0.9, show_default=True, help="Of SGD and the like."),
    click.option("--layer-decay", type=Finite(), metavar="D", help="Learning rate times D a layer down; for fine-tuning."),
    click.option("--lr", type=AMOUNT, help="Absolute; overrides --lr-base."),
    click.option("--lr-base", type=AMOUNT, default=5e-4, show_default=True, help="Per 512 images of the global batch."),
    click.option("--weight-decay", type=AMOUNT, default=0.05, show_default=True),
    click.option("--clip-grad", type=AMOUNT, metavar="X", help="Clip gradients at X."),
    click.option("--clip-mode", type=click.Choice(["norm", "value", "agc"]), default="norm", show_default=True),
    click.option("--sched", default="cosine", show_default=True, help="A timm scheduler."),
    click.option("--warmup-epochs", type=COUNT, default=5, show_default=True),
    click.option("--warmup-lr", type=AMOUNT, default=1e-6, show_default=True),
    click.option("--min-lr", type=AMOUNT, default=1e-5, show_default=True),
    click.option("--smoothing", type=SHARE, default=0.1, show_default=True, help="Label smoothing."),
    click.option("--mixup", type=AMOUNT, default=0.8, show_default=True, help="Alpha; 0: off."),
    click.option("--cutmix", type=AMOUNT, default=1.0, show_default=True, help="Alpha; 0: off."),
    click.option("--mixup-prob", type=SHARE, default=1.0, show_default=True),
    click.option("--mixup-switch-prob", type=SHARE, default=0.5, show_default=True),
    click.option("--mix-token", is_flag=True, help="LV-ViT's own CutMix, on tokens; with --mixup 0 --cutmix 0."),
    click.option("--aa", default="rand-m9-mstd0.5-inc1", show_default=True, help="timm's policy; geometric ops leave the view as it is."),
    click.option("--color-jitter", type=AMOUNT, default=0.4, show_default=True, help="Where there is no --aa."),
    click.option("--reprob", type=SHARE, default=0.25, show_default=True, help="Random erasing."),
    click.option("--model-ema/--no-model-ema", default=True, show_default=True, help="Average the weights over the steps too."),
    click.option("--model-ema-decay", type=Finite(0, 1, max_open=True), default=0.99996, show_default=True),
    click.option("--amp", is_flag=True, help="Mixed precision."),
    click.option("--amp-dtype", type=click.Choice(["float16", "bfloat16"]), default="float16", show_default=True),
    click.option("--torchcompile", is_flag=True, help="torch.compile the model."),
    click.option("--device", help="cuda, cpu.  [default: cuda where there is one]"),
    click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=42, show_default=True),
    click.option("-j", "--workers", type=COUNT, default=cores, show_default="4, or as many as there are cores", help="Processes that read and decode."),
    click.option("--log-interval", type=POSITIVE, default=50, show_default=True, metavar="STEPS"),
    click.option("--recovery-interval", type=COUNT, default=0, show_default=True, metavar="STEPS", help="Save within an epoch."),
    click.option("--output", default="output", show_default=True, metavar="DIR", help="Folder of the runs."),
    click.option("--experiment", metavar="NAME", help="Folder of this run.  [default: time, model, tickets]"),
    click.option("--resume", metavar="PATH|latest", help="Go on from a run's folder or checkpoint; latest: from --experiment's, if it has begun."),
    click.option("--log-tensorboard", is_flag=True, help="Also write TensorBoard events; pip install 'datalth[tensorboard]'."),
    click.option("--wandb-project", metavar="NAME", help="Also log to Weights & Biases; pip install 'datalth[wandb]'."),
    click.option("--eval", is_flag=True, help="Only validate, under all protocols that apply."),
]  # fmt: skip


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@reports_errors
def main(**options: Any) -> None:
    """Train a ViT from scratch on the tickets of a set; feed only the kept patches, at their own positions.

    Defaults are DeiT's recipe for ImageNet; a small set needs another, such as -c quick. Validation reports accuracy
    on the selector's tickets and on all patches.
    """
    from trainer.options import Options

    if options["shards"] is None and not (options["eval"] and options["resume"]):
        raise click.UsageError("Missing option '--shards'.")
    try:
        from trainer.run import run  # imports torch

        sys.exit(run(Options(**options | {"shards": options["shards"] or ""})))
    except KeyboardInterrupt:  # what comes while it trains is heard there
        click.echo("SIGINT: stopped; nothing was to be saved", err=True)
        sys.exit(130)


for _option in OPTIONS:
    main = _option(main)


if __name__ == "__main__":
    main()
