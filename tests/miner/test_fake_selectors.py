"""Selectors and the miner's batches on fake CUDA tensors: what they move, copy and wait for. See tests/fakes.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from fakes import CUDA, fake_tensors, faked
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError as NotMoved

from miner.batcher import Batcher
from miner.drop import default_blocks, keep_counts
from miner.producers.producer import Normalize
from miner.selectors import METHODS, Selector, create_selector

VIT = {"img_size": 64, "depth": 4, "num_classes": 0}
MODELS = {
    "evit": ("deit_tiny_patch16_224", {"embed_dim": 32, "num_heads": 2}),
    "cls-attention": ("eva02_tiny_patch14_224", {"img_size": 56, "embed_dim": 48, "num_heads": 3}),
    "rollout": ("deit_tiny_patch16_224", {"embed_dim": 32, "num_heads": 2}),
    "pool-attention": ("vit_base_patch16_siglip_224", {"embed_dim": 48, "num_heads": 3}),
}


def selector_of(method: str, look: str | None = None) -> Selector:
    """Small, on the host; `look` names the model where the method is another's."""
    name, options = MODELS[look or method]
    model = timm.create_model(name, **{**VIT, **options}).eval()
    blocks = default_blocks(4) if method == "evit" else None
    return create_selector(method, model, (4, 4), keep_counts(16, 0.8, len(blocks or (0,))), blocks)


def on_cuda(selector: Selector) -> Selector:
    return Selector(
        selector.method, faked(selector.model), selector.grid, selector.blocks, selector.counts, CUDA, selector.amp
    )


def images_for(selector: Selector) -> Tensor:
    side = 4 * selector.model.patch_embed.patch_size[0]
    return torch.zeros(3, 3, side, side, device=CUDA)


@pytest.mark.parametrize("method", MODELS)
def test_a_selector_stays_on_the_gpu_and_waits_for_nothing(method: str) -> None:
    selector = selector_of(method)
    with fake_tensors() as crossings:
        ranking, scores = on_cuda(selector).rank_and_score(images_for(selector))
        assert ranking.device == scores.device == CUDA and ranking.shape == scores.shape == (3, 16)
        assert crossings.seen == []


def faulty(found: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def method(selector: Selector, images: Tensor, seeds: list[int] | None) -> tuple[Tensor, Tensor]:
        ranking, scores = METHODS["cls-attention"](selector, images, seeds)
        return ranking, found(scores)

    return method


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "not moved": (lambda scores: scores + torch.arange(16), NotMoved),
    "item": (lambda scores: scores / scores.max().item(), DataDependentOutputException),
    "numpy": (lambda scores: torch.from_numpy(scores.cpu().numpy()), RuntimeError),
    "boolean mask": (lambda scores: scores - scores[scores > 0].min(), DynamicOutputShapeException),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_method_that_waits_or_does_not_move_a_tensor_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, error = FAULTS[fault]
    monkeypatch.setitem(METHODS, "faulty", faulty(found))
    selector = selector_of("faulty", "rollout")
    with fake_tensors(), pytest.raises(error):
        on_cuda(selector).rank_and_score(images_for(selector))


def test_a_copy_to_the_host_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "faulty", faulty(lambda scores: (scores, scores.cpu())[0]))
    selector = selector_of("faulty", "rollout")
    with fake_tensors() as crossings:
        on_cuda(selector).rank_and_score(images_for(selector))
        assert crossings.seen == [("cpu", True)]


class Device:
    """Batches on a GPU that is not there: what is done for each, by number, in order."""

    name, whole, size, batch_size = "device", True, 8, 2

    def __init__(self) -> None:
        self.log: list[str] = []

    def submit(self, batch: list[Any]) -> tuple[Tensor, ...]:
        self.log.append(f"submit {batch[0][0].number}")
        return (torch.zeros(len(batch), device=CUDA),)

    def collect(self, batch: list[Any], results: list[Any]) -> list[Any]:
        self.log.append(f"collect {batch[0][0].number}")
        return [None] * len(batch)


class Picture:
    def __init__(self, number: int) -> None:
        self.number = number
        self.answers: dict[str, list[Any]] = {}
        self.inputs: dict[str, np.ndarray] = {}


def test_a_batch_is_fetched_while_the_next_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()

    class Event:
        def record(self) -> None:
            device.log.append("record")

        def synchronize(self) -> None:
            device.log.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Tensor, "numpy", lambda tensor: tensor)
    batches = Batcher(device)
    with fake_tensors() as crossings:
        for number in range(6):
            batches.add(Picture(number))
        assert len([*batches.work(last=True)]) == 3
    assert device.log == [
        "submit 0", "record",
        "submit 2", "record", "wait", "collect 0",
        "submit 4", "record", "wait", "collect 2",
        "wait", "collect 4",
    ]  # fmt: skip
    assert crossings.seen == [("cpu", False)] * 3


@pytest.mark.parametrize("promised", [True, False])
def test_a_batch_of_views_is_gathered_in_locked_memory_and_crosses_once(promised, monkeypatch) -> None:
    """Without the lock, or without the promise not to look at it, the host waits: the control."""
    if not promised:
        to = Tensor.to
        monkeypatch.setattr(Tensor, "to", lambda tensor, *args, non_blocking=False, **more: to(tensor, *args, **more))
    gathered = np.zeros((3, 8, 8, 3), np.uint8)
    monkeypatch.setattr(Tensor, "numpy", lambda tensor: gathered)
    images = [Picture(number) for number in (1, 2, 3)]
    for image in images:
        image.inputs = {"device": np.full((1, 8, 8, 3), image.number, np.uint8)}
    with fake_tensors() as crossings:
        normalize = Normalize((0.5,) * 3, (0.2,) * 3, CUDA)
        crossings.seen.clear()
        inputs = normalize("device", [(image, 0) for image in images])
        assert inputs.device == CUDA and inputs.shape == (3, 3, 8, 8) and inputs.is_contiguous()
        assert crossings.seen == [("cuda", not promised)]
    assert [int(view.max()) for view in gathered] == [int(view.min()) for view in gathered] == [1, 2, 3]
