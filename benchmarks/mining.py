"""Mining whole against its own legs: the bare selector on ready tensors, and bare decoding and rendering; then ranked
views against copies.

Whole runs with one thread that reads, one that selects and one that writes, on as many cores as there are; a bare leg has
one. deit_small (evit) shows a device as the bottleneck; a selector that looks at nothing shows decoding as the
bottleneck, as a fast device would. Ranked views are encoded and decoded before that selector, and encoded once more
behind it. Weights are random: they cost the same.
"""

import shutil
from pathlib import Path
from typing import Any, Literal

import timm
import torch

from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from miner.drop import default_blocks, keep_counts
from miner.job import Job, mine_shards
from miner.models import timm_name
from miner.plan import make_plan, shard_rows, write_plan
from miner.producers import Producer, build_producers
from miner.producers.rankings import Rankings, describe
from miner.selectors import create_selector, register_method
from miner.settings import Geometry, Inputs, Labeling, Machine, Output, Selection
from miner.sources import open_source
from shards.images import render_pixels, store_image
from shards.store import open_store
from shards.views import image_views

SIZE, BATCH, GRID, N = 224, 16, (14, 14), 196
SLOWER = 1.15  # that ranked views may be mined where the selector is the bottleneck
# Method: model, bottleneck, images, views.
LEGS = {"evit": ("deit_small", "select", 8, 2), "nothing": ("test_vit", "decode and render", 200, 4)}


@register_method("nothing")
def nothing(selector: Any, images: Any, seeds: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Raster order, for free."""
    return torch.arange(N).expand(len(images), -1), torch.ones(len(images), N)


def measure(setting: Setting) -> Part:
    part = Part()
    for method, (model, bottleneck, images, views) in LEGS.items():
        name = f"{method}, {model}"
        laps = turns(legs(setting, method, model, images, views), setting.rounds)
        part.laps |= {f"{name}, {leg}": found for leg, found in laps.items()}
        figures, _ = speedup(laps["whole"], laps[bottleneck])  # CPU time of a whole is of all its threads
        part.rows.append(Row(f"mining whole, {name}, views/s", f"bare {bottleneck}", figures, wanted=(">=", 0.9)))
        spent = [
            (a.cpu / a.units + b.cpu / b.units) / (c.cpu / c.units)
            for a, b, c in zip(laps["select"], laps["decode and render"], laps["whole"], strict=True)
        ]
        part.rows.append(Row(f"CPU time of both bare legs, {name}", "mining whole", spent))
        rate, spared = speedup(laps["whole, ranked"], laps["whole"])
        wanted = (">=", 1 / SLOWER) if method == "evit" else None
        part.rows.append(Row(f"mining ranked views, {name}, views/s", "copies", rate, spared, wanted))
    return part


def legs(setting: Setting, method: str, name: str, images: int, views: int) -> dict[str, Leg]:
    inputs = Inputs(str(setting.pictures), ("train",), val_share=0.0, limit=images)
    geometry, machine = Geometry(img_size=SIZE, views=views), Machine(batch_size=BATCH, workers=1)
    source = open_source(inputs)
    model: Any = timm.create_model(timm_name(name), num_classes=0, img_size=SIZE).eval()
    blocks = default_blocks(len(model.blocks))
    selection = Selection(name, method=method, keep_rate=0.9)
    ranker = create_selector(method, model, GRID, keep_counts(N, 0.9, len(blocks)), blocks)
    identity = describe(ranker, selection, geometry, machine, None)
    rankings = Rankings(ranker, identity, BATCH, geometry.seed)
    folder = Path(setting.work, "mined")

    def job_of(kind: Literal["copy", "ranked"]) -> tuple[Job, tuple[Producer, ...]]:
        output = Output(str(folder), kind)
        producers = build_producers((rankings,), selection, output, geometry, source)
        plan = make_plan(source, inputs, output, geometry, {p.name: p.identity for p in producers}, BATCH)
        return Job(plan, source, open_store(folder), selection, Labeling(), geometry, machine, output), producers

    copy, ranked = job_of("copy"), job_of("ranked")
    rows = source.splits["train"].take(shard_rows(copy[0].plan, source, "train", 0)).to_pylist()
    total = len(rows) * views
    tensors = torch.randn(BATCH, 3, SIZE, SIZE)

    def whole(job: Job, producers: tuple[Producer, ...]) -> float:
        folder.mkdir()
        write_plan(open_store(folder), job.plan, source, "cpu")
        mine_shards(job, job.plan.shards(), producers)
        shutil.rmtree(folder)
        return total

    def select() -> float:
        for first in range(0, total, BATCH):
            ranker.rank(tensors[: min(BATCH, total - first)])
        return total

    def decode_and_render() -> float:
        for row in rows:
            stored, pixels = store_image(source.read(row)[0])
            render_pixels(pixels, image_views(0, row["key"], views, stored.width, stored.height), SIZE)
        return total

    wholes: dict[str, Leg] = {"whole": lambda: whole(*copy), "whole, ranked": lambda: whole(*ranked)}
    return {**wholes, "select": select, "decode and render": decode_and_render}
