"""A small made-up weight ticket, written as mining writes one."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from trainer.weights import ticket as tickets
from trainer.weights.scores import count_of, sparsity_at
from trainer.weights.ticket import LevelRecord, WeightManifest, WeightPlan, WeightTicket

# Of two blocks of a ViT with D = 8 and two heads; 3 * 11 is no multiple of 8, so that its mask has unused bits.
SHAPES = {
    **{f"blocks.{i}.attn.{name}.weight": shape for i in range(2) for name, shape in (("qkv", (24, 8)), ("proj", (8, 8)))},
    **{f"blocks.{i}.mlp.{name}.weight": shape for i in range(2) for name, shape in (("fc1", (3, 11)), ("fc2", (11, 3)))},
}  # fmt: skip
HEADS = {"blocks.0.attn.qkv.weight": 2, "blocks.1.attn.qkv.weight": 2}


def made_plan(**said: Any) -> WeightPlan:
    """A plan of two levels of imp; `said` replaces fields."""
    usual = {
        "method": "imp", "score_sha256": None, "sparsity": 0.75, "levels": 2, "scope": "global", "rewind_epochs": 0,
        "mining": {}, "prunable": SHAPES, "heads": HEADS, "classes": ["cat", "dog"], "seed": 0,
        "arguments": {"model": "test_vit", "set_id": "ab" * 32, "epochs": 10, "drop_blocks": (1, 2)},
    }  # fmt: skip
    return WeightPlan.of(**{**usual, **said})


def made_start(plan: WeightPlan) -> dict[str, np.ndarray]:
    """Dense start weights, of the head too."""
    random = np.random.default_rng(plan.seed)
    shapes = {**plan.prunable, "head.weight": (2, 8), "head.bias": (2,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def made_masks(plan: WeightPlan) -> list[dict[str, np.ndarray]]:
    """Of levels 1 to L: the first weights of a random order, so that each lies within the one before."""
    order, levels = np.random.default_rng(plan.seed).permutation(plan.total), []
    for level in range(1, plan.levels + 1):
        flat = np.zeros(plan.total, bool)
        flat[order[: count_of(plan.total, sparsity_at(plan.sparsity, plan.levels, level))]] = True
        ends = np.cumsum([np.prod(shape) for shape in plan.prunable.values()])
        parts = np.split(flat, ends[:-1])
        levels.append(
            {name: part.reshape(shape) for (name, shape), part in zip(plan.prunable.items(), parts, strict=True)}
        )
    return levels


def made_ticket(
    folder: Path,
    masks: list[dict[str, np.ndarray]] | None = None,
    start: dict[str, np.ndarray] | None = None,
    **said: Any,
) -> WeightTicket:
    """Write a whole ticket into a new folder and open it; ids, counts and sums are those of what it holds.

    Args:
        folder: to make.
        masks: of levels 1 to L, name -> bool.
        start: name -> weights.
        said: fields of the plan.
    """
    plan = made_plan(**said)
    folder.mkdir(parents=True)
    tickets.write_plan(folder, plan)
    dense = tickets.write_start(folder, save(made_start(plan) if start is None else start))
    levels = [_level(plan, 0, 0.0, plan.total, {}, None, None)]
    for level, kept in enumerate(made_masks(plan) if masks is None else masks, 1):
        file = tickets.write_masks(folder, level, kept)
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        sparsity = sparsity_at(plan.sparsity, plan.levels, level)
        identity = tickets.ticket_identity(file, dense)
        levels.append(_level(plan, level, sparsity, sum(counts.values()), counts, file, identity))
    ids = {"plan_id": plan.plan_id, "group_id": plan.group_id}
    timing = {"seconds": 1.5}
    tickets.write_manifest(
        folder, WeightManifest(format=(1, 0), **ids, start=dense, levels=tuple(levels), timing=timing)
    )
    return WeightTicket.open(folder)


def _level(
    plan: WeightPlan, level: int, sparsity: float, kept: int, counts: dict[str, int], file: Any, identity: str | None
) -> LevelRecord:
    return LevelRecord(
        level=level, sparsity=sparsity, kept=kept, prunable=plan.total, tensors=counts, masks=file, ticket_id=identity,
        results={"tickets": 80.0 - level, "all": 82.0 - level}, updates=100 * level, gmacs=0.25 + 0.75 * kept / plan.total,
        dense_gmacs=1.0,
    )  # fmt: skip
