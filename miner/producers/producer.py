"""What a producer is: it makes something of every image of a set, a member of its samples.

What becomes of an image on its way: reading threads decode it and render what each producer looks at; producers gather
such inputs into batches and put them on the device; when all have answered, the writing thread asks each to encode.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from miner.sources.source import Kept
from shards.images import StoredImage
from shards.ranked import Statistics
from shards.record import Record
from shards.sample import Encoded

WHOLE = -1  # stands for the whole image where a view's number does


@dataclass(slots=True, eq=False)
class Image:
    """One input on its way: read, then given to the producers, then written. With an `error` it goes no further.

    Attributes:
        row: of the source's table.
        error: why it failed.
        stored: what a set of copies holds of it.
        views: int32 [V, 5].
        inputs: producer's name -> uint8 [V, S, S, 3], or [1, S, S, 3] of the whole image; none once it has answered, nor
            for one that looks at no pixels.
        rendered: uint8 [V, S, S, 3] for a set of ranked views, until they are encoded.
        statistics: of each of these as it will be decoded; None where no producer looks at it so.
        kept: tickets that the source has already, where they are kept.
        answers: producer's name -> what it said of each view, or of the whole image.
    """

    row: dict[str, Any]
    error: str | None = None
    stored: StoredImage = field(init=False)
    views: np.ndarray = field(init=False)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    rendered: np.ndarray | None = None
    statistics: list[Statistics] | None = None
    kept: Kept | None = None
    answers: dict[str, list[Any]] = field(default_factory=dict)

    def rankings(self) -> np.ndarray:
        """[V, N], once they are there."""
        if self.kept is not None:
            return self.kept.rankings
        return np.stack([answer.ranking for answer in self.answers["selector"]])


Item = tuple[Image, int]  # an image, and the number of a view or WHOLE: a place in a batch


class Producer(Protocol):
    """Makes members of samples. Build them with `miner.producers.build_producers`.

    Attributes:
        name: what the plan calls it.
        whole: it is of the whole image, squashed to a square; else of every view.
    """

    name: str
    whole: bool

    @property
    def identity(self) -> Record:
        """What the plan says of it: all that decides what it makes."""

    def encode(self, image: Image, answers: list[Any]) -> Encoded:
        """Members of the image's sample, and columns of its row of the index.

        Args:
            answers: its own, where it is an `Answering` one.
        """


@runtime_checkable
class Answering(Producer, Protocol):
    """A producer that is asked first, batch by batch on a device.

    Attributes:
        size: S, pixels a side of what it looks at; None: it looks at none.
        batch_size: items in a batch.
    """

    size: int | None
    batch_size: int

    def submit(self, batch: list[Item]) -> tuple[Tensor, ...]:
        """Put a batch on the device and start to compute; tensors [B, ...] on it, which need not be there yet."""

    def collect(self, batch: list[Item], results: list[np.ndarray]) -> list[Any]:
        """The answer to each item, out of what `submit` gave.

        Raises:
            TicketSetError: it is none: weights may hold NaN, a method may be a user's own.
        """


def answering(producers: Sequence[Producer]) -> list[Answering]:
    """Those that are asked; the others only encode."""
    return [producer for producer in producers if isinstance(producer, Answering)]


def numbers(producer: Answering, image: Image) -> Iterator[int]:
    """The items that a producer makes of an image: its views, or the whole."""
    return iter((WHOLE,)) if producer.whole else iter(range(len(image.views)))


class Normalize:
    """Pixels -> a model's input on its device.

    Args:
        mean, std: of each channel, 0 to 1; empty for a producer that looks at no pixels.
        device: of the model.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self._mean, self._std = (  # [3, 1, 1] each, in units of uint8
            torch.tensor([255.0 * v for v in values or (0, 0, 0)], device=device).view(3, 1, 1)
            for values in (mean, std)
        )

    def __call__(self, name: str, batch: list[Item]) -> Tensor:
        """The inputs of a producer's batch, float [B, 3, S, S]; uint8 crosses to the device, floats are made there."""
        views = [image.inputs[name][number] for image, number in batch]
        # Gathered where the device reads: stacked elsewhere, a batch would be copied once more, by the thread that feeds it.
        host = torch.empty(len(views), *views[0].shape, dtype=torch.uint8, pin_memory=self._mean.device.type == "cuda")
        np.stack(views, out=host.numpy())
        images = host.to(self._mean.device, non_blocking=True).permute(0, 3, 1, 2)
        # Planes: on a CPU a row of 224 numbers minus one mean is five times as fast as 3 numbers minus 3 means.
        return images.to(self._mean.dtype, memory_format=torch.contiguous_format).sub_(self._mean).div_(self._std)
