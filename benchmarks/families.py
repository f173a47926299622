"""Seconds of a training step of other families on tickets, against timm's dense step of the same model: what a ticket saves.

At 224 px; K = 144 of 196 patches, 36 of Hiera's 49 units. Each leg has a model and an optimizer of its own.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2

from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from trainer.families.base import soft_cross_entropy
from trainer.families.registry import feed_of
from trainer.student import gmacs

BATCH, CLASSES, SIZE = 4, 1000, 224
STEPS = [  # timm's model, --feed, patch size, K
    ("swin_tiny_patch4_window7_224", "small-dense", 16, 144),
    ("swin_tiny_patch4_window7_224", "zero", 16, 144),
    ("lvvit_s", "late", 16, 144),
    ("lvvit_s", "early", 16, 144),
    ("hiera_tiny_224", "units", 32, 36),
    ("resnet50", "zero", 16, 144),
]


def measure(setting: Setting) -> Part:
    part = Part(notes=[f"batch {BATCH}, float32, AdamW's update included"])
    for name in dict.fromkeys(step[0] for step in STEPS):
        legs: dict[str, Leg] = {"dense": dense(name)}
        fewer = {}
        for _, feed, patch, tokens in (step for step in STEPS if step[0] == name):
            legs[feed], fewer[feed] = lean(name, feed, patch, tokens)
        laps = turns(legs, setting.rounds)
        part.laps |= {f"{name}, {leg}": found for leg, found in laps.items()}
        for _, feed, _, tokens in (step for step in STEPS if step[0] == name):
            what = f"{name} step, {feed}, K = {tokens}: {fewer[feed]:.2f} of its MACs"
            part.rows.append(Row(what, "timm dense", *speedup(laps[feed], laps["dense"])))
    return part


def dense(name: str) -> Leg:
    """timm's own model on whole images."""
    model: Any = timm.create_model(name, num_classes=CLASSES).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    return _step(model, lambda: model(images), soft_cross_entropy)


def lean(name: str, feed: str, patch: int, tokens: int) -> tuple[Leg, float]:
    """The same model on tickets, and its share of the dense model's multiply-accumulates."""
    outline: Any = timm.create_model(name, num_classes=CLASSES)
    _, kind = feed_of(outline, feed)
    side, grid = kind.side_of(tokens, SIZE, patch), (SIZE // patch,) * 2
    model: Any = timm.create_model(name, num_classes=CLASSES, **kind.size_arguments(outline, side))
    student = kind.wrap(model, feed, grid, patch, side).train()
    count = grid[0] * grid[1]
    keep = torch.stack([torch.randperm(count)[:tokens] for _ in range(BATCH)])
    patches = torch.randn(BATCH, count if student.wants_all else tokens, 3 * patch * patch)
    whole = kind.wrap(outline, feed, grid, patch, SIZE)
    share = gmacs(student, tokens) / gmacs(whole, count)
    return _step(model, lambda: student(patches, keep), lambda out, wanted: student.loss(out, wanted, {}, 0.0)), share


def _step(model: Any, forward: Callable[[], Any], loss: Callable[[Any, torch.Tensor], torch.Tensor]) -> Leg:
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    targets = torch.full((BATCH, CLASSES), 1 / CLASSES)

    def step() -> float:
        loss(forward(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        return BATCH

    return step
