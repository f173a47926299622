"""datalth-verdict: finished runs -> tables, a plot, and whether a ~ c > b holds."""

from pathlib import Path

import click

from shards.console import Finite, printable, reports_errors

EXAMPLES = """
\b
Example:
  for seed in 0 1 2; do
    for arm in winning random full; do
      datalth-train --shards shards --tickets $arm --seed $seed --experiment $arm-$seed
    done
  done
  datalth-verdict output/* -o verdict
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("folders", metavar="RUN...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="DIR", help="Also write verdict.html, .md, .json and .png into this folder.")
@click.option(
    "--margin",
    type=Finite(min=0),
    default=1.0,
    show_default=True,
    metavar="POINTS",
    help="How far winning tickets may stay below all patches and still count as equal.",
)
@click.option(
    "--allow-diff",
    multiple=True,
    metavar="FIELD",
    help="Let runs differ in this argument (as args.yaml names it) and group by it; repeatable.",
)
@click.version_option(package_name="datalth")
@reports_errors
def main(folders: tuple[str, ...], output: str | None, margin: float, allow_diff: tuple[str, ...]) -> None:
    """Say whether the data-level lottery ticket hypothesis holds in your runs.

    RUN is a folder that datalth-train has finished; others (of output/*) are named and left out. The claim is a ~ c > b: a
    student trained and tested on winning tickets (a) is about as good as one trained and tested on all patches (c), and
    better than one trained on random patches and tested on the tickets (b). It holds if, with 95 % certainty each, a - c is
    above -POINTS and a - b is above 0; it fails if one of them is surely below; else these runs cannot tell.

    Of weight tickets, at each sparsity: LTH (winning ~ dense, better than the mask on other weights and than it shuffled), DLTH
    (rst ~ imp, better than a random mask of as many updates), LOTUS (both tickets ~ neither, better than with one of them
    random); and whether random masks leave room to show anything.

    Runs must share the images and every argument but --tickets, --tokens, --seed, --unmask-epochs, --resize-to-tokens and
    --model; beside weight tickets --epochs may differ too. Several seeds of each arm give intervals over seeds (three or more are wise); with one seed each, images are
    resampled instead, which says nothing about other seeds.
    """
    from shards.errors import TicketSetError
    from trainer.verdict.report import verdict

    if output is not None and Path(output).exists() and not Path(output).is_dir():
        raise TicketSetError(f"-o {output}: expected a folder, got a file")
    report = verdict(folders, margin, sorted({field.replace("-", "_") for field in allow_diff}))
    written: list[Path] = []
    if output is not None:  # before the first line: `| head` ends the command
        from trainer.verdict.files import write_files

        written = write_files(report, Path(output))
    click.echo(report.screen())
    if written:
        click.echo("\nwritten: " + printable(", ".join(map(str, written))))


if __name__ == "__main__":
    main()
