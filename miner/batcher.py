"""Items of images gathered into a producer's batches, one of which is fetched while the next computes."""

import collections
from collections.abc import Iterator

import numpy as np
import torch

from miner.producers.producer import Answering, Image, Item, numbers


class Pending:
    """A batch on the device; on CUDA its results come back in pinned memory while the next batch runs."""

    def __init__(self, batch: list[Item], results: tuple[torch.Tensor, ...]) -> None:
        self.batch, self._results = batch, results
        self._event: torch.cuda.Event | None = None
        if results[0].device.type == "cuda":
            pinned = [torch.empty(r.shape, dtype=r.dtype, pin_memory=True) for r in results]
            self._results = tuple(p.copy_(r, non_blocking=True) for p, r in zip(pinned, results, strict=True))
            self._event = torch.cuda.Event()
            self._event.record()

    def results(self) -> list[np.ndarray]:
        """Wait for the device."""
        if self._event is not None:
            self._event.synchronize()
        return [r.cpu().numpy() for r in self._results]


class Batcher:
    """The images of one shard on their way through one producer; what it answers is put into them."""

    def __init__(self, producer: Answering) -> None:
        self._producer = producer
        self._waiting: collections.deque[Item] = collections.deque()  # not yet in a batch
        self._pending: collections.deque[Pending] = collections.deque()  # results are not yet here

    def add(self, image: Image) -> None:
        """Take an image that could be read."""
        image.answers[self._producer.name] = []
        self._waiting.extend((image, number) for number in numbers(self._producer, image))

    def work(self, last: bool) -> Iterator[None]:
        """Submit the batches that are full, at the last also a short one; yields after each."""
        size = self._producer.batch_size
        while len(self._waiting) >= size or (last and self._waiting):
            batch = [self._waiting.popleft() for _ in range(min(size, len(self._waiting)))]
            self._pending.append(Pending(batch, self._producer.submit(batch)))
            if len(self._pending) > 1:  # fetched only now: the device has the next one to compute meanwhile
                self._collect()
            yield
        while last and self._pending:
            self._collect()

    @property
    def oldest(self) -> Image | None:
        """The first image that it is not done with."""
        return self._pending[0].batch[0][0] if self._pending else self._waiting[0][0] if self._waiting else None

    def _collect(self) -> None:
        done = self._pending.popleft()
        answers = self._producer.collect(done.batch, done.results())
        for (image, _), answer in zip(done.batch, answers, strict=True):  # in order, so view after view
            image.answers[self._producer.name].append(answer)
