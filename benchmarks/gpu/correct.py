"""Whether a GPU gives what a CPU gives, and the same each time: rankings, bytes, losses, weights."""

import contextlib
import hashlib
import math
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.bench import GRID, Bench, K, N, row
from benchmarks.rounds import Row
from benchmarks.steps import MEAN, STD
from miner.drop import default_blocks, keep_counts_for
from miner.models import build_vit
from miner.selectors import Selector, create_selector
from shards import format as fmt
from shards.reader import TicketSet
from trainer.engine import Stopped
from trainer.hooks import Hook
from trainer.options import Recipe
from trainer.output import checkpoint
from trainer.output.folder import RunFolder
from trainer.trainer import Trainer

CPU = torch.device("cpu")
STOP_AT = 3  # updates
EPOCHS = 2


def card(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """Which GPU, driver and attention kernels; the pictures of all parts are made here."""
    if bench.device.type == "cuda":
        known = torch.cuda.get_device_properties(bench.device)
        notes.append(f"{known.name}, {known.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}")
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            notes.append(f"driver, clock, its maximum, power: {said}")
        yield row("memory", known.total_memory / 1e9, unit="GB")
    block: Any = build_vit(bench.size.selector, GRID, str(bench.weights)).blocks[0].train().to(bench.device)
    for dtype in (torch.float32, torch.bfloat16):
        notes.append(f"attention of a training step in {dtype}: {attention_kernels(block.attn, dtype, bench.device)}")
    yield row("pictures made", bench.seconds(lambda: bench.pictures), unit="s")


def attention_kernels(attn: Any, dtype: torch.dtype, device: torch.device) -> str:
    """The backends that torch really takes for timm's attention, forward and backward."""
    tokens = torch.randn(8, K + 1, attn.qkv.in_features, device=device, requires_grad=True)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    with profile(activities=[ProfilerActivity.CPU]) as seen, mixed:
        attn(tokens).float().sum().backward()
    prefix = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(prefix) for event in seen.key_averages() if event.key.startswith(prefix)}
    return ", ".join(sorted(names)) or "none of torch's own"


def rankings(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """The selector in float32 on the device against float64 on the CPU; in other batches; with less precision."""
    images = views(bench)
    exact = selector(bench, CPU, torch.float64).rank(images.double())
    ours, images = selector(bench, bench.device), images.to(bench.device)
    found = ours.rank(images)
    yield row("rows that are no permutation", (found.sort(1).values.cpu() != torch.arange(N)).any(1).sum())
    yield row(f"best {K} patches as in float64 on the CPU", overlap(found, exact))
    yield row("rankings that differ when the batch is ranked again", differing(ours.rank(images), found))
    short = len(images) // 2 + 1
    alone = torch.cat([ours.rank(image[None]) for image in images[:8]])
    yield row("share of ranks that differ, alone against in a batch", differing(alone, found[:8]))
    yield row(
        "share of ranks that differ, short batch against full", differing(ours.rank(images[:short]), found[:short])
    )
    yield row("share of ranks that differ from float64 on the CPU", differing(found, exact))
    what = f"best {K} patches of float64,"
    plain = selector(bench, CPU).rank(images.cpu())
    yield row(f"{what} by the CPU's float32", overlap(plain, exact))
    yield row(f"{what} by bfloat16", overlap(selector(bench, bench.device, amp=True).rank(images), exact))
    for name, convolutions, products in (("no tf32", False, "highest"), ("tf32", True, "high")):
        with precision(convolutions, products):
            yield row(f"{what} by {name}", overlap(ours.rank(images), exact))


def views(bench: Bench) -> Tensor:
    """Pictures as the selector sees them: [B, 3, 224, 224]."""
    paths = sorted(bench.pictures.glob("*/*.jpg"))[: bench.size.ranked]
    side = GRID[0] * 16
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize((side, side))) for path in paths])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std


def selector(bench: Bench, device: torch.device, dtype: torch.dtype = torch.float32, amp: bool = False) -> Selector:
    model = build_vit(bench.size.selector, GRID, str(bench.weights)).to(dtype)
    blocks = default_blocks(len(model.blocks))
    return create_selector("evit", model, GRID, keep_counts_for(N, K, len(blocks)), blocks, device, amp)


def overlap(a: Tensor, b: Tensor) -> float:
    """Mean share of the best K patches that two rankings [B, N] have in common."""
    best = [torch.zeros(r.shape, dtype=torch.bool).scatter_(1, r[:, :K].cpu(), True) for r in (a, b)]
    return float((best[0] & best[1]).sum() / (K * len(a)))


def differing(a: Tensor, b: Tensor) -> float:
    """Share of ranks that hold another patch."""
    return float((a.cpu() != b.cpu()).float().mean())


@contextlib.contextmanager
def precision(convolutions: bool, products: str) -> Iterator[None]:
    """Where tf32 is allowed; torch's default is in convolutions alone."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def bytes_again(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """The command, killed with -9 after its first shard and called again, against the command left alone."""
    whole, killed = bench.tickets, bench.work / "killed"
    process = subprocess.Popen(
        bench.command("killed", *bench.few), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None and not list(killed.glob("*-0*.json")):
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    shards = len(list(whole.glob("*-0*.json")))
    yield row("stopped before the end", not (killed / fmt.MANIFEST).exists(), against=f"{shards} shards")
    notes.append(f"bytes: killed with {len(list(killed.glob('*-0*.json')))} of {shards} shards done")
    bench.mine("killed", *bench.few)
    one, other = sums(whole), sums(killed)
    differ = sum(one.get(name) != other.get(name) for name in one.keys() | other.keys())
    yield row(
        "files with other bytes than mined in one go", differ, against=f"{len(one)} tars and indices", unit="files"
    )


def sums(folder: Path) -> dict[str, str]:
    """sha256 of a set's tars and indices."""
    files = [path for path in folder.iterdir() if path.suffix in (".tar", ".parquet")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Losses(Hook):
    """Of every step; asks to stop after an update, where one is given."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.asked, self.seen = stop_at, 0, []

    def log(self, trainer: Trainer, figures: Any) -> None:
        self.seen.append(figures["loss"])

    def after_update(self, trainer: Trainer, update: int) -> None:
        if update == self.stop_at:
            self.asked = 15


def training(bench: Bench, notes: list[str]) -> Iterator[Row]:
    """The trainer on a set just mined: against the CPU, twice, in bfloat16, stopped and resumed, with an unmasked epoch."""
    first, student = train(bench)
    reference, _ = train(bench, device="cpu")
    worst = max(abs(a - b) / b for a, b in zip(first, reference, strict=True))
    against = f"{len(first)} steps of {bench.size.student}, float32"
    yield row("losses against the CPU's, greatest difference", 1e6 * worst, unit="ppm", against=against)
    half, _ = train(bench, amp=True, amp_dtype="bfloat16")
    yield row("losses in bfloat16 that are not finite", not_finite(half), unit="steps")
    worst = max(abs(a - b) / b for a, b in zip(half, first, strict=True))
    yield row("losses in bfloat16, greatest difference from float32", 1e6 * worst, unit="ppm")
    _, again = train(bench)
    yield row("share of weights that differ in a second run", differing(again, student))
    with deterministic():  # so that a difference is the resume's
        _, never = train(bench)
        _, resumed = stopped_and_resumed(bench)
    yield row("weights that differ after a stop and a resume", (never != resumed).sum(), unit="weights")
    unmasked, _ = train(bench, unmask_epochs=1)
    yield row("losses with an unmasked epoch that are not finite", not_finite(unmasked), unit="steps")
    notes.append(f"training: {len(unmasked)} steps, from K = {K} to {N}, losses {first[0]:.3f} to {first[-1]:.3f}")


def train(bench: Bench, **settings: Any) -> tuple[list[float], Tensor]:
    """A short training; losses of its steps, and all final weights."""
    losses = Losses()
    trained = trainer(bench, losses, **settings)
    trained.fit()
    return losses.seen, flat(trained)


def stopped_and_resumed(bench: Bench) -> tuple[list[float], Tensor]:
    """The same, stopped in its first epoch and gone on with from the checkpoint."""
    folder, before, after = bench.work / "run", Losses(STOP_AT), Losses()
    with contextlib.suppress(Stopped):
        trainer(bench, before, RunFolder(folder)).fit()
    resumed = trainer(bench, after, RunFolder(folder))
    checkpoint.restore(folder / checkpoint.RECOVERY, resumed)
    assert resumed.updates == STOP_AT + 1
    resumed.fit()
    return before.seen + after.seen, flat(resumed)


def trainer(bench: Bench, losses: Losses, *hooks: Hook, **settings: Any) -> Trainer:
    """With all augmentation but erasing, whose noise is drawn on the device, and without drop path for the same reason."""
    opened, size = TicketSet.open(str(bench.tickets)), bench.size
    fixed = {"model": size.student, "drop_path": 0.0, "reprob": 0.0, "repeats": 2, "batch_size": size.student_batch}
    short = {"epochs": EPOCHS, "warmup_epochs": 1, "log_interval": 1, "workers": size.workers[0]}
    recipe = Recipe.of({"shards": opened.url, "device": bench.device.type, **fixed, **short, **settings})
    return Trainer(opened, recipe, [losses, *hooks], stop=lambda: losses.asked)


def flat(trained: Trainer) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in trained.student.parameters()])


def not_finite(losses: list[float]) -> int:
    return sum(not math.isfinite(loss) for loss in losses)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Torch's deterministic kernels, where it has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
