"""datalth-weights: mine weight tickets, look at them, check them."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.console import duration, json_option, picture_option, print_json, printable, reports_errors, table
from shards.flags import options_of, settings_from
from trainer.config import config_option
from trainer.options import GROUPS, Boards, Output, Recipe, Weights, group_of
from trainer.weights.options import Mining

if TYPE_CHECKING:  # --help needs no numpy
    from trainer.weights.ticket import WeightTicket

_folder = click.argument("folder", metavar="W")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="datalth")
def main() -> None:
    """Weight tickets: which weights of a model are kept, mined once and trained many times. W is a ticket's folder.

    \b
    Examples:
      datalth-weights mine --shards shards --model deit_tiny --tickets full --sparsity 0.9 --out W
      datalth-weights info W -o kept.png
      datalth-weights verify W
      datalth-weights diff W W-seed1
    """


@main.command()
@config_option
@options_of(Mining, *(group for group in GROUPS if group not in (Weights, Output)), Boards)
@reports_errors
def mine(**values: Any) -> None:
    """Find a weight ticket by training on the tickets of a set, with all the flags of a training.

    imp trains the dense model, removes the weights of the smallest magnitude, starts again without them, and so on: L + 1
    trainings, of which the last is that of the ticket. Their runs lie in --out as level-00, level-01, ...

    \b
    Examples:
      datalth-weights mine --shards shards --model deit_tiny --tickets full --out imp-0 --seed 0
      datalth-weights mine --shards shards --method rst --sparsity 0.9 --transform-epochs 100 --out rst-0
      datalth-train --shards shards --tickets full --weight-ticket imp-0 --weight-arm shuffled
    """
    if values["shards"] is None:
        raise click.UsageError("Missing option '--shards'.")
    mining, boards = settings_from(Mining, values), group_of(Boards, values)
    names = {one.name for group in (Mining, Boards) for one in fields(group)}
    recipe = Recipe.of({name: value for name, value in values.items() if name not in names})
    from trainer.run import prepared  # imports torch
    from trainer.weights.mine import mine as mined

    with prepared(recipe) as (opened, rank):
        code = mined(mining, recipe, boards, opened, rank)
    sys.exit(code)


@main.command()
@_folder
@picture_option(required=False)
@json_option
@reports_errors
def info(folder: str, output: str | None, as_json: bool) -> None:
    """What a ticket is, what it keeps of each tensor, and what its levels reached and cost.

    \b
    Example: datalth-weights info W -o kept.png
    """
    from trainer.weights.info import screen

    ticket = _open(folder)
    if output:  # before the first line: `| head` ends the command
        from shards.storage import write_atomic
        from trainer.weights.plot import draw

        write_atomic(Path(output), draw(ticket))
    if as_json:
        print_json({"plan": ticket.plan.to_json(), "manifest": ticket.manifest.to_json()})
    else:
        click.echo(screen(ticket))


@main.command()
@_folder
@json_option
@reports_errors
def verify(folder: str, as_json: bool) -> None:
    """Check a ticket against what it says of itself. Exit code 1 where something is wrong.

    \b
    Example: datalth-weights verify W
    """
    import time

    from trainer.weights import verify as checks
    from trainer.weights.ticket import WeightTicket

    start = time.monotonic()
    ticket = WeightTicket.read(folder)
    problems = checks.verify(ticket)
    if as_json:
        print_json({"folder": folder, "levels": ticket.levels, "problems": problems})
    else:
        for problem in problems:
            click.echo(printable(problem))
        verdict = f"{len(problems)} problems" if problems else "sound"
        counts = f"{ticket.levels} levels, {len(ticket.plan.prunable)} tensors, {ticket.plan.total} weights"
        click.echo(f"{printable(folder)}: {verdict} ({counts}, {duration(time.monotonic() - start)})")
    if problems:
        sys.exit(1)


@main.command()
@click.argument("a", metavar="W1")
@click.argument("b", metavar="W2")
@click.option("--level", type=click.IntRange(min=1), metavar="N", help="Of both tickets.  [default: the last of each]")
@json_option
@reports_errors
def diff(a: str, b: str, level: int | None, as_json: bool) -> None:
    """How much the kept weights of two tickets agree, beside what random places in each tensor would.

    overlap: share of W1's kept weights that W2 keeps too. Jaccard: kept by both, of those kept by either. Hamming: share of
    all weights on which they differ.

    \b
    Example: datalth-weights diff W W-seed1
    """
    from shards.keys import natural_sorted
    from trainer.weights.compare import overlap

    tickets = _open(a), _open(b)
    found = overlap(*tickets, level)
    if as_json:
        print_json(found)
        return
    for name, number, ticket in zip(("W1", "W2"), found["levels"], tickets, strict=True):
        plan = ticket.plan
        click.echo(
            printable(f"{name}: {ticket.path}, {plan.method} at level {number} of {plan.levels}, seed {plan.seed}")
        )
    head = ["tensor", "kept 1", "kept 2", "overlap", "chance", "Jaccard", "chance", "Hamming", "chance"]
    rows = [_diff_row(name, found["tensors"][name]) for name in natural_sorted(found["tensors"])]
    rows.append(_diff_row("all", found["total"]))
    click.echo("\n" + table(rows, head))


def _diff_row(name: str, figures: dict[str, Any]) -> list[object]:
    shares = [figures[kind + suffix] for kind in ("overlap", "jaccard", "hamming") for suffix in ("", "_by_chance")]
    return [name, *figures["kept"], *shares]


def _open(folder: str) -> "WeightTicket":
    from trainer.weights.ticket import WeightTicket

    return WeightTicket.open(folder)


if __name__ == "__main__":
    main()
