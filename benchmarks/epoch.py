"""Seconds an epoch, data and all: datalth's loader and step against timm's own, from the same pictures, DeiT's recipe.

timm's side is its training loop written from its factories: the wds/ reader on our shards, its loader with RandAugment,
random erasing, and mixup and CutMix in the collate function; dense. Both on one core, without worker processes, in
float32, with AdamW and EMA; the first epoch's steps are the warm-up round.
"""

from typing import Any

import timm
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from benchmarks.loader import DEIT, mend_posterize
from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from benchmarks.steps import MEAN, SIZE, STD, NoSchedule
from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset, loader
from trainer.engine import Setup, State, apply_update, train_micro_batch
from trainer.families.vit import TicketViT
from trainer.options import Augment, Machine, Optimization, Tickets
from trainer.ranks import Rank

BATCH, TOKENS, STEPS = 32, 144, 4
WANTED = (">=", 1.35)


def measure(setting: Setting) -> Part:
    opened, ranked = (TicketSet.open(str(folder)) for folder in (setting.shards, setting.ranked))
    legs: dict[str, Leg] = {"ours": our_steps(opened, TOKENS), "timm": timm_steps(opened)}
    legs |= {f"ranked, K = {tokens}": our_steps(ranked, tokens) for tokens in (144, 98)}
    note = f"batch {BATCH}, {STEPS} steps a round: an epoch is more of the same"
    part = Part(laps=turns(legs, setting.rounds), notes=[note])
    part.rows = [
        Row("epoch, deit_tiny, r = 0.9, images/s", "timm dense", *speedup(part.laps["ours"], part.laps["timm"]), WANTED)
    ]
    part.rows += [
        Row(
            f"epoch from ranked views, deit_tiny, K = {tokens}, images/s",
            "timm dense",
            *speedup(laps, part.laps["timm"]),
        )
        for tokens in (144, 98)
        for laps in [part.laps[f"ranked, K = {tokens}"]]
    ]
    return part


def build(classes: int) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", drop_path_rate=0.1, num_classes=classes).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-4, weight_decay=0.05)
    return model, optimizer, ModelEmaV3(model, decay=0.99996, use_warmup=True)


def our_steps(opened: TicketSet, tokens: int) -> Leg:
    model, optimizer, ema = build(len(opened.classes))
    tickets = Tickets(tokens=tokens, repeats=1)
    dataset = TicketDataset(opened, tickets=tickets, augment=Augment(**DEIT), batch_size=BATCH, seed=0)
    setup = Setup(Optimization(), Machine(seed=0), Rank(), MEAN, STD, len(opened.classes))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    student = TicketViT(model).train()
    state = State(student, student, optimizer, NoSchedule(), scaler)
    places = [place for epoch in range(1000) for place in dataset.places(epoch)]
    batches = iter(loader(dataset, places, 0, torch.device("cpu")))

    def steps() -> float:
        for number in range(STEPS):
            train_micro_batch(state, next(batches), setup, number, 0)
            apply_update(state, setup, number, after_update=lambda update: ema.update(model, step=update + 1))
        return STEPS * BATCH

    return steps


def timm_steps(opened: TicketSet) -> Leg:
    model, optimizer, ema = build(len(opened.classes))
    mend_posterize()
    dataset = create_dataset(f"wds/{opened.url}", root=opened.url, split="train", is_training=True, batch_size=BATCH)
    made = create_loader(
        dataset, SIZE, BATCH, is_training=True, interpolation="bicubic", color_jitter=0.0, auto_augment=DEIT["aa"],
        re_prob=DEIT["reprob"], re_mode="pixel", mean=MEAN, std=STD, num_workers=0, persistent_workers=False,
        collate_fn=FastCollateMixup(DEIT["mixup"], DEIT["cutmix"], num_classes=len(opened.classes), label_smoothing=0.1),
        device=torch.device("cpu"),
    )  # fmt: skip
    criterion, batches = SoftTargetCrossEntropy(), endless(made)

    def steps() -> float:
        for number in range(STEPS):
            images, targets = next(batches)
            criterion(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, step=number)
        return STEPS * BATCH

    return steps


def endless(batches: Any) -> Any:
    while True:
        yield from batches
