"""Tickets as a torch dataset: one decode for all views of an image in a batch, only kept patches leave.

A batch is a pure function of (seed, epoch, step, micro-batch): the same on any number of workers and ranks. Augmentation
and mixing happen here on whole uint8 views; then K patches of each are gathered. Of ranked views no more than the first
patches is read and decoded, where nothing needs the others.
"""

import copy
import logging
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config
from torch.utils.data import Dataset

from shards.copies import TarCopies
from shards.errors import TicketSetError
from shards.images import render_pixels, resize_views
from shards.ranked import Mosaic
from shards.reader import TicketSet
from shards.rows import Rows
from shards.sample import Sample
from trainer.data.arms import arm_ranking
from trainer.data.augment import ColorAugment, erasing_box, kept_generators, seed_generators, seeded
from trainer.data.cutting import first_patches, gather
from trainer.data.lengths import Lengths, batches_by_length, known, shares_of, sizes_of
from trainer.data.loader import Batch, batches, pinned
from trainer.data.mixing import PatchMixing, draw_box, mix_pixels, mixed_tickets
from trainer.data.sampler import batch_positions, epoch_samples, view_of_visit, views_of
from trainer.families.base import TicketModel
from trainer.options import Augment, Tickets

log = logging.getLogger("datalth")
Place = tuple[int, int, int]  # epoch, step, micro-batch of the global batch
Maps = dict[int, dict[str, np.ndarray]]  # by slot of the batch
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
            resized: whole views on the student's own grid stand in for tickets.
        """
        if student is None:
            return cls(opened.manifest.img_size, opened.manifest.img_size, opened.manifest.patch_size)
        return cls(
            side=(student if resized else opened).grid[0] * student.patch_size,
            whole_side=student.whole_side,
            patch_size=student.patch_size,
            wants_all=student.wants_all,
            token_labels=student.wants_token_labels,
            mean=resolve_model_data_config(student.model)["mean"],
        )

    def at(self, whole: bool) -> tuple[int, tuple[int, int]]:
        """Pixels of the views rendered, and their patch grid."""
        side = self.whole_side if whole else self.side
        return side, (side // self.patch_size,) * 2


def labeled_rows(
    opened: TicketSet, split: str, token_labels: TicketSet | None = None, copies: TarCopies | None = None
) -> Rows:
    """The samples of a split, of which each has a label.

    Raises:
        TicketSetError: no image, or images without a label.
    """
    rows = Rows(opened, split, copies, token_labels)
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
    """K: the one asked for, or the set's; where it varies, its mean at most.

    Raises:
        TicketSetError: a view has not so many patches.
    """
    tokens = tickets.count or opened.k
    if tokens > opened.stored_tokens:
        raise TicketSetError(
            f"`tokens` {tickets.tokens or tokens}: expected at most {opened.stored_tokens}, the patches of a view that are stored"
        )
    return tokens


class TicketDataset(Dataset[Batch]):
    """Batches of tickets, by (epoch, step, micro-batch).

        dataset = TicketDataset(TicketSet.open("shards"), "train", batch_size=128)
        for epoch in range(300):
            for batch in DataLoader(dataset, batch_size=None, sampler=dataset.places(epoch), num_workers=4):
                logits = student(normalize(batch["patches"], MEAN, STD), batch["keep_indices"])

    A batch holds patches uint8 [B, K, C*p*p] ([B, N, C*p*p] where the student wants all), keep_indices int64 [B, K],
    labels and partners int64 [B], lam float32 [B] (share of the own label), grid_width int64 [B], and with random erasing
    erase int64 [B, 4]. A step is `micro_batches` of them: ranks times accumulation steps. Where K varies from view to view,
    each of `parts` of a step has one K: micro-batches 0, 1, ... are the first part's, the last ones the last's.

    Args:
        opened: the set.
        split: its split.
        tickets: which patches of which views.
        augment: what is done to pixels.
        views: what the student takes, `Views.of(opened, student)`; None: what a ViT takes.
        batch_size: of a micro-batch.
        micro_batches: of a step.
        parts: of a step where K varies; divides `micro_batches`.
        seed: of order, draws and random tickets.
        unmask_from: the epoch from which on all patches are fed; None: never.
        token_labels: another set that holds them; False: none, though the set has some.
        copies: of remote tars; see `Rows`.
        share: of views' scores, where K varies and a run before has found it; None: it is found here.
    Attributes:
        rows: the samples.
        tokens: K; where it varies, its mean at most.
        lengths: how K varies; None where it does not.
        token_shares: {K: the share of views that have it}; a part of several K has the size nearest to their mean.
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
        parts: int = 1,
        seed: int = 42,
        unmask_from: int | None = None,
        token_labels: TicketSet | bool | None = None,
        copies: TarCopies | None = None,
        share: float | None = None,
    ) -> None:
        labels = token_labels if isinstance(token_labels, TicketSet) else None
        self.rows = labeled_rows(opened, split, labels, copies)
        self.tickets, self.augment, self.views = tickets, augment, views or Views.of(opened)
        self.batch_size, self.micro_batches, self.seed = batch_size, micro_batches, seed
        self.unmask_from, self._parts = unmask_from, parts
        self._count = opened.manifest.splits[split].views
        self._arm = "full" if tickets.resize_to_tokens else tickets.tickets
        whole = math.prod(self.views.at(not tickets.coarse_first)[1])
        self.tokens = whole if self._arm == "full" else ticket_size(opened, tickets)
        self.token_shares = {self.tokens: 1.0}
        self.lengths = self._fit(opened, share) if tickets.varying else None
        self.labeled = self.views.token_labels and token_labels is not False and self.rows.has_token_labels
        self.color = ColorAugment(augment.aa, augment.color_jitter, self.views.mean)
        self._ranked = Mosaic.of(opened.manifest) if opened.manifest.ranked else None
        self._always_whole = self._what_needs_whole_views(opened)
        self._check(opened, split)
        self._sorted: tuple[int, np.ndarray, np.ndarray] | None = None
        samples = -(-len(self.rows) // tickets.repeats) * tickets.repeats
        self.steps = -(-samples // self.global_batch)

    def _fit(self, opened: TicketSet, share: float | None) -> Lengths:
        """How K varies, and K of each view of each image."""
        counts, sizes = known(self.rows.spread(), opened), sizes_of(opened)
        trained = slice(1, None) if self._count > 1 else slice(0, 1)
        if share is None:
            lengths = Lengths.fit(counts[:, trained], self.tokens, sizes, opened.num_patches)
        else:
            lengths = Lengths(sizes, share, opened.num_patches)
        self._view_tokens = lengths.of(counts).astype(np.uint16)
        self.token_shares = shares_of(self._view_tokens[:, trained])
        return lengths

    def _what_needs_whole_views(self, opened: TicketSet) -> str:
        """The setting for which the first patches of a ranking are not enough, in any epoch; empty where they are."""
        augment, views = self.augment, self.views
        whole = {
            f"`tickets` {self._arm}": self._arm != "winning",
            "a model that is given all patches": views.wants_all,
            "`mixup` and `cutmix` by pixels (`mixing` patches does without)": augment.mixes
            and augment.mixing == "pixels",
            "`mix_token`": augment.mix_token,
            f"`aa` {augment.aa}": not self.color.prefixable,
            "views of another size": views.side != opened.manifest.img_size,
        }
        return next((name for name, needed in whole.items() if needed), "")

    def _check(self, opened: TicketSet, split: str) -> None:
        repeats, augment = self.tickets.repeats, self.augment
        wanting = self._always_whole or ("`unmask_epochs`" if self.unmask_from is not None else "")
        if wanting and not opened.holds_whole_views:
            raise TicketSetError(
                f"{opened.url}: expected whole views, for {wanting}; it holds the best {opened.stored_tokens} of"
                f" {opened.num_patches} patches (mined with --store-tokens)"
            )
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
        if augment.mixes and augment.mixing == "patches" and self.views.wants_all:
            raise TicketSetError(
                "`mixing` patches: two views' patches are no ticket for a model that is given all of a view"
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
        if self.lengths is not None and not self.is_whole(epoch):
            self._by_length(epoch)  # before worker processes are forked, or each of them would sort the epoch
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

    def longest(self) -> "TicketDataset":
        """The same with the greatest K that there is in every batch."""
        other = copy.copy(self)
        other.lengths, other.tokens = None, max(self.token_shares)
        return other

    def is_whole(self, epoch: int) -> bool:
        """Whether an epoch feeds all patches, at the size at which the student takes them in the end."""
        always = self._arm == "full" and not self.tickets.coarse_first
        return always or (self.unmask_from is not None and epoch >= self.unmask_from)

    def samples(self, epoch: int) -> np.ndarray:
        """int64 [samples, 3], (shard, row, visit): see trainer.data.sampler."""
        return epoch_samples(self.seed, epoch, self.rows.sizes, self.tickets.repeats)

    def tokens_at(self, epoch: int, step: int, micro: int = 0) -> int:
        """K of a micro-batch."""
        if self.is_whole(epoch):
            return math.prod(self.views.at(True)[1])
        if self.lengths is None:
            return self.tokens
        return int(self._by_length(epoch)[1][step, micro * self._parts // self.micro_batches])

    def _positions(self, epoch: int, step: int, micro: int) -> np.ndarray:
        """Of a micro-batch, in the epoch's order of samples."""
        if self.lengths is None or self.is_whole(epoch):
            return batch_positions(step, micro, self.batch_size, self.global_batch, len(self.samples(epoch)))
        return self._by_length(epoch)[0][step, micro * self.batch_size : (micro + 1) * self.batch_size]

    def _by_length(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch in parts of one K each; see `batches_by_length`. The last one that was asked for is kept."""
        assert self.lengths is not None
        if self._sorted is None or self._sorted[0] != epoch:
            views, images = views_of(self.seed, self.samples(epoch), self.rows.sizes, self._count)
            tokens, paired = (
                self._view_tokens[images, views].astype(np.int64),
                self.augment.mixes or self.augment.mix_token,
            )
            shape = self.steps, self._parts, self.global_batch // self._parts
            self._sorted = epoch, *batches_by_length(tokens, self.lengths.sizes, shape, paired, self.seed, epoch)
        return self._sorted[1:]

    def reads_prefixes(self, epoch: int) -> bool:
        """Whether no more is read of a view in an epoch than the patches that are fed: ranked views allow it."""
        return self._ranked is not None and not self._always_whole and not self.is_whole(epoch)

    def _mixes_patches(self, epoch: int) -> bool:
        mixes = self.augment.mixes and self.augment.mixing == "patches"
        return mixes and self._arm != "full" and not self.is_whole(epoch)

    def __getitem__(self, place: Place) -> Batch:
        epoch, step, micro = place
        positions = self._positions(epoch, step, micro)
        chosen = self.samples(epoch)[positions]
        side, grid = self.views.at(self.is_whole(epoch))
        by_patches = self.reads_prefixes(epoch) or self._mixes_patches(epoch)
        fed = (self._tickets if by_patches else self._mixed_views)(chosen, positions, place)
        labels = self.rows.labels_of(chosen[:, 0], chosen[:, 1])
        partners = labels[np.arange(len(labels)) ^ 1] if "lam" in fed else labels
        batch = {
            "labels": labels,
            "partners": partners,
            "lam": np.ones(len(labels), np.float32),
            "grid_width": np.full(len(labels), grid[1]),
            **fed,
        }
        if self.augment.reprob:
            batch["erase"] = self._erasing_boxes(positions, epoch, side)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _mixed_views(self, chosen: np.ndarray, positions: np.ndarray, place: Place) -> dict[str, np.ndarray]:
        """Patches and places out of whole views; mixing is of their pixels, or of their places (MixToken)."""
        epoch, step, _ = place
        whole = self.is_whole(epoch)
        side, grid = self.views.at(whole)
        pixels = np.empty((len(chosen), side, side, 3), np.uint8)
        rankings = np.empty((len(chosen), grid[0] * grid[1]), np.int64)
        maps: Maps = {}
        with kept_generators():  # saving and restoring them for every sample would cost 60 us each
            for slot, view, ranking in self._views(chosen, positions, epoch, maps):
                pixels[slot], rankings[slot] = view, ranking
        everything = np.tile(np.arange(rankings.shape[1]), (len(rankings), 1))
        tokens = self.tokens_at(*place)
        keep, mixed = everything if whole else rankings[:, :tokens], {}
        with self._mix_generator(epoch, step):
            if self.augment.mix_token:
                cells = draw_box(grid)
                keep, lam = mixed_tickets(rankings, cells, grid, keep.shape[1])
                mixed = {"box": cells, "lam": lam}
            elif self.augment.mixes:
                pixels, rankings, mixed = mix_pixels(self.augment, pixels, rankings, self.views.patch_size, whole)
                keep = keep if whole else rankings[:, :tokens]
        patches = gather(pixels, everything if self.views.wants_all else keep, self.views.patch_size)
        return {"patches": patches, "keep_indices": np.ascontiguousarray(keep, np.int64), **mixed, **stacked(maps)}

    def _tickets(self, chosen: np.ndarray, positions: np.ndarray, place: Place) -> dict[str, np.ndarray]:
        """Patches and places out of the best patches of views alone; mixing is of patches."""
        mixing, (epoch, step, _) = None, place
        count = tokens = self.tokens_at(*place)
        if self.augment.mixes:
            with self._mix_generator(epoch, step):
                mixing = PatchMixing.draw(self.augment, self.views.side, self.views.patch_size, tokens)
            count = mixing.needed
        p = self.views.patch_size
        patches = np.empty((len(chosen), count, 3 * p * p), np.uint8)
        keep = np.empty((len(chosen), count), np.int64)
        maps: Maps = {}
        with kept_generators():
            if self.reads_prefixes(epoch):
                for slot, pixels, ranking in self._prefixes(chosen, positions, epoch, count, maps):
                    assert self._ranked is not None
                    first_patches(pixels, self._ranked, patches[slot])
                    keep[slot] = ranking[:count]
            else:
                for slot, view, ranking in self._views(chosen, positions, epoch, maps):
                    keep[slot] = ranking[:count]
                    patches[slot] = gather(view[None], keep[slot][None], p)[0]
        if mixing is None:
            return {"patches": patches, "keep_indices": keep, **stacked(maps)}
        views, ranks, lam = mixing.pick(keep)
        return {"patches": patches[views, ranks], "keep_indices": keep[views, ranks], "lam": lam, **stacked(maps)}

    def _mix_generator(self, epoch: int, step: int) -> AbstractContextManager[None]:
        """Of the step, not of the micro-batch: ranks and accumulation steps share one lambda, as one big batch has it."""
        return seeded("mix", self.seed, epoch, step)

    def _erasing_boxes(self, positions: np.ndarray, epoch: int, side: int) -> np.ndarray:
        boxes = []
        with kept_generators():
            for position in positions:
                seed_generators("erase", self.seed, epoch, position)
                boxes.append(erasing_box(self.augment.reprob, side))
        return np.array(boxes, np.int64)

    def _images(
        self, chosen: np.ndarray, tokens: int | None = None
    ) -> Iterator[tuple[Sample, list[int], list[int], tuple[int, int]]]:
        """Each image of a batch once, however many of its views stand there: the sample, its slots in the batch, the number
        of the view in each, and its (shard, row). `tokens`: patches that will be used of each view; None: all."""
        slots: dict[tuple[int, int], list[int]] = {}
        for slot, (shard, row, _) in enumerate(chosen.tolist()):
            slots.setdefault((shard, row), []).append(slot)
        numbers = [
            [view_of_visit(self.seed, *place, visit, self._count) for visit in chosen[members, 2].tolist()]
            for place, members in slots.items()
        ]
        samples = self.rows.read_all(list(slots), numbers, tokens)
        yield from zip(samples, slots.values(), numbers, slots, strict=True)

    def _views(
        self, chosen: np.ndarray, positions: np.ndarray, epoch: int, maps: Maps
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each slot of a batch the whole view, augmented, uint8 [S, S, 3], and the arm's ranking [N].

        Where they are wanted and there, also token labels of the whole images, and which part of them the views show, into
        `maps`: see trainer.data.token_labels.cut.
        """
        whole = self.is_whole(epoch)
        size, grid = self.views.at(whole)
        arm = "full" if whole else self._arm
        for sample, slots, numbers, place in self._images(chosen):
            for slot, number, view in zip(slots, numbers, sample.render(numbers, size), strict=True):
                name = (self.seed, epoch, int(positions[slot]))
                if self.color.draws:
                    seed_generators("color", *name)
                    view = self.color(view)
                self._label(maps, slot, sample, number, place)
                fixed, fresh = f"{self.seed}/{sample.key}/{number}", "/".join(map(str, name))
                yield slot, view, arm_ranking(arm, sample.rankings[number], grid, fixed_name=fixed, fresh_name=fresh)

    def _prefixes(
        self, chosen: np.ndarray, positions: np.ndarray, epoch: int, count: int, maps: Maps
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Of each slot of a batch the rows of the mosaic that hold the view's first patches, augmented, and the ranking."""
        for sample, slots, numbers, place in self._images(chosen, count):
            assert sample.ranked is not None and self._ranked is not None
            for slot, number in zip(slots, numbers, strict=True):
                pixels = sample.ranked.mosaic_pixels(number, count)
                if self.color.draws:
                    seed_generators("color", self.seed, epoch, int(positions[slot]))
                    cell, seen = self._ranked.cell, sample.ranked.statistics(number)
                    pixels = self.color.on_mosaic(pixels, cell, self.views.patch_size, seen)
                self._label(maps, slot, sample, number, place)
                yield slot, pixels, sample.rankings[number]

    def _label(self, maps: Maps, slot: int, sample: Sample, number: int, place: tuple[int, int]) -> None:
        if self.labeled:
            maps[slot] = self._map(sample, number, self.rows.image_size(*place))

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
        rank: which one this is; it has every `ranks`-th image.
        ranks: how many there are.
        copies: of remote tars; see `Rows`.
        lengths: how K varies; batches then hold `tokens` int64 [B], the K of each image.
    Attributes:
        rows: the samples.
        token_shares: {K: the share of images that have it}, where K varies.
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
        copies: TarCopies | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self.rows = labeled_rows(opened, split, copies=copies)
        self.views, self.batch_size = views or Views.of(opened), batch_size
        self._tokens = None if lengths is None else lengths.of(known(self.rows.spread(), opened)[:, 0])
        self.token_shares = {} if self._tokens is None else shares_of(self._tokens)
        self._positions = np.arange(rank, len(self.rows), ranks)
        self.turns = -(-len(self.rows) // (ranks * batch_size))
        if not opened.holds_whole_views:
            log.info(
                f"{split}: the best {opened.stored_tokens} of {opened.num_patches} patches are stored of each view: it is"
                f" tested on tickets alone"
            )

    def __len__(self) -> int:
        return math.ceil(len(self._positions) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        size = self.batch_size
        positions = self._positions[number * size : (number + 1) * size]
        places = [self.rows.locate(int(p)) for p in positions]
        samples = list(self.rows.read_all(places, [[0]] * len(places)))
        sizes = {"patches": self.views.side}
        if self.views.whole_side != self.views.side:
            sizes["whole"] = self.views.whole_side
        shown = [self._shown(sample, list(sizes.values())) for sample in samples]
        return {
            **{
                name: self._patches(np.stack(views))
                for name, views in zip(sizes, zip(*shown, strict=True), strict=True)
            },
            "rankings": torch.from_numpy(np.stack([s.rankings[0] for s in samples]).astype(np.int64)),
            "labels": torch.from_numpy(self.rows.labels[positions].astype(np.int64)),
            "positions": torch.from_numpy(positions),
            **({} if self._tokens is None else {"tokens": torch.from_numpy(self._tokens[positions])}),
        }

    def _shown(self, sample: Sample, sides: list[int]) -> list[np.ndarray]:
        """View 0 of a sample, decoded once, at several sizes; patches that are not stored are gray, and not tested on."""
        if sample.ranked is None:
            pixels = sample.pixels()
            return [render_pixels(pixels, sample.views[:1], side)[0] for side in sides]
        view = sample.ranked.view(0, sample.rankings[0])
        return [resize_views(view[None], side)[0] for side in sides]

    def _patches(self, views: np.ndarray) -> torch.Tensor:
        """All patches of whole views [B, S, S, 3] in raster order."""
        everything = np.arange((views.shape[1] // self.views.patch_size) ** 2)
        return torch.from_numpy(gather(views, np.tile(everything, (len(views), 1)), self.views.patch_size))


def stacked(maps: Maps) -> dict[str, np.ndarray]:
    """What was collected by slots, by names."""
    return {name: np.stack([maps[slot][name] for slot in sorted(maps)]) for name in (maps[0] if maps else {})}


def loader(dataset: Any, places: Iterable[Any], workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """Batches of a dataset in the order of `places`; close it to end its worker processes.

    Raises:
        TicketSetError: a sample is not what the index says, or a worker process died.
        ImageError, OSError: an image that cannot be decoded, a file that cannot be read.
    """
    if workers:
        return batches(dataset, places, workers, device)
    return (pinned(dataset[place]) if device.type == "cuda" else dataset[place] for place in places)
