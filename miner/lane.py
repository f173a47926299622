"""Images on their way over a device: gathered into batches, one of which is fetched while the next computes."""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shards.images import StoredImage

WHOLE = -1  # stands for the whole image where a view's number does


@dataclass(slots=True)
class Image:
    """One input on its way: read, then ranked, then written. With an `error` it goes no further."""

    row: dict[str, Any]
    error: str | None = None
    stored: StoredImage = field(init=False)
    views: np.ndarray = field(init=False)  # int32 [V, 5]
    pixels: np.ndarray | None = None  # uint8 [V, S, S, 3]; None for model-free methods and once ranked
    whole: np.ndarray | None = None  # uint8 [S, S, 3], squashed, for token labels; None without, and once labelled
    rankings: np.ndarray = field(init=False)  # [V, N]
    token_labels: bytes | None = None  # the member
    mean_score: float | None = None
    entropy: float | None = None


class Flight:
    """A batch on the device; on CUDA its results come back in pinned memory while the next batch runs."""

    def __init__(self, batch: list[tuple[Image, int]], *results: torch.Tensor) -> None:
        self.batch, self._results, self._event = batch, results, None
        if results[0].device.type == "cuda":
            pinned = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
            self._results = tuple(p.copy_(r, non_blocking=True) for p, r in zip(pinned, results, strict=True))
            self._event = torch.cuda.Event()
            self._event.record()

    def results(self) -> list[np.ndarray]:
        if self._event is not None:
            self._event.synchronize()
        return [r.cpu().numpy() for r in self._results]


class Lane:
    """Work of one kind: gathered into batches, one of which is fetched while the next computes.

    Args:
        size: of a batch.
        launch: starts a batch.
        land: waits for one and keeps its results.
    """

    def __init__(
        self, size: int, launch: Callable[[list[tuple[Image, int]]], Flight], land: Callable[[Flight], None]
    ) -> None:
        self._size, self._launch, self._land = size, launch, land
        self._pending: collections.deque[tuple[Image, int]] = collections.deque()  # not yet in a batch
        self._flying: collections.deque[Flight] = collections.deque()  # results are not yet here

    def push(self, image: Image, views: range) -> None:
        self._pending.extend((image, view) for view in views)

    def turn(self, last: bool) -> Iterator[None]:
        """Start the batches that are full, at the last also a short one; yields after each."""
        while len(self._pending) >= self._size or (last and self._pending):
            batch = [self._pending.popleft() for _ in range(min(self._size, len(self._pending)))]
            self._flying.append(self._launch(batch))
            if len(self._flying) > 1:
                self._land(self._flying.popleft())
            yield
        while last and self._flying:
            self._land(self._flying.popleft())

    @property
    def oldest(self) -> Image | None:
        """The first image that it is not done with."""
        return self._flying[0].batch[0][0] if self._flying else self._pending[0][0] if self._pending else None
