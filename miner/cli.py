"""datalth-mine: a labeled image set -> a ticket set."""

import contextlib
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import click
from click.core import ParameterSource

from miner.folder import check_alone, check_target
from miner.settings import GROUPS, Fleet, Geometry, Inputs, Labeling, Machine, Output, Selection
from shards.console import reports_errors
from shards.flags import options_of, settings_from, usage_errors
from shards.ranks import rank_and_world
from shards.storage import is_remote

EXAMPLES = """
\b
Examples:
  datalth-mine --data photos --out tickets --selector dinov2
  datalth-mine --data imagenet --out shards --keep-rate 0.8 --amp
  datalth-mine --data shards --images link --keep-rate 0.7 --out shards-r.7
  datalth-mine --data shards --images ranked --out shards-ranked
  datalth-mine --data shards --images link --method none --token-labels dm_nfnet_f6 --out shards-labels
  datalth-mine --data imagenet --out shards --ray
  torchrun --no-python --nproc-per-node 8 datalth-mine --data imagenet --out shards
  datalth-mine --elastic --data s3://bucket/imagenet --out s3://bucket/shards
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@options_of(*GROUPS)
@click.version_option(package_name="datalth")
@click.pass_context
@reports_errors
def main(context: click.Context, **values: Any) -> None:
    """Rank every image's patches once and write them beside the images into WebDataset shards.

    The first K patches of a ranking are the image's ticket. Training on tickets (datalth-train) then
    never runs the selector again. Interrupted runs resume at the shard.

    \b
    Methods:
      evit            the paper's: dropped in three stages by the class token's attention
      cls-attention   the class token's attention at one block, all patches present
      rollout         attention rolled out from the first block
      pool-attention  the attention of a pooling head, as SigLIP's
      entropy         bits of a patch's gray levels, without a model: APT's score
      masks           how much of each patch lies in the true mask, of --masks: the oracle
      center, random  controls that look at nothing
      none            no tickets: a linked set of token labels alone
      module:function your own; docs/ARCHITECTURE.md shows one
    """
    inputs, output = settings_from(Inputs, values), settings_from(Output, values)
    selection, geometry = settings_from(Selection, values), settings_from(Geometry, values)
    labeling, machine = settings_from(Labeling, values), settings_from(Machine, values)
    fleet = settings_from(Fleet, values)
    world = rank_and_world()[1]
    with usage_errors():
        check_alone(output, fleet, world)
    check_target(output.out, inputs.data)  # the library checks both as well; here before torch is imported
    from miner.run import mine

    given = {name for name in values if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    try:
        with stopped_by_sigterm():
            mine(inputs, output, selection, geometry, labeling, machine, fleet, frozenset(given))
    except OSError as error:
        # A full disk says no more than that. What goes to a store is spooled on this machine before.
        error.filename = error.filename or (tempfile.gettempdir() if is_remote(output.out) else output.out)
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

    received: list[signal.Signals] = []

    def stop(number: int, frame: Any) -> None:
        received.append(signal.Signals(number))
        raise KeyboardInterrupt(*received[-1:])

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        # Not what was raised in the handler: Ray raises that anew, without its argument.
        raise KeyboardInterrupt(*received[:1]) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
