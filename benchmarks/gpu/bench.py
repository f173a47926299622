"""What each part is given: the device, how large everything is, and sets that are mined once. Clocks, and the thresholds."""

import itertools
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.pictures import make_pictures
from benchmarks.rounds import Row
from benchmarks.steps import Steps
from miner.models import timm_name

GRID, N, K = (14, 14), 196, 98

# By the text of a row behind its last colon; what is not here only informs.
WANTED: dict[str, tuple[str, float]] = {
    "rows that are no permutation": ("<=", 0),
    f"best {K} patches as in float64 on the CPU": (">=", 0.99),
    "rankings that differ when the batch is ranked again": ("<=", 0),
    "stopped before the end": (">=", 1),
    "files with other bytes than mined in one go": ("<=", 0),
    "losses against the CPU's, greatest difference": ("<=", 100),  # ppm
    "losses in bfloat16 that are not finite": ("<=", 0),
    "losses with an unmasked epoch that are not finite": ("<=", 0),
    "weights that differ after a stop and a resume": ("<=", 0),
    "speed-up over K = 196, share of what MACs promise": (">=", 0.8),
    "memory a view over K = 196, beyond the share of tokens": ("<=", 0.01),
    "against timm's patch_drop_rate": (">=", 0.97),
    "against the selector in the step, r = 0.9": (">=", 1.4),
    "against the selector in the step, r = 0.75": (">=", 1.55),
    "whole, share of the selector's rate": (">=", 0.9),
    "step fed from ranked views against one repeated batch": ("<=", 1.05),
    "weight masks against none": ("<=", 1.05),
    "waits of the host in a step": ("<=", 0),
    "waits of the host in a batch of validation": ("<=", 0),
    "loss under DistributedDataParallel against without": ("<=", 100),  # ppm
    "compiled against eager": (">=", 1),
}


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        pictures: JPEGs made.
        few: of them for small sets, in shards of `shard`.
        selector, student: models of the mining and training parts.
        models: by batch, of the parts that time steps; the first for those that time one.
        warm, laps: steps not counted, and counted.
        views: mined of a picture where mining is timed.
        workers: of the loader.
        feed_batch, feed_steps: of the part that feeds.
        backend: of torch.compile.
        patience: as many times as long may a part take.
    """

    pictures: int = 1500
    few: int = 160
    shard: int = 12
    selector: str = "deit_small"
    student: str = "deit_tiny"
    student_batch: int = 32
    models: tuple[tuple[str, int], ...] = (("deit_small", 512), ("deit_tiny", 512), ("deit_base", 256))
    warm: int = 5
    laps: int = 20
    ranked: int = 64
    views: int = 8
    workers: tuple[int, ...] = (4, 8, 16)
    feed_batch: int = 256
    feed_seconds: float = 1.5
    feed_steps: int = 60
    backend: str = "inductor"
    patience: float = 1.0


SIZES = {
    "full": Size(),
    "toy": Size(
        pictures=30, few=24, shard=4, selector="test_vit", student="test_vit", student_batch=4, models=(("deit_tiny", 2),),
        warm=1, laps=1, ranked=4, views=3, workers=(1, 2), feed_batch=4, feed_seconds=0.2, feed_steps=2,
        backend="eager", patience=20,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Where it runs.

    Attributes:
        device: with its number.
        work: an empty folder.
    """

    device: torch.device
    size: Size
    work: Path

    @cached_property  # writes past the frozen __setattr__
    def pictures(self) -> Path:
        folder, count, cores = self.work / "pictures", self.size.pictures, len(os.sched_getaffinity(0))
        each = math.ceil(count / cores)
        starts = range(0, count, each)
        # Spawned: a fork of a process that has a GPU must not be relied on.
        with ProcessPoolExecutor(len(starts), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(make_pictures, folder), [min(each, count - first) for first in starts], starts))
        return folder

    @cached_property
    def weights(self) -> Path:
        """Of the selector: random, sharpened so that its attention differs from patch to patch."""
        torch.manual_seed(0)
        model: Any = timm.create_model(timm_name(self.size.selector), num_classes=0)
        state = {name: 4 * w if "qkv.weight" in name else w for name, w in model.state_dict().items()}
        save_file({name: w.contiguous() for name, w in state.items()}, self.work / "selector.safetensors")
        return self.work / "selector.safetensors"

    @cached_property
    def tickets(self) -> Path:
        """A small set of copies, mined in one go by the command."""
        return self.mine("tickets", *self.few)

    @cached_property
    def mined(self) -> Path:
        """Copies of all pictures, for a train split alone."""
        size = ["--shard-size", max(1, self.size.pictures // 10), "--val-share", 0]
        return self.mine("mined", *self.flags, *size, "--views", self.size.views)

    @cached_property
    def ranked(self) -> Path:
        """The same tickets with ranked views."""
        return self.mine("ranked", "--images", "ranked", data=self.mined)

    def host_alone(self, threads: int) -> Path:
        """The same, with a selector that looks at nothing: what the host's threads can give to any other."""
        size = ["--shard-size", max(1, self.size.pictures // 10), "--val-share", 0, "--views", self.size.views]
        method = ["--method", "benchmarks.mining:nothing", "--tokens", K, "--device", self.device.type, "-b", 128]
        return self.mine(f"host-{threads}", *method, *size, "-j", threads)

    @property
    def few(self) -> list[Any]:
        return [*self.flags, "--limit", self.size.few, "--shard-size", self.size.shard, "--views", 3]

    @property
    def flags(self) -> list[Any]:
        ranks = ["--selector", self.size.selector, "--weights", self.weights, "--tokens", K]
        return [*ranks, "--device", self.device.type, "-b", 128]

    def mine(self, name: str, *flags: Any, data: Path | None = None) -> Path:
        """datalth-mine as a process, to its end.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(self.command(name, *flags, data=data), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"datalth-mine of {name}: {(done.stderr or done.stdout).strip()[-300:]}")
        return self.work / name

    def command(self, name: str, *flags: Any, data: Path | None = None) -> list[str]:
        paths = ["--data", data or self.pictures, "--out", self.work / name]
        return [sys.executable, "-m", "miner.cli", *map(str, [*paths, *flags])]

    def steps(self, name: str, batch: int) -> Steps:
        """In bfloat16 on a GPU, as one trains there; many a CPU only emulates it."""
        return Steps(name, batch, self.device, amp=self.device.type == "cuda")

    def timed(self, step: Callable[[], Any]) -> list[float]:
        """Seconds of each counted step, by the device's own clock where it has one."""
        for _ in range(self.size.warm):
            step()
        if self.device.type != "cuda":
            return [self.seconds(step) for _ in range(self.size.laps)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.size.laps + 1)]
        torch.cuda.synchronize(self.device)
        marks[0].record()
        for mark in marks[1:]:
            step()
            mark.record()
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(marks)]

    def seconds(self, action: Callable[[], Any]) -> float:
        """Of one action by the wall, the device's work included."""
        self.wait()
        start = time.perf_counter()
        action()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """For all that the device was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def row(what: str, *values: float, unit: str = "x", against: str = "") -> Row:
    """A row with its threshold."""
    return Row(
        what, against, [float(value) for value in values], wanted=WANTED.get(what.rpartition(": ")[2]), unit=unit
    )


def rates(what: str, units: float, seconds: list[float]) -> Row:
    """A row of thousands a second, one value a lap."""
    return row(what, *(units / 1000 / lap for lap in seconds), unit="k views/s")
