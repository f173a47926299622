"""python -m benchmarks [PART...]: measure, write benchmarks/results/PART.json, print the table of all results."""

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import click

PARTS = (
    "step", "families", "memory", "loader", "reading", "selector", "mining", "fleet", "scaling", "size", "cold", "epoch",
    "stores", "workers",
)  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice((*PARTS, "report")), metavar="[PART]...")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Class folders of JPEGs.  [default: made]")
@click.option("--images", default=400, show_default=True, help="How many are made.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--peers",
    envvar="DATALTH_PEERS",
    metavar="PYTHON",
    help="Of a virtual environment with litdata, mosaicml-streaming and torchvision; they pin older packages.",
)
def main(parts: tuple[str, ...], data: Path | None, images: int, rounds: int, peers: str | None) -> None:
    """Measure PARTs, all of them by default: step, families, memory, loader, reading, selector, mining, fleet, scaling,
    size, cold, epoch, stores, workers. `gpu` is a command of its own, see `gpu --help`.

    `report` measures nothing and prints the table of the results that lie in benchmarks/results.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core a leg, before numpy and torch are imported
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    import torch

    from benchmarks.report import table
    from benchmarks.rounds import save
    from benchmarks.setting import Setting

    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks", *("PATH" if "/" in a else a for a in sys.argv[1:])])
    work = Path(tempfile.mkdtemp(prefix="datalth-bench-"))
    setting = Setting(work, rounds, data, images, peers)
    try:
        for name in parts or PARTS:
            if name != "report":
                started = time.perf_counter()
                part = importlib.import_module(f"benchmarks.{name}").measure(setting)
                path = save(name, part, command)
                click.echo(f"{name}: {time.perf_counter() - started:.0f} s, {path.name}", err=True)
        click.echo(table(() if "report" in parts else parts))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"]:  # with all cores, and other rules
        from benchmarks.gpu.command import main as gpu

        gpu(sys.argv[2:], prog_name="python -m benchmarks gpu")
    main()
