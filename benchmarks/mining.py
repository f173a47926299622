"""Mining against its own legs: the whole run, the bare selector on ready tensors, and bare decoding and rendering.

Each round does all three, one after the other in one process, so that the ratios hold on a noisy machine.

    python benchmarks/mining.py --data photos --selector vit_base_patch16_clip_quickgelu_224 --weights clip.safetensors
    python benchmarks/mining.py                  # cluttered digits, timm's test_vit with random weights
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import timm
import torch

from miner.drop import default_blocks, keep_counts
from miner.engine import Miner
from miner.models import build_vit, patch_size_of, timm_name
from miner.plan import make_plan, shard_rows, write_plan
from miner.selectors import create_selector
from miner.sources import open_source
from shards.images import render_pixels, store_image
from shards.views import image_views


@click.command()
@click.option("--data", help="As datalth-mine's.  [default: cluttered digits]")
@click.option("--selector", default="test_vit", show_default=True)
@click.option("--weights", help="Random ones by default: they cost the same.")
@click.option("--img-size", default=224, show_default=True)
@click.option("--keep-rate", default=0.9, show_default=True)
@click.option("--views", default=2, show_default=True)
@click.option("--limit", default=200, show_default=True, help="Images.")
@click.option("-b", "--batch-size", default=16, show_default=True)
@click.option("-j", "--workers", default=2, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write JSON here.")
def main(data, selector, weights, img_size, keep_rate, views, limit, batch_size, workers, rounds, output):
    """Print views/s of each leg and the whole run's share of the slower one's rate."""
    work = Path(tempfile.mkdtemp())
    try:
        if data is None:
            data = work / "digits"
            digits = Path(__file__).parent.parent / "examples" / "make_digits.py"
            subprocess.run([sys.executable, digits, "--out", data, "--train", str(limit), "--val", "10"], check=True)
        source = open_source(str(data), ["train"])
        patch = patch_size_of(selector)
        grid = (img_size // patch,) * 2
        if weights is None:
            model = timm.create_model(timm_name(selector), num_classes=0, img_size=img_size).eval()
        else:
            model = build_vit(selector, grid, weights)
        blocks = default_blocks(len(model.blocks))
        ranker = create_selector("evit", model, grid, keep_counts(grid[0] * grid[1], keep_rate, len(blocks)), blocks)
        identity = {"input_size": img_size, "mean": [0.5] * 3, "std": [0.5] * 3}
        plan = make_plan(
            source, identity, img_size=img_size, patch_size=patch, k=ranker.k, views=views, scale=(0.08, 1.0),
            ratio=(3 / 4, 4 / 3), hflip=0.5, exif="ignore", store_side=None, images="copy", val_share=0.1, seed=0,
            batch_size=batch_size, shard_size=1000, limit=limit,
        )  # fmt: skip
        result = measure(plan, source, ranker, work, workers, rounds)
        result |= {
            "command": " ".join(["python", "benchmarks/mining.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        show(result)
        if output:
            output.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(work)


def measure(plan, source, ranker, work, workers, rounds):
    """Seconds of every round of each leg."""
    rows = source.splits["train"].take(shard_rows(plan, source, "train", 0)).to_pylist()
    total = len(rows) * plan.splits["train"]["views"]
    size, batch = plan.common["img_size"], plan.common["batch_size"]
    tensors = torch.randn(batch, 3, size, size)
    legs = {"whole": [], "select": [], "decode+render": []}
    for number in range(rounds + 1):  # the first warms up and is not counted
        folder = work / f"set{number}"
        folder.mkdir()
        write_plan(folder, plan, source, "cpu")
        seconds = {}
        start = time.perf_counter()
        Miner(plan, source, ranker, folder, workers).run(plan.shards(), len(rows))
        seconds["whole"] = time.perf_counter() - start
        shutil.rmtree(folder)
        start = time.perf_counter()
        for first in range(0, total, batch):
            ranker.rank(tensors[: min(batch, total - first)])
        seconds["select"] = time.perf_counter() - start
        start = time.perf_counter()
        for row in rows:  # one thread
            stored, pixels = store_image(source.read(row)[0])
            boxes = image_views(0, row["key"], plan.splits["train"]["views"], stored.width, stored.height)
            render_pixels(pixels, boxes, size)
        seconds["decode+render"] = time.perf_counter() - start
        if number:
            for leg, value in seconds.items():
                legs[leg].append(value)
    return {"views": total, "seconds": legs}


def show(result):
    seconds = result["seconds"]
    for leg, values in seconds.items():
        rates = [result["views"] / s for s in values]
        click.echo(f"{leg:14s} {statistics.median(rates):9.1f} views/s  ({min(rates):.1f} to {max(rates):.1f})")
    for leg in ("select", "decode+render"):
        ratios = np.array(seconds[leg]) / np.array(seconds["whole"])
        click.echo(
            f"whole run / bare {leg}: {np.median(ratios):.2f} of its rate ({ratios.min():.2f} to {ratios.max():.2f})"
        )


if __name__ == "__main__":
    main()
