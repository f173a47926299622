"""Photos -> the likeliest classes of each, on all patches and on tickets.

threads: read -> decode -> what each way of showing needs        a bounded number of photos ahead
main:    batches -> device -> logits -> classes
"""

import collections
import contextlib
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from miner.producers.producer import Image as Item
from miner.producers.rankings import Answer as Ranked
from miner.producers.rankings import build_rankings
from miner.settings import Geometry, Machine, Selection
from shards.errors import ImageError, TicketSetError, is_machine_error
from shards.images import decode, render_pixels
from shards.keys import key_of
from shards.views import canonical_view
from trainer.data.cutting import gather
from trainer.data.lengths import Lengths
from trainer.evaluate import best_classes, by_length, on_tickets
from trainer.families.patches import normalize
from trainer.families.registry import feed_of
from trainer.predict.photos import read_photo
from trainer.predict.student import Student

Likeliest = list[tuple[str, float]]  # (class, probability), likeliest first


@dataclass
class Answer:
    """To one photo.

    Attributes:
        path: of the photo.
        classes: by the way in which it was shown.
        error: why there are none.
    """

    path: str
    classes: dict[str, Likeliest] = field(default_factory=dict)
    error: str | None = None


class Way(Protocol):
    """A way of showing a photo to a student.

    Attributes:
        name: for people: all, or the number of patches.
    """

    name: str

    def prepare(self, path: str, pixels: np.ndarray) -> Any:
        """What is needed of a photo uint8 [H, W, 3]; called in threads."""

    def logits(self, prepared: list[Any]) -> Tensor:
        """[B, classes] of a batch."""


class Whole:
    """As timm shows a photo to the run's model in evaluation."""

    name = "all"

    def __init__(self, student: Student, device: torch.device) -> None:
        self._model, self._device = student.model, device
        self._transform = create_transform(**resolve_model_data_config(student.model))

    def prepare(self, path: str, pixels: np.ndarray) -> Tensor:
        """float32 [3, S, S]"""
        return self._transform(Image.fromarray(pixels))

    def logits(self, prepared: list[Tensor]) -> Tensor:
        """See `Way`."""
        return self._model(torch.stack(prepared).to(self._device)).float()


class Ticket:
    """The patches that a selector picks of view 0, as in the run's validation on tickets.

    Where K varied in the run it does so here, by the scores of this selector, unless one is asked for.

    Args:
        selection: the selector; without a number of patches the run's own.
        varying: as many patches of each photo as its scores ask for, as in the run.
    Raises:
        TicketSetError: no such selector, or tickets that the student cannot take.
    """

    def __init__(
        self, student: Student, selection: Selection, device: torch.device, batch_size: int, varying: bool = False
    ) -> None:
        views, model = student.views, student.model
        if views is None:
            raise TicketSetError("`selector`: this run does not say what its patches are; a newer datalth-train does")
        if views.resized:
            raise TicketSetError(
                "`selector`: this run was trained on whole views at a smaller size, which has no tickets"
            )
        geometry = Geometry(img_size=views.img_size, patch_size=views.patch_size)
        self._rankings = build_rankings(selection, geometry, Machine(), device, batch_size)
        self._size, self._tokens = self._rankings.size, self._rankings.identity.counts[-1]
        feed, kind = feed_of(model, views.feed)
        # The same grid for all three: the set, the selector, and the student, whose patches may be of another size.
        self._patch = kind.patch_of(model, views.patch_size)
        self._side = geometry.grid[0] * self._patch
        side = kind.side_of(self._tokens, self._side, self._patch)
        config = resolve_model_data_config(model)
        if side != config["input_size"][-1]:
            raise TicketSetError(f"`tokens` {self._tokens}: expected {views.tokens}, what this model was built for")
        self._fed = kind.wrap(model, feed, geometry.grid, self._patch, side).eval()
        if self._fed.grid != geometry.grid or self._fed.patch_size != self._patch:
            raise TicketSetError("`selector`: config.json has other patches than the model beside it")
        self._mean, self._std, self._device = tuple(config["mean"]), tuple(config["std"]), device
        self._lengths = None
        if varying and views.share is not None and views.sizes is not None:
            self._lengths = Lengths(views.sizes, views.share, geometry.grid[0] * geometry.grid[1])
        self.name = f"auto:{self._tokens}" if self._lengths else f"{self._tokens}"

    def prepare(self, path: str, pixels: np.ndarray) -> tuple[np.ndarray, Item]:
        """View 0 as the student sees it, uint8 [S, S, 3], and as the selector does."""
        height, width = pixels.shape[:2]
        view = np.array([canonical_view(width, height)])
        item = Item({"key": key_of(path)})
        if self._size is not None:
            item.inputs[self._rankings.name] = render_pixels(pixels, view, self._size)
        return render_pixels(pixels, view, self._side)[0], item

    def logits(self, prepared: list[tuple[np.ndarray, Item]]) -> Tensor:
        """See `Way`."""
        batch = [(item, 0) for _, item in prepared]
        found = self._rankings.collect(batch, [each.cpu().numpy() for each in self._rankings.submit(batch)])
        rankings = np.stack([answer.ranking for answer in found]).astype(np.int64)
        everything = np.tile(np.arange(rankings.shape[1]), (len(rankings), 1))
        patches = torch.from_numpy(gather(np.stack([view for view, _ in prepared]), everything, self._patch))
        patches = normalize(patches.to(self._device), self._mean, self._std)
        return on_tickets(self._fed, patches, torch.from_numpy(rankings).to(self._device), self._by_length(found))

    def _by_length(self, found: Sequence[Ranked]) -> list[tuple[int, Tensor | None]]:
        """K and the photos that have it.

        Raises:
            TicketSetError: scores that are no shares of a whole say nothing of K.
        """
        if self._lengths is None:
            return [(self._tokens, None)]
        counts = np.stack([answer.spread for answer in found])
        if not counts.any(1).all():
            raise TicketSetError(
                f"`method` {self._rankings.identity.method}: its scores do not say how many patches a photo needs, which this"
                f" run's tickets go by; `tokens` {self._tokens} takes as many of each"
            )
        return by_length(torch.from_numpy(self._lengths.of(counts)), self._device)


def answers(
    student: Student,
    ways: Sequence[Way],
    photos: Iterable[str],
    device: torch.device,
    batch_size: int,
    workers: int,
    top: int,
) -> Generator[list[Answer], None, None]:
    """Answers to photos, in order, batch by batch; one that cannot be read has its reason.

    Args:
        batch_size: photos; reading is two batches ahead.
        workers: threads that read.
        top: classes of each photo.
    """
    student.model.to(device)
    batch: list[tuple[Answer, list[Any]]] = []
    with contextlib.closing(_prepared(student.exif, ways, photos, 2 * batch_size, workers)) as prepared:
        for one in prepared:
            batch.append(one)
            if len(batch) == batch_size:
                yield _answered(batch, ways, student.classes, top)
                batch = []
    if batch:
        yield _answered(batch, ways, student.classes, top)


def _prepared(
    exif: str, ways: Sequence[Way], photos: Iterable[str], ahead: int, workers: int
) -> Generator[tuple[Answer, list[Any]], None, None]:
    pool = ThreadPoolExecutor(workers, "read", initializer=torch.set_num_threads, initargs=(1,))
    futures: collections.deque[Future[tuple[Answer, list[Any]]]] = collections.deque()
    try:
        for path in photos:
            futures.append(pool.submit(_prepare, path, exif, ways))
            if len(futures) > ahead + workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare(path: str, exif: str, ways: Sequence[Way]) -> tuple[Answer, list[Any]]:
    try:
        pixels = decode(read_photo(path), exif)
        return Answer(path), [way.prepare(path, pixels) for way in ways]
    except (ImageError, OSError) as error:
        if is_machine_error(error):  # it would meet any photo
            raise
        reason = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        return Answer(path, error=reason), []


@torch.inference_mode()
def _answered(
    batch: list[tuple[Answer, list[Any]]], ways: Sequence[Way], classes: Sequence[str], top: int
) -> list[Answer]:
    good = [(answer, prepared) for answer, prepared in batch if answer.error is None]
    for number, way in enumerate(ways if good else ()):
        logits = way.logits([prepared[number] for _, prepared in good])
        best = best_classes(logits, top)
        shares = logits.softmax(1).gather(1, best)
        for (answer, _), labels, values in zip(good, best.tolist(), shares.tolist(), strict=True):
            answer.classes[way.name] = [(classes[label], value) for label, value in zip(labels, values, strict=True)]
    return [answer for answer, _ in batch]
