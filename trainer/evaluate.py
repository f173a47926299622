"""Validation under three protocols: the selector's tickets (the paper's), all patches, and random patches.

A model that drops patches inside, a selector in training, is tested with its drops (`dropped`) and without (`all`).
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from trainer.data.arms import arm_ranking
from trainer.data.loader import Batch, pinned
from trainer.engine import Setup
from trainer.families.base import TicketModel
from trainer.families.patches import gather_patches


class Figures(TypedDict):
    """Of one protocol: top-1 and top-5 in percent, mean cross-entropy."""

    top1: float
    top5: float
    loss: float


@torch.inference_mode()
def evaluate(
    models: Mapping[str, TicketModel],
    batches: Iterable[Batch],
    protocols: Sequence[str],
    tokens: int,
    images: int,
    setup: Setup,
) -> tuple[dict[str, Figures], Tensor]:
    """Figures of each model and protocol over all ranks, under the model's name and the protocol's joined.

    Also the answers: int32 [models * protocols, images], classes in stored order.

    Args:
        models: by the prefix of their figures; not in DistributedDataParallel, since ranks may hold different numbers of batches.
        batches: of a ValidationDataset.
        tokens: K; a batch that holds `tokens` has the K of each image there.
        images: of the split, over all ranks.
    """
    names = [prefix + protocol for prefix in models for protocol in protocols]
    answers = torch.zeros(len(names), images, dtype=torch.int32, device=setup.device)
    for model in models.values():
        model.eval()
    # On the device and in double: no batch waits for the host, and a sum does not depend on how ranks share the images.
    sums = torch.zeros(len(names), 4, dtype=torch.float64, device=setup.device)  # top1, top5, loss, images
    for batch in batches:
        if "random" in protocols:
            positions = batch["positions"].tolist()
            random = {"random": random_rankings(positions, batch["rankings"].shape[1], setup.machine.seed)}
            batch |= pinned(random) if setup.device.type == "cuda" else random
        lengths = by_length(batch["tokens"], setup.device) if "tokens" in batch else [(tokens, None)]
        batch = {name: tensor.to(setup.device, non_blocking=True) for name, tensor in batch.items()}
        patches = setup.normalized(batch["patches"])
        # A student that packs its tickets into a smaller image sees whole views at that size.
        whole = setup.normalized(batch["whole"]) if "whole" in batch else patches
        for row, (model, protocol) in enumerate(itertools.product(models.values(), protocols)):
            with setup.autocast():
                if protocol in ("all", "dropped"):
                    # A selector in training is shown tickets without dropping from them again.
                    logits = (model if protocol == "dropped" else model.undropped())(whole, every(whole)).float()
                else:
                    rankings = batch["random" if protocol == "random" else "rankings"]
                    logits = on_tickets(model.undropped(), patches, rankings, lengths)
            ranked = best_classes(logits)
            sums[row] += figures(logits, ranked, batch["labels"])
            answers[row, batch["positions"]] = ranked[:, 0].int()
    if setup.rank.size > 1:
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(answers)  # each image is one rank's; the others hold 0
    results: dict[str, Figures] = {
        name: {"top1": 100 * a / n, "top5": 100 * b / n, "loss": c / n}
        for name, (a, b, c, n) in zip(names, sums.tolist(), strict=True)
    }
    return results, answers.cpu()


def by_length(tokens: Tensor, device: torch.device) -> list[tuple[int, Tensor | None]]:
    """The rows of a batch by their K, on the way to a device: `tokens`, int64 [B], are on the host, so that nothing waits."""
    rows = {str(k): (tokens == k).nonzero()[:, 0] for k in tokens.unique().tolist()}
    rows = pinned(rows) if device.type == "cuda" else rows
    return [(int(k), some.to(device, non_blocking=True)) for k, some in rows.items()]


def on_tickets(
    model: TicketModel, patches: Tensor, rankings: Tensor, lengths: Sequence[tuple[int, Tensor | None]]
) -> Tensor:
    """Logits of views by their best patches: float32 [B, classes].

    Args:
        patches: [B, N, C*p*p], normalized, in raster order.
        rankings: [B, N].
        lengths: K and the rows that have it; None: all rows.
    """
    out: Tensor | None = None
    for k, some in lengths:
        rows: Any = slice(None) if some is None else some
        keep, given = rankings[rows, :k], patches[rows]
        logits = model(given if model.wants_all else gather_patches(given, keep), keep).float()
        if some is None:
            return logits
        out = logits.new_empty(len(patches), logits.shape[1]) if out is None else out
        out[rows] = logits
    assert out is not None
    return out


def best_classes(logits: Tensor, count: int = 5) -> Tensor:
    """The classes of the greatest logits, greatest first, ties to the lower class: int64 [B, count or all there are].

    Half-precision logits tie, also as float32, and topk and argmax break ties each in its own way: the stored answers and
    the accuracies come from this one ranking.
    """
    return logits.argsort(dim=1, descending=True, stable=True)[:, :count]


def figures(logits: Tensor, ranked: Tensor, labels: Tensor) -> Tensor:
    """float64 [4]: sums of top-1 hits, top-5 hits, loss, and the number of images.

    Args:
        logits: float32 [B, classes].
        ranked: `best_classes` of them.
        labels: [B].
    """
    best = ranked == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    count = torch.full((), len(labels), device=logits.device)  # torch.tensor would wait for the device
    return torch.stack([best[:, 0].sum(), best.any(1).sum(), loss, count]).double()


def every(patches: Tensor) -> Tensor:
    """All indices in raster order: [B, N]."""
    return torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)


def random_rankings(positions: Sequence[int], num_patches: int, seed: int) -> Tensor:
    """A ranking an image, the same at every evaluation."""
    blank = np.zeros(num_patches)
    rows = [arm_ranking("random", blank, (1, num_patches), fresh_name=f"eval/{seed}/{p}") for p in positions]
    return torch.from_numpy(np.stack(rows))
