"""One training step, each way: ours, timm dense, timm's patch_drop, and the paper's selector inside the step.

All take the same uint8 views of a batch, share one timm model and one AdamW, and end with the updated weights. Ours is
given what its loader gives: kept patches and their places. The paper's is Data-LTH's as its public code runs: the EViT
teacher's whole forward in every step, at the student's keep rate, then three successive gathers of the embedded patches.
It is shown at its best: without gradients of the teacher (the authors' code records them), and with fused attention
wherever scores are not needed.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers import PatchDropout
from timm.optim import create_optimizer_v2
from torch import Tensor

from miner.drop import default_blocks, keep_counts
from trainer.costs import gmacs
from trainer.data.loader import Batch
from trainer.engine import Setup, State, apply_update, soft_targets, train_micro_batch
from trainer.families.base import soft_cross_entropy
from trainer.families.patches import gather_patches, patchify
from trainer.families.vit import TicketViT
from trainer.options import Machine, Optimization
from trainer.ranks import Rank

CLASSES, SIZE, PATCH, N = 1000, 224, 16, 196
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class NoSchedule:
    def step_update(self, update: int) -> None:
        pass


class Steps:
    """A model, its optimizer, and a batch of noise.

    Args:
        name: of a timm ViT, 224 px, patch 16.
        batch: views.
        device: of all of it.
        amp: bfloat16 autocast.
    """

    def __init__(self, name: str, batch: int, device: torch.device = CPU, amp: bool = False) -> None:
        torch.manual_seed(0)
        self.name, self.batch = name, batch
        self.model: Any = timm.create_model(f"{name}_patch16_224", drop_path_rate=0.1).train().to(device)
        self.optimizer = create_optimizer_v2(self.model, "adamw", lr=1e-4, weight_decay=0.05)
        self.images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8).to(device)
        self.patches = patchify(self.images, PATCH)
        self.order = torch.rand(batch, N).argsort(1).to(device)
        labels = torch.randint(0, CLASSES, (batch,)).to(device)
        lam = torch.full((batch,), 0.7, device=device)
        self.targets = {"labels": labels, "partners": labels.flip(0), "lam": lam}
        self.mean, self.std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (MEAN, STD))
        machine = Machine(seed=0, amp=amp, amp_dtype="bfloat16")
        self.setup = Setup(Optimization(), machine, Rank(device=device), MEAN, STD, CLASSES)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        student = TicketViT(self.model)
        self.state = State(student, student, self.optimizer, NoSchedule(), scaler)

    def ours(self, tokens: int, views: int | None = None) -> Callable[[], float]:
        """On K patches of each view, or of the first few views."""
        batch = self.tickets(tokens, views)
        return lambda: self.train(batch)

    def tickets(self, tokens: int, views: int | None = None) -> Batch:
        """On the device, as after the copy from the host; but for the grid's width, which the host reads."""
        keep = self.order[:views, :tokens].contiguous()
        patches = gather_patches(self.patches[:views], keep)
        targets = {name: tensor[:views] for name, tensor in self.targets.items()}
        return {"patches": patches, "keep_indices": keep, "grid_width": torch.full((len(keep),), 14), **targets}

    def train(self, batch: Batch) -> float:
        """One step of the trainer's."""
        train_micro_batch(self.state, batch, self.setup, 0, 0)
        apply_update(self.state, self.setup, 0)
        return len(batch["labels"])

    def dense(self) -> Callable[[], float]:
        return lambda: self._step(self.model)

    def patch_drop(self, tokens: int) -> Callable[[], float]:
        """timm's own slot, K random patches of each image: the same arithmetic but for embedding all patches."""
        drop = PatchDropout(1 - (tokens + 0.5) / N, num_prefix_tokens=1)

        def step() -> float:
            self.model.patch_drop = drop
            try:
                return self._step(self.model)
            finally:
                self.model.patch_drop = torch.nn.Identity()

        return step

    def in_step(self, teacher: Any, rate: float) -> Callable[[], float]:
        counts, blocks = keep_counts(N, rate), default_blocks(len(teacher.blocks))
        return lambda: self._step(lambda images: lottery_forward(self.model, teacher, images, blocks, counts))

    def _step(self, forward: Callable[[Tensor], Tensor]) -> float:
        images = (self.images.float() - self.mean) / self.std
        with self.setup.autocast():
            logits = forward(images)
        loss = soft_cross_entropy(logits, soft_targets(self.targets, 0.1, CLASSES))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.batch

    def macs(self, tokens: int) -> float:
        """Multiply-accumulates of one view's forward, attention included, in units of 1e9."""
        return gmacs(self.state.student, tokens)


def lottery_forward(student: Any, teacher: Any, images: Tensor, blocks: tuple[int, ...], counts: tuple) -> Tensor:
    """The teacher ranks, the student embeds everything and gathers before its first block."""
    stages = evit_stages(teacher, images, blocks, counts)
    x = student._pos_embed(student.patch_embed(images))
    tokens = x[:, 1:]
    for kept in stages:  # each relative to what the one before left
        tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    x = student.norm_pre(torch.cat([x[:, :1], tokens], dim=1))
    return student.forward_head(student.norm(student.blocks(x)))


@torch.no_grad()
def evit_stages(teacher: Any, images: Tensor, blocks: tuple[int, ...], counts: tuple) -> list[Tensor]:
    """EViT's forward to the logits: in each drop block after attention, the patches the class token attends to most."""
    x = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(images)))
    stages = []
    for number, block in enumerate(teacher.blocks):
        if number not in blocks:
            x = block(x)
            continue
        attended, attention = attend(block.attn, block.norm1(x))
        x = x + attended
        kept = attention[:, :, 0, 1:].mean(1).topk(counts[len(stages)], sorted=True).indices
        stages.append(kept)
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))], dim=1)
        x = x + block.mlp(block.norm2(x))
    teacher.forward_head(teacher.norm(x))  # nobody reads the logits; the paper's code makes them
    return stages


def attend(attn: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """timm's attention written out, since its softmax is wanted: output [B, T, D], and [B, h, T, T]."""
    b, t, d = x.shape
    query, key, value = attn.qkv(x).reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    attention = (query * attn.scale @ key.transpose(-2, -1)).softmax(-1)
    return attn.proj((attention @ value).transpose(1, 2).reshape(b, t, d)), attention
