"""Validation under three protocols: the selector's tickets (the paper's), all patches, and random patches."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trainer.arms import arm_ranking
from trainer.engine import StepOptions, normalise
from trainer.feed import Batch
from trainer.ticket_vit import gather_patches

PROTOCOLS = ("tickets", "all", "random")


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], protocols: Sequence[str], tokens: int, options: StepOptions
) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 (percent) and loss of each protocol over all ranks.

    Args:
        model: TicketViT; not in DistributedDataParallel, since ranks may hold different numbers of batches.
        batches: of an EvalFeed.
        tokens: K.
    """
    model.eval()
    sums = torch.zeros(len(protocols), 4, dtype=torch.float64)  # top1, top5, loss, images
    for batch in batches:
        names = batch.pop("positions").tolist()
        random = random_rankings(names, batch["rankings"].shape[1], options.seed)
        batch = {name: tensor.to(options.device, non_blocking=True) for name, tensor in batch.items()}
        patches = normalise(batch["patches"], options)
        for row, protocol in enumerate(protocols):
            ranking = random.to(options.device) if protocol == "random" else batch["rankings"]
            keep = every(patches) if protocol == "all" else ranking[:, :tokens]
            chosen = patches if protocol == "all" else gather_patches(patches, keep)
            with torch.autocast(options.device.type, options.amp_dtype, enabled=options.amp_dtype is not None):
                logits = model(chosen, keep).float()
            sums[row] += figures(logits, batch["labels"]).cpu()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sums = sums.to(options.device, torch.float64)
        torch.distributed.all_reduce(sums)
    top1, top5, loss, images = sums.cpu().unbind(1)
    return {
        name: {"top1": float(100 * a / n), "top5": float(100 * b / n), "loss": float(c / n)}
        for name, a, b, c, n in zip(protocols, top1, top5, loss, images, strict=True)
    }


def figures(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [4]: sums of top-1 hits, top-5 hits, loss, and the number of images."""
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    count = torch.tensor(len(labels), device=logits.device)
    return torch.stack([best[:, 0].sum(), best.any(1).sum(), loss, count]).double()


def every(patches: Tensor) -> Tensor:
    """All indices in raster order: [B, N]."""
    return torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)


def random_rankings(positions: Sequence[int], num_patches: int, seed: int) -> Tensor:
    """A ranking an image, the same at every evaluation."""
    blank = np.zeros(num_patches)
    rows = [arm_ranking("random", blank, (1, num_patches), fresh_name=f"eval/{seed}/{p}") for p in positions]
    return torch.from_numpy(np.stack(rows))
