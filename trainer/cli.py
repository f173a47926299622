"""datalth-train: a ticket set -> a trained ViT. Flags have timm's names, defaults are DeiT's recipe."""

import sys
from typing import Any

import click

from shards.console import reports_errors
from shards.flags import options_of
from trainer.config import config_option
from trainer.options import GROUPS, Output, Recipe, group_of

EXAMPLES = """
\b
Examples:
  datalth-train --shards shards --model deit_tiny --experiment winning
  datalth-train --shards shards --model deit_tiny --tickets random --experiment random
  datalth-train --shards shards -c quick --experiment try
  torchrun --no-python --nproc-per-node 8 datalth-train --shards shards --model deit_small --amp
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@config_option
@options_of(*GROUPS)
@click.version_option(package_name="datalth")
@reports_errors
def main(**values: Any) -> None:
    """Train a ViT from scratch on the tickets of a set; feed only the kept patches, at their own positions.

    Defaults are DeiT's recipe for ImageNet; a small set needs another, such as -c quick, or -c finetune from pretrained
    weights. Validation reports accuracy on the selector's tickets and on all patches.
    """
    if values["shards"] is None and not (values["eval"] and values["resume"]):
        raise click.UsageError("Missing option '--shards'.")
    recipe, output = Recipe.of(values), group_of(Output, values)
    try:
        from trainer.run import run  # imports torch

        sys.exit(run(recipe, output))
    except KeyboardInterrupt:  # what comes while it trains is heard there
        click.echo("SIGINT: stopped; nothing was to be saved", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
