"""From stored samples to batches: one decode for all views of an image in a batch, only kept patches leave.

A batch is a pure function of (seed, epoch, step, micro-batch): the same on any number of workers and ranks.
Augmentation and mixing happen here on whole uint8 views; then K patches of each are gathered.
"""

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup, cutmix_bbox_and_lam

from shards.errors import TicketSetError
from shards.images import render_pixels
from shards.rows import Rows
from shards.sample import Sample
from trainer.data.arms import arm_ranking, mixed_ranking
from trainer.data.augment import ColorAugment, erasing_box, kept_generators, seed_generators, seeded
from trainer.data.loader import Batch, batches, pinned
from trainer.data.mixing import draw_box, mixed_tickets
from trainer.data.sampler import batch_positions, epoch_samples, view_of_visit


@dataclass(frozen=True)
class FeedOptions:
    """What a training batch is made of; names are timm's flags."""

    arm: str
    tokens: int
    img_size: int  # of the views that tickets are cut from
    patch_size: int
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
    whole_size: int | None = None  # of views that are fed whole, where that is another
    wants_all: bool = False  # all patches go along with a ticket
    token_labels: bool = False  # the model has a use for them
    mix_token: bool = False  # LV-ViT's: tokens are mixed on the device, places here

    def whole(self, epoch: int) -> bool:
        """Whether an epoch trains on all patches."""
        return self.arm == "full" or (self.unmask_from is not None and epoch >= self.unmask_from)

    def side(self, whole: bool) -> int:
        """Pixels of the views rendered."""
        return self.whole_size or self.img_size if whole else self.img_size

    def grid(self, whole: bool) -> tuple[int, int]:
        return (self.side(whole) // self.patch_size,) * 2


class TrainFeed:
    """Batches by (epoch, step, micro-batch of the global batch).

    A batch holds patches uint8 [B, K, C*p*p] ([B, N, C*p*p] where all are wanted), keep_indices int64 [B, K], labels
    and partners int64 [B], lam float32 [B] (share of the own label), grid_width int64 [B], and with random erasing erase
    int64 [B, 4].
    """

    def __init__(self, rows: Rows, options: FeedOptions) -> None:
        self.rows, self.options = rows, options
        self.augment = ColorAugment(options.aa, options.color_jitter, options.mean)
        self.labelled = options.token_labels and rows.has_token_labels
        mixes = options.mixup > 0 or options.cutmix > 0
        if mixes and self.labelled:
            raise TicketSetError(
                "token labels are of images that are not mixed by pixels: expected --mixup 0 --cutmix 0, with or without"
                " --mix-token; or --token-labels none"
            )
        if mixes and options.mix_token:
            raise TicketSetError("--mix-token: expected --mixup 0 --cutmix 0 beside it")
        if (mixes or options.mix_token) and options.batch_size % 2:
            raise TicketSetError(
                f"mixup, cutmix and MixToken mix pairs: expected an even --batch-size, got {options.batch_size}"
            )
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
            pixels, rankings, maps = self._views(chosen, positions, epoch)
        labels = np.array([self.rows.label(shard, row) for shard, row, _ in chosen.tolist()])
        whole = options.whole(epoch)
        everything = np.tile(np.arange(rankings.shape[1]), (len(rankings), 1))
        tokens = rankings.shape[1] if whole else options.tokens
        with seeded("mix", options.seed, epoch, step):
            pixels, rankings, mixed = self._mix(pixels, rankings, tokens, whole)
        keep = mixed.pop("keep", everything if whole else rankings[:, :tokens])
        partners = labels[np.arange(len(labels)) ^ 1] if mixed else labels
        batch = {
            "patches": gather(pixels, everything if options.wants_all else keep, options.patch_size),
            "keep_indices": np.ascontiguousarray(keep, np.int64),
            "labels": labels.astype(np.int64),
            "partners": partners.astype(np.int64),
            "lam": np.ones(len(labels), np.float32),
            "grid_width": np.full(len(labels), options.grid(whole)[1]),
            **mixed,
            **maps,
        }
        if options.reprob:
            batch["erase"] = self._erasing_boxes(positions, epoch, options.side(whole))
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _erasing_boxes(self, positions: np.ndarray, epoch: int, side: int) -> np.ndarray:
        boxes = []
        with kept_generators():
            for position in positions:
                seed_generators("erase", self.options.seed, epoch, position)
                boxes.append(erasing_box(self.options.reprob, side))
        return np.array(boxes, np.int64)

    def _views(
        self, chosen: np.ndarray, positions: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Augmented pixels uint8 [B, S, S, 3] and the arm's rankings [B, N]; each image is read and decoded once.

        Where they are wanted and there, also token labels of the whole images, and which part of them the views show:
        see trainer.data.token_labels.cut.
        """
        options = self.options
        whole = options.whole(epoch)
        size, grid = options.side(whole), options.grid(whole)
        pixels = np.empty((len(chosen), size, size, 3), np.uint8)
        rankings = np.empty((len(chosen), grid[0] * grid[1]), np.int64)
        maps: list[Any] = [None] * len(chosen)
        slots: dict[tuple[int, int], list[int]] = {}
        for slot, (shard, row, _) in enumerate(chosen.tolist()):
            slots.setdefault((shard, row), []).append(slot)
        for (shard, row), members in slots.items():
            sample = self.rows.read(shard, row)
            visits = chosen[members, 2].tolist()
            numbers = [view_of_visit(options.seed, shard, row, visit, len(sample.views)) for visit in visits]
            rendered = sample.render(numbers, size)
            for slot, number, view in zip(members, numbers, rendered, strict=True):
                name = (options.seed, epoch, int(positions[slot]))
                if self.augment.draws:
                    seed_generators("color", *name)
                    view = self.augment(view)
                pixels[slot] = view
                if self.labelled:
                    maps[slot] = self._map(sample, number, self.rows.image_size(shard, row))
                rankings[slot] = arm_ranking(
                    "full" if whole else options.arm,
                    sample.rankings[number],
                    grid,
                    fixed_name=f"{options.seed}/{sample.key}/{number}",
                    fresh_name="/".join(map(str, name)),
                )
        return pixels, rankings, {name: np.stack([m[name] for m in maps]) for name in (maps[0] or {})}

    def _map(self, sample: Sample, number: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Token labels of one image of (height, width) pixels, and the place of a view in it."""
        top, left, height, width, flip = sample.views[number].tolist()
        box = np.array([top / size[0], left / size[1], height / size[0], width / size[1]], np.float32)
        labels = np.asarray(sample.token_labels, np.int32)
        return {"token_labels": labels, "boxes": box, "flips": np.array(bool(flip))}

    def _mix(
        self, pixels: np.ndarray, rankings: np.ndarray, tokens: int, whole: bool
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Mix neighbours (2i, 2i + 1), by pixels here, or by tokens on the device; a mixed view's ranking is by weighted rank.

        Returns:
            Pixels, rankings, and what the batch holds otherwise for it; nothing where nothing is mixed.
        """
        options, size = self.options, pixels.shape[1]
        if options.mix_token:
            cells = draw_box(options.grid(whole))
            keep, lam = mixed_tickets(rankings, cells, options.grid(whole), tokens)
            return pixels, rankings, {"box": cells, "keep": keep, "lam": lam}
        if self._mixup is None:
            return pixels, rankings, {}
        share, use_cutmix = self._mixup._params_per_batch()  # timm's distribution
        box = None
        if use_cutmix and share < 1:
            box, share = cutmix_bbox_and_lam((1, 3, size, size), share)
        mixed = {"lam": np.full(len(pixels), share, np.float32)}
        if share == 1:
            return pixels, rankings, mixed
        swap = np.arange(len(pixels)) ^ 1
        weight: np.ndarray | float = 1 - share
        out = np.empty_like(pixels)
        if box is None:
            for i, j in enumerate(swap):  # one view at a time stays in the cache
                out[i] = np.rint(pixels[i].astype(np.float32) * share + pixels[j].astype(np.float32) * (1 - share))
        else:
            top, bottom, left, right = (int(v) for v in box)
            out[:] = pixels
            out[:, top:bottom, left:right] = pixels[swap, top:bottom, left:right]
            weight = self._covered(size, top, bottom, left, right)
        if whole:
            return out, rankings, mixed
        return out, np.stack([mixed_ranking(rankings[i], rankings[j], weight) for i, j in enumerate(swap)]), mixed

    def _covered(self, size: int, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """The share of each patch that a box of pixels covers: [N]."""
        covered = np.zeros((size, size), np.float32)
        covered[top:bottom, left:right] = 1
        p = self.options.patch_size
        return covered.reshape(size // p, p, size // p, p).mean(axis=(1, 3)).flatten()


class EvalFeed:
    """View 0 of every sample: patches uint8 [B, N, C*p*p], rankings int64 [B, N], labels, positions.

    Where whole views are fed at another size, also those: whole uint8 [B, N', C*p*p].
    """

    def __init__(self, rows: Rows, options: FeedOptions, rank: int = 0, world: int = 1) -> None:
        self.rows, self.options = rows, options
        self._positions = np.arange(rank, len(rows), world)

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self.options.batch_size)

    def __getitem__(self, number: int) -> Batch:
        size = self.options.batch_size
        positions = self._positions[number * size : (number + 1) * size]
        samples = [self.rows.read(*self.rows.locate(int(p))) for p in positions]
        sizes = {"patches": self.options.side(False)}
        if self.options.side(True) != self.options.side(False):
            sizes["whole"] = self.options.side(True)
        images = [sample.pixels() for sample in samples]
        return {
            **{name: self._patches(images, samples, side) for name, side in sizes.items()},
            "rankings": torch.from_numpy(np.stack([s.rankings[0] for s in samples]).astype(np.int64)),
            "labels": torch.from_numpy(self.rows.labels[positions].astype(np.int64)),
            "positions": torch.from_numpy(positions),
        }

    def _patches(self, images: list[np.ndarray], samples: list[Sample], side: int) -> torch.Tensor:
        """All patches of each sample's view 0 at a size; `images` are decoded."""
        views = [render_pixels(image, s.views[:1], side)[0] for image, s in zip(images, samples, strict=True)]
        everything = np.arange((side // self.options.patch_size) ** 2)
        keep = np.tile(everything, (len(samples), 1))
        return torch.from_numpy(gather(np.stack(views), keep, self.options.patch_size))


def gather(pixels: np.ndarray, keep: np.ndarray, patch_size: int) -> np.ndarray:
    """Kept patches of whole views: uint8 [B, S, S, 3] and [B, K] -> [B, K, 3*p*p] in the order of a stem's weights."""
    b, s, _, c = pixels.shape
    side = s // patch_size
    cells = pixels.reshape(b, side, patch_size, side, patch_size, c).transpose(0, 1, 3, 5, 2, 4)
    kept = cells[np.arange(b)[:, None], keep // side, keep % side]  # [B, K, c, p, p]
    return kept.reshape(b, keep.shape[1], -1)


def loader(feed: Any, places: Iterable[Any], workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """Batches of a feed in the order of `places`; close it to end its worker processes.

    Raises:
        TicketSetError: a sample is not what the index says, or a worker process died.
        ImageError, OSError: an image that cannot be decoded, a file that cannot be read.
    """
    if workers:
        return batches(feed, places, workers, device)
    return (pinned(feed[place]) if device.type == "cuda" else feed[place] for place in places)
