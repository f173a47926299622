"""Tickets as a torch dataset: one decode for all views of an image in a batch, only kept patches leave.

A batch is a pure function of (seed, epoch, step, micro-batch): the same on any number of workers and ranks. Augmentation
and mixing happen here on whole uint8 views; then K patches of each are gathered.
"""

import copy
import logging
import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config
from torch.utils.data import Dataset

from shards.errors import TicketSetError
from shards.images import render_pixels
from shards.reader import TicketSet
from shards.rows import Rows
from shards.sample import Sample
from trainer.data.arms import arm_ranking
from trainer.data.augment import ColorAugment, erasing_box, kept_generators, seed_generators, seeded
from trainer.data.loader import Batch, batches, pinned
from trainer.data.mixing import PixelMixing, draw_box, mixed_tickets
from trainer.data.sampler import batch_positions, epoch_samples, view_of_visit
from trainer.families.base import TicketModel
from trainer.options import Augment, Tickets

log = logging.getLogger("datalth")
Place = tuple[int, int, int]  # epoch, step, micro-batch of the global batch
DEFAULT_TICKETS, DEFAULT_AUGMENT = Tickets(), Augment()


@dataclass(frozen=True)
class Views:
    """What a student is fed of a view.

    Attributes:
        side: S, pixels of the views that tickets are cut from.
        whole_side: of views that are fed whole, where that is another.
        patch_size: in pixels.
        wants_all: all patches go along with a ticket.
        token_labels: the model has a use for them.
        mean: of its pixels, the fill color of timm's operations.
    """

    side: int
    whole_side: int
    patch_size: int
    wants_all: bool = False
    token_labels: bool = False
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN

    @classmethod
    def of(cls, opened: TicketSet, student: TicketModel | None = None, resized: bool = False) -> "Views":
        """Those of a set for a student; without one, for a ViT.

        Args:
            resized: whole views at the student's own size stand in for tickets.
        """
        img_size, patch_size = opened.manifest.img_size, opened.manifest.patch_size
        if student is None:
            return cls(img_size, img_size, patch_size)
        return cls(
            side=student.whole_side if resized else img_size,
            whole_side=student.whole_side,
            patch_size=patch_size,
            wants_all=student.wants_all,
            token_labels=student.wants_token_labels,
            mean=resolve_model_data_config(student.model)["mean"],
        )

    def at(self, whole: bool) -> tuple[int, tuple[int, int]]:
        """Pixels of the views rendered, and their patch grid."""
        side = self.whole_side if whole else self.side
        return side, (side // self.patch_size,) * 2


def labeled_rows(opened: TicketSet, split: str, token_labels: TicketSet | None = None) -> Rows:
    """The samples of a split, of which each has a label.

    Raises:
        TicketSetError: no image, or images without a label.
    """
    rows = Rows(opened, split, token_labels=token_labels)
    if not len(rows):
        raise TicketSetError(f"{opened.url}: split {split} has no image that could be read")
    if not rows.labeled:
        bare = (rows.labels < 0).nonzero()[0]
        raise TicketSetError(
            f"{opened.url}: split {split} has {len(bare)} of {len(rows)} images without label (first:"
            f" {rows.keys[int(bare[0])]}); training needs one for each: mine again with labels"
        )
    if rows.skipped:
        log.info(f"{split}: {rows.skipped} images of the base have no ticket and are skipped")
    return rows


def ticket_size(opened: TicketSet, tickets: Tickets) -> int:
    """K: the one asked for, or the set's.

    Raises:
        TicketSetError: a view has not so many patches.
    """
    tokens = tickets.tokens or opened.k
    if tokens > opened.num_patches:
        raise TicketSetError(f"`tokens` {tokens}: expected at most {opened.num_patches}, the patches of a view")
    return tokens


class TicketDataset(Dataset[Batch]):
    """Batches of tickets, by (epoch, step, micro-batch).

        dataset = TicketDataset(TicketSet.open("shards"), "train", batch_size=128)
        for epoch in range(300):
            for batch in DataLoader(dataset, batch_size=None, sampler=dataset.places(epoch), num_workers=4):
                logits = student(normalize(batch["patches"], MEAN, STD), batch["keep_indices"])

    A batch holds patches uint8 [B, K, C*p*p] ([B, N, C*p*p] where the student wants all), keep_indices int64 [B, K],
    labels and partners int64 [B], lam float32 [B] (share of the own label), grid_width int64 [B], and with random erasing
    erase int64 [B, 4]. A step is `micro_batches` of them: ranks times accumulation steps.

    Args:
        opened: the set.
        split: its split.
        tickets: which patches of which views.
        augment: what is done to pixels.
        views: what the student takes, `Views.of(opened, student)`; None: what a ViT takes.
        batch_size: of a micro-batch.
        micro_batches: of a step.
        seed: of order, draws and random tickets.
        unmask_from: the epoch from which on all patches are fed; None: never.
        token_labels: another set that holds them; False: none, though the set has some.
    Attributes:
        rows: the samples.
        tokens: K.
        steps: optimizer steps of an epoch, the same for all; a last batch begins the epoch anew where samples run out.
    Raises:
        TicketSetError: images without a label, too few images or views for `repeats`, a K above N, or mixing that does not
            go with the rest.
    """

    def __init__(
        self,
        opened: TicketSet,
        split: str = "train",
        *,
        tickets: Tickets = DEFAULT_TICKETS,
        augment: Augment = DEFAULT_AUGMENT,
        views: Views | None = None,
        batch_size: int = 128,
        micro_batches: int = 1,
        seed: int = 42,
        unmask_from: int | None = None,
        token_labels: TicketSet | bool | None = None,
    ) -> None:
        labels = token_labels if isinstance(token_labels, TicketSet) else None
        self.rows = labeled_rows(opened, split, labels)
        self.tickets, self.augment, self.views = tickets, augment, views or Views.of(opened)
        self.batch_size, self.micro_batches, self.seed = batch_size, micro_batches, seed
        self.unmask_from = unmask_from
        self._arm = "full" if tickets.resize_to_tokens else tickets.tickets
        self.tokens = math.prod(self.views.at(True)[1]) if self._arm == "full" else ticket_size(opened, tickets)
        self.labeled = self.views.token_labels and token_labels is not False and self.rows.has_token_labels
        self.color = ColorAugment(augment.aa, augment.color_jitter, self.views.mean)
        self._mixing = PixelMixing(augment, self.views.patch_size) if augment.mixes else None
        self._check(opened, split)
        samples = -(-len(self.rows) // tickets.repeats) * tickets.repeats
        self.steps = -(-samples // self.global_batch)

    def _check(self, opened: TicketSet, split: str) -> None:
        repeats, augment = self.tickets.repeats, self.augment
        if len(self.rows) < repeats:
            raise TicketSetError(f"`repeats` {repeats}: split {split} has only {len(self.rows)} images")
        views = max(1, opened.manifest.splits[split].views - 1)
        if repeats > views:
            raise TicketSetError(
                f"`repeats` {repeats}: {opened.url} has {views} training views an image; take `repeats` {views}, or mine"
                f" with datalth-mine --views {repeats + 1} or more"
            )
        if augment.mixes and self.labeled:
            raise TicketSetError(
                "token labels are of images that are not mixed by pixels: expected `mixup` 0 `cutmix` 0, with or without"
                " `mix_token`; or `token_labels` none"
            )
        if (augment.mixes or augment.mix_token) and self.batch_size % 2:
            raise TicketSetError(
                f"mixup, cutmix and MixToken mix pairs: expected an even `batch_size`, got {self.batch_size}"
            )

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.micro_batches

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.steps * self.micro_batches

    def places(self, epoch: int, step: int = 0, rank: int = 0, ranks: int = 1) -> list[Place]:
        """What one rank reads of an epoch from a step on, in order: its micro-batches of every step."""
        return [
            (epoch, number, micro)
            for number in range(step, self.steps)
            for micro in range(rank, self.micro_batches, ranks)
        ]

    def unmasked(self) -> "TicketDataset":
        """The same with all patches in every epoch."""
        other = copy.copy(self)
        other.unmask_from = 0
        return other

    def is_whole(self, epoch: int) -> bool:
        """Whether an epoch feeds all patches."""
        return self._arm == "full" or (self.unmask_from is not None and epoch >= self.unmask_from)

    def samples(self, epoch: int) -> np.ndarray:
        """int64 [samples, 3], (shard, row, visit): see trainer.data.sampler."""
        return epoch_samples(self.seed, epoch, self.rows.sizes, self.tickets.repeats)

    def __getitem__(self, place: Place) -> Batch:
        epoch, step, micro = place
        samples = self.samples(epoch)
        positions = batch_positions(step, micro, self.batch_size, self.global_batch, len(samples))
        chosen = samples[positions]
        whole = self.is_whole(epoch)
        side, grid = self.views.at(whole)
        with kept_generators():  # saving and restoring them for every sample would cost 60 us each
            pixels, rankings, maps = self._views(chosen, positions, epoch)
        labels = np.array([self.rows.label(shard, row) for shard, row, _ in chosen.tolist()])
        everything = np.tile(np.arange(rankings.shape[1]), (len(rankings), 1))
        keep, mixed = everything if whole else rankings[:, : self.tokens], {}
        # Of the step, not of the micro-batch: ranks and accumulation steps share one lambda, as one big batch has it.
        with seeded("mix", self.seed, epoch, step):
            if self.augment.mix_token:
                cells = draw_box(grid)
                keep, lam = mixed_tickets(rankings, cells, grid, keep.shape[1])
                mixed = {"box": cells, "lam": lam}
            elif self._mixing:
                pixels, rankings, mixed = self._mixing(pixels, rankings, whole)
                keep = keep if whole else rankings[:, : self.tokens]
        partners = labels[np.arange(len(labels)) ^ 1] if mixed else labels
        batch = {
            "patches": gather(pixels, everything if self.views.wants_all else keep, self.views.patch_size),
            "keep_indices": np.ascontiguousarray(keep, np.int64),
            "labels": labels.astype(np.int64),
            "partners": partners.astype(np.int64),
            "lam": np.ones(len(labels), np.float32),
            "grid_width": np.full(len(labels), grid[1]),
            **mixed,
            **maps,
        }
        if self.augment.reprob:
            batch["erase"] = self._erasing_boxes(positions, epoch, side)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _erasing_boxes(self, positions: np.ndarray, epoch: int, side: int) -> np.ndarray:
        boxes = []
        with kept_generators():
            for position in positions:
                seed_generators("erase", self.seed, epoch, position)
                boxes.append(erasing_box(self.augment.reprob, side))
        return np.array(boxes, np.int64)

    def _views(
        self, chosen: np.ndarray, positions: np.ndarray, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Augmented pixels uint8 [B, S, S, 3] and the arm's rankings [B, N]; each image is read and decoded once.

        Where they are wanted and there, also token labels of the whole images, and which part of them the views show:
        see trainer.data.token_labels.cut.
        """
        whole = self.is_whole(epoch)
        size, grid = self.views.at(whole)
        pixels = np.empty((len(chosen), size, size, 3), np.uint8)
        rankings = np.empty((len(chosen), grid[0] * grid[1]), np.int64)
        maps: list[Any] = [None] * len(chosen)
        slots: dict[tuple[int, int], list[int]] = {}
        for slot, (shard, row, _) in enumerate(chosen.tolist()):
            slots.setdefault((shard, row), []).append(slot)
        for (shard, row), members in slots.items():
            sample = self.rows.read(shard, row)
            visits = chosen[members, 2].tolist()
            numbers = [view_of_visit(self.seed, shard, row, visit, len(sample.views)) for visit in visits]
            rendered = sample.render(numbers, size)
            for slot, number, view in zip(members, numbers, rendered, strict=True):
                name = (self.seed, epoch, int(positions[slot]))
                if self.color.draws:
                    seed_generators("color", *name)
                    view = self.color(view)
                pixels[slot] = view
                if self.labeled:
                    maps[slot] = self._map(sample, number, self.rows.image_size(shard, row))
                rankings[slot] = arm_ranking(
                    "full" if whole else self._arm,
                    sample.rankings[number],
                    grid,
                    fixed_name=f"{self.seed}/{sample.key}/{number}",
                    fresh_name="/".join(map(str, name)),
                )
        return pixels, rankings, {name: np.stack([m[name] for m in maps]) for name in (maps[0] or {})}

    def _map(self, sample: Sample, number: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Token labels of one image of (height, width) pixels, and the place of a view in it."""
        top, left, height, width, flip = sample.views[number].tolist()
        box = np.array([top / size[0], left / size[1], height / size[0], width / size[1]], np.float32)
        labels = np.asarray(sample.token_labels, np.int32)
        return {"token_labels": labels, "boxes": box, "flips": np.array(bool(flip))}


class ValidationDataset(Dataset[Batch]):
    """View 0 of every sample, by the number of its batch: patches uint8 [B, N, C*p*p], rankings int64 [B, N], labels,
    positions in stored order. Where whole views are fed at another size, also those: whole uint8 [B, N', C*p*p].

    Args:
        opened: the set.
        split: its split.
        views: what the student takes; None: what a ViT takes.
        batch_size: the last of a rank may be smaller.
        rank, ranks: each rank has every `ranks`-th image.
    Attributes:
        rows: the samples.
        turns: batches of the rank that has most.
    Raises:
        TicketSetError: no image, or images without a label.
    """

    def __init__(
        self,
        opened: TicketSet,
        split: str = "val",
        *,
        views: Views | None = None,
        batch_size: int = 128,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.rows = labeled_rows(opened, split)
        self.views, self.batch_size = views or Views.of(opened), batch_size
        self._positions = np.arange(rank, len(self.rows), ranks)
        self.turns = -(-len(self.rows) // (ranks * batch_size))

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        size = self.batch_size
        positions = self._positions[number * size : (number + 1) * size]
        samples = [self.rows.read(*self.rows.locate(int(p))) for p in positions]
        sizes = {"patches": self.views.side}
        if self.views.whole_side != self.views.side:
            sizes["whole"] = self.views.whole_side
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
        everything = np.arange((side // self.views.patch_size) ** 2)
        keep = np.tile(everything, (len(samples), 1))
        return torch.from_numpy(gather(np.stack(views), keep, self.views.patch_size))


def gather(pixels: np.ndarray, keep: np.ndarray, patch_size: int) -> np.ndarray:
    """Kept patches of whole views: uint8 [B, S, S, 3] and [B, K] -> [B, K, 3*p*p] in the order of a stem's weights.

    trainer.families.patches on numpy and in one go: dropped patches are never copied.
    """
    b, s, _, c = pixels.shape
    side = s // patch_size
    cells = pixels.reshape(b, side, patch_size, side, patch_size, c).transpose(0, 1, 3, 5, 2, 4)
    kept = cells[np.arange(b)[:, None], keep // side, keep % side]  # [B, K, c, p, p]
    return kept.reshape(b, keep.shape[1], -1)


def loader(dataset: Any, places: Iterable[Any], workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """Batches of a dataset in the order of `places`; close it to end its worker processes.

    Raises:
        TicketSetError: a sample is not what the index says, or a worker process died.
        ImageError, OSError: an image that cannot be decoded, a file that cannot be read.
    """
    if workers:
        return batches(dataset, places, workers, device)
    return (pinned(dataset[place]) if device.type == "cuda" else dataset[place] for place in places)
