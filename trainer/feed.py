"""From stored samples to batches: one decode for all views of an image in a batch, only kept patches leave.

A batch is a pure function of (seed, epoch, step, micro-batch): the same on any number of workers and ranks.
Augmentation and mixing happen here on whole uint8 views; then K patches of each are gathered.
"""

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torch.utils.data import DataLoader, Dataset

from shards.errors import TicketSetError
from shards.images import render_views
from shards.rows import Rows
from trainer.arms import arm_ranking, mixed_ranking
from trainer.augment import ColorAugment, erasing_box, kept_generators, seed_generators, seeded
from trainer.order import batch_positions, epoch_samples, view_of_visit

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class FeedOptions:
    """What a training batch is made of; names are timm's flags."""

    arm: str
    tokens: int
    img_size: int
    patch_size: int
    exif: str
    seed: int
    batch_size: int
    global_batch: int
    repeats: int = 1
    aa: str = ""
    color_jitter: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    unmask_from: int | None = None  # from this epoch on all patches

    @property
    def grid(self) -> tuple[int, int]:
        return (self.img_size // self.patch_size,) * 2


class TrainFeed(Dataset):
    """Batches by (epoch, step, micro-batch of the global batch).

    A batch holds patches uint8 [B, K, C*p*p], keep_indices int64 [B, K], labels and partners int64 [B], lam
    float32 [B] (share of the own label), and with random erasing erase int64 [B, 4].
    """

    def __init__(self, rows: Rows, options: FeedOptions) -> None:
        self.rows, self.options = rows, options
        self.augment = ColorAugment(options.aa, options.color_jitter, options.mean)
        mixes = options.mixup > 0 or options.cutmix > 0
        if mixes and options.batch_size % 2:
            raise TicketSetError(f"mixup and cutmix mix pairs: expected an even --batch-size, got {options.batch_size}")
        self._mixup = (
            Mixup(options.mixup, options.cutmix, prob=options.mixup_prob, switch_prob=options.mixup_switch_prob)
            if mixes
            else None
        )

    def samples(self, epoch: int) -> np.ndarray:
        return epoch_samples(self.options.seed, epoch, self.rows.sizes, self.options.repeats)

    def steps(self) -> int:
        """Optimizer steps of an epoch, the same for all; a last batch begins the epoch anew where samples run out."""
        samples = -(-len(self.rows) // self.options.repeats) * self.options.repeats
        return -(-samples // self.options.global_batch)

    def __getitem__(self, place: tuple[int, int, int]) -> Batch:
        epoch, step, micro = place
        options, samples = self.options, self.samples(epoch)
        positions = batch_positions(step, micro, options.batch_size, options.global_batch, len(samples))
        chosen = samples[positions]
        with kept_generators():  # saving and restoring them for every sample would cost 60 us each
            pixels, rankings = self._views(chosen, positions, epoch)
        labels = np.array([self.rows.label(shard, row) for shard, row, _ in chosen.tolist()])
        partners, lam = labels, np.ones(len(labels), np.float32)
        if self._mixup is not None:
            with seeded("mix", options.seed, epoch, step):
                share, box = self._draw_mix(pixels.shape[1])
            swap = np.arange(len(pixels)) ^ 1
            partners, lam[:] = labels[swap], share
            pixels, rankings = self._mix(pixels, rankings, swap, share, box)
        unmasked = options.unmask_from is not None and epoch >= options.unmask_from
        keep = np.tile(np.arange(len(rankings[0])), (len(rankings), 1)) if unmasked else rankings[:, : options.tokens]
        batch = {
            "patches": torch.from_numpy(gather(pixels, keep, options.patch_size)),
            "keep_indices": torch.from_numpy(np.ascontiguousarray(keep, np.int64)),
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "partners": torch.from_numpy(partners.astype(np.int64)),
            "lam": torch.from_numpy(lam),
        }
        if options.reprob:
            boxes = []
            with kept_generators():
                for position in positions:
                    seed_generators("erase", options.seed, epoch, position)
                    boxes.append(erasing_box(options.reprob, options.img_size))
            batch["erase"] = torch.tensor(boxes, dtype=torch.int64)
        return batch

    def _views(self, chosen: np.ndarray, positions: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Augmented pixels uint8 [B, S, S, 3] and the arm's rankings [B, N]; each image is decoded once."""
        options = self.options
        pixels = np.empty((len(chosen), options.img_size, options.img_size, 3), np.uint8)
        rankings = np.empty((len(chosen), options.grid[0] * options.grid[1]), np.int64)
        slots: dict[tuple[int, int], list[int]] = {}
        for slot, (shard, row, _) in enumerate(chosen.tolist()):
            slots.setdefault((shard, row), []).append(slot)
        for (shard, row), members in slots.items():
            sample = self.rows.read(shard, row)
            visits = chosen[members, 2].tolist()
            numbers = [view_of_visit(options.seed, shard, row, visit, len(sample.views)) for visit in visits]
            rendered = render_views(sample.image, sample.views[numbers], options.img_size, options.exif)
            for slot, number, view in zip(members, numbers, rendered, strict=True):
                name = (options.seed, epoch, int(positions[slot]))
                if self.augment.draws:
                    seed_generators("color", *name)
                    view = self.augment(view)
                pixels[slot] = view
                rankings[slot] = arm_ranking(
                    options.arm,
                    sample.rankings[number],
                    options.grid,
                    fixed_name=f"{options.seed}/{sample.key}/{number}",
                    fresh_name="/".join(map(str, name)),
                )
        return pixels, rankings

    def _draw_mix(self, size: int) -> tuple[float, tuple[int, int, int, int] | None]:
        """lambda of one global batch, and CutMix's box (top, bottom, left, right) or None; timm's distribution."""
        assert self._mixup is not None
        share, use_cutmix = self._mixup._params_per_batch()
        if not use_cutmix or share == 1:
            return float(share), None
        box, share = cutmix_bbox_and_lam((1, 3, size, size), share)
        return float(share), tuple(int(v) for v in box)  # type: ignore[return-value]

    def _mix(
        self, pixels: np.ndarray, rankings: np.ndarray, swap: np.ndarray, share: float, box: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mix neighbours (2i, 2i + 1); a mixed view's ranking is by weighted rank."""
        if share == 1:
            return pixels, rankings
        weight: np.ndarray | float = 1 - share
        out = np.empty_like(pixels)
        if box is None:
            for i, j in enumerate(swap):  # one view at a time stays in the cache
                out[i] = np.rint(pixels[i].astype(np.float32) * share + pixels[j].astype(np.float32) * (1 - share))
        else:
            top, bottom, left, right = box
            out[:] = pixels
            out[:, top:bottom, left:right] = pixels[swap, top:bottom, left:right]
            covered = np.zeros(pixels.shape[1:3], np.float32)
            covered[top:bottom, left:right] = 1
            p, (gh, gw) = self.options.patch_size, self.options.grid
            weight = covered.reshape(gh, p, gw, p).mean(axis=(1, 3)).flatten()
        if self.options.arm == "full":
            return out, rankings
        return out, np.stack([mixed_ranking(rankings[i], rankings[j], weight) for i, j in enumerate(swap)])


class EvalFeed(Dataset):
    """View 0 of every sample, whole: patches uint8 [B, N, C*p*p], rankings int64 [B, N], labels, positions."""

    def __init__(self, rows: Rows, options: FeedOptions, rank: int = 0, world: int = 1) -> None:
        self.rows, self.options = rows, options
        self._positions = np.arange(rank, len(rows), world)

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self.options.batch_size)

    def __getitem__(self, number: int) -> Batch:
        size = self.options.batch_size
        positions = self._positions[number * size : (number + 1) * size]
        samples = [self.rows.read(*self.rows.locate(int(p))) for p in positions]
        pixels = np.stack(
            [render_views(s.image, s.views[:1], self.options.img_size, self.options.exif)[0] for s in samples]
        )
        everything = np.tile(np.arange(self.options.grid[0] * self.options.grid[1]), (len(samples), 1))
        return {
            "patches": torch.from_numpy(gather(pixels, everything, self.options.patch_size)),
            "rankings": torch.from_numpy(np.stack([s.rankings[0] for s in samples]).astype(np.int64)),
            "labels": torch.from_numpy(self.rows.labels[positions].astype(np.int64)),
            "positions": torch.from_numpy(positions),
        }


def gather(pixels: np.ndarray, keep: np.ndarray, patch_size: int) -> np.ndarray:
    """Kept patches of whole views: uint8 [B, S, S, 3] and [B, K] -> [B, K, 3*p*p] in the order of a stem's weights."""
    b, s, _, c = pixels.shape
    side = s // patch_size
    cells = pixels.reshape(b, side, patch_size, side, patch_size, c).transpose(0, 1, 3, 5, 2, 4)
    kept = cells[np.arange(b)[:, None], keep // side, keep % side]  # [B, K, c, p, p]
    return kept.reshape(b, keep.shape[1], -1)


def _leave_signals_to_the_run(worker: int) -> None:
    """SIGTERM often goes to the whole process group; workers must outlive the step that is under way."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Reporting(Dataset):
    """A feed that hands its error over as a value: raised in a worker process, it would come wrapped in tracebacks."""

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def __getitem__(self, place: Any) -> Batch | Exception:
        try:
            return self._feed[place]
        except (ValueError, OSError) as error:
            return error


def loader(feed: Dataset, places: Any, workers: int, device: torch.device) -> Iterator[Batch]:
    """Batches of a feed in the order of `places`.

    Raises:
        TicketSetError: a sample is not what the index says, or a worker process died.
        ImageError, OSError: an image that cannot be decoded, a file that cannot be read.
    """
    batches = DataLoader(
        _Reporting(feed),
        batch_size=None,
        sampler=places,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if workers else None,
        worker_init_fn=_leave_signals_to_the_run,
    )
    try:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TicketSetError(f"-j {workers}: {str(error).splitlines()[0]} Out of memory? Try fewer workers") from None
