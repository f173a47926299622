"""Samples a second of one core: our loader against what users would run, from the same JPEGs.

Every leg draws a random-resized crop (0.08 to 1, 3/4 to 4/3, bicubic with antialiasing) and a flip, and gives uint8
batches; nothing is normalized. Ours gives K kept patches and their places, of photos (`ours`: K = 144) or of ranked
views; the others whole 224 px images. All run in the measuring process without workers, so that a core is a core.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import FastCollateMixup, auto_augment, create_dataset, create_loader

from benchmarks.pipelines import PIPELINES, webdataset_batches, write_tars
from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from benchmarks.strangers import Stranger
from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset, loader
from trainer.options import Augment, Tickets

BATCH, SIZE = 64, 224
LAP = 3  # batches: short laps and three times the rounds, since a lap's images are drawn and differ in size
PLAIN = {"aa": "", "color_jitter": 0.0, "reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}
RANKED = {"K = 144": 6.0, "K = 96": 8.0, "K = 48": 10.0, "all patches": 4.0}  # times as fast as timm
DEIT = {"color_jitter": 0.0, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0}


def measure(setting: Setting) -> Part:
    part = Part(notes=["timm at its best: uint8 batches of its prefetching loader, no color jitter"])
    tars = write_tars(setting.pictures, setting.work / "plain")
    legs: dict[str, Leg] = {
        "ours": leg(our_batches(setting.shards), LAP),
        "ours, all patches": leg(our_batches(setting.shards, arm="full", tokens=196), LAP),
        "ours, repeats 3": leg(our_batches(setting.shards, repeats=3), LAP),
        "ours, DeiT": leg(our_batches(setting.shards, **DEIT), LAP),
        **{f"ranked, {name}": leg(batches, LAP) for name, batches in ranked_batches(setting.ranked).items()},
        "timm": leg(timm_batches(setting.pictures), LAP),
        "timm, float32 tensors": leg(timm_batches(setting.pictures, prefetcher=False), LAP),
        "timm, repeats 3": leg(timm_batches(setting.pictures, repeats=3), LAP),
        "timm, DeiT": leg(timm_batches(setting.pictures, deit=True), LAP),
    }
    for name, decode in PIPELINES.items():
        if decode is None:
            part.skip(f"webdataset, {name}", "simplejpeg is not installed")
        else:
            legs[f"webdataset, {name}"] = leg(webdataset_batches(tars, decode, BATCH), LAP)
    strangers = []
    for name in ("litdata", "streaming"):
        if setting.peers is None:
            part.skip(name, "no --peers PYTHON (DATALTH_PEERS)")
        else:
            stranger = Stranger(setting.peers, name, setting.pictures, setting.work / name, BATCH)
            strangers.append(stranger)
            part.notes.append(stranger.versions)
            legs[f"{name}, PIL"] = lambda stranger=stranger: stranger.lap(LAP)
    try:
        part.laps = turns(legs, 3 * setting.rounds)
    finally:
        for stranger in strangers:
            stranger.close()
        torch.distributed.destroy_process_group()
    part.rows = rows(part)
    return part


def rows(part: Part) -> list[Row]:
    def row(ours: str, theirs: str, wanted: float | None, note: str = "") -> Row:
        wall, cpu = speedup(part.laps[ours], part.laps[theirs])
        return Row(f"loader, {ours}", theirs, wall, cpu, wanted and (">=", wanted), note=note)

    peers = [name for name in part.laps if name.endswith("PIL")]
    best = max(peers, key=lambda name: sum(lap.units / lap.cpu for lap in part.laps[name]))
    found = [row("ours", "timm", 2.2)]
    found += [row("ours", name, 1.3 if name == best else None) for name in part.laps if "," in name and name in peers]
    found += [row("ours", name, None) for name in part.laps if name.startswith("webdataset, uint8")]
    found += [row("ours", "timm, float32 tensors", None), row("ours, all patches", "timm", None)]
    found += [row("ours, repeats 3", "timm, repeats 3", 4.2)]
    note = "drawn geometric operations leave our views as they are; timm's are carried out"
    found.append(row("ours, DeiT", "timm, DeiT", 1.5, note))
    found += [row(f"ranked, {name}", "timm", wanted) for name, wanted in RANKED.items()]
    found += [row("ranked, random K = 144", "timm", None), row("ranked, K = 144", "ours", None)]
    found += [row("ranked, repeats 3", "ranked, K = 144", 1.0), row("ranked, repeats 3", "timm, repeats 3", None)]
    found.append(row("ranked, DeiT", "timm, DeiT", 3.0, note))
    return [*found, row("ranked, DeiT mixed by patches", "timm, DeiT", None, note)]


def leg(batches: Iterator[int], count: int) -> Leg:
    """Draws the next `count` batches of an endless iterator; the unit is a sample."""
    return lambda: float(sum(next(batches) for _ in range(count)))


def endless(make: Any) -> Iterator[int]:
    """Samples of every batch, epoch after epoch; `make(epoch)` gives an epoch's batches of full size."""
    epoch = 0
    while True:
        yield from make(epoch)
        epoch += 1


def our_batches(shards: Path, arm: Any = "winning", tokens: int = 144, repeats: int = 1, **augment: Any) -> Iterator:
    dataset = TicketDataset(
        TicketSet.open(str(shards)),
        tickets=Tickets(arm, tokens=tokens, repeats=repeats),
        augment=Augment(**{**PLAIN, **augment}),
        batch_size=BATCH,
        seed=0,
    )

    def make(epoch: int) -> Iterable[int]:
        batches = loader(dataset, dataset.places(epoch), 0, torch.device("cpu"))
        return (len(batch["patches"]) for batch in batches)

    return endless(make)


def ranked_batches(shards: Path) -> dict[str, Iterator]:
    """Of a set of ranked views, by name."""
    found = {f"K = {tokens}": our_batches(shards, tokens=tokens) for tokens in (144, 96, 48)}
    found["all patches"] = our_batches(shards, arm="full", tokens=196)
    found["random K = 144"] = our_batches(shards, arm="random")
    found["repeats 3"] = our_batches(shards, repeats=3)
    found["DeiT"] = our_batches(shards, **DEIT)
    found["DeiT mixed by patches"] = our_batches(shards, **DEIT, mixing="patches")
    return found


def timm_batches(folder: Path, repeats: int = 0, deit: bool = False, prefetcher: bool = True) -> Iterator:
    """timm's own loader: uint8 images as they leave it for the device, before its prefetcher normalizes them.

    Without the prefetcher it gives normalized float32 tensors.
    """
    if repeats:
        start_group()
    mend_posterize()
    mixing = FastCollateMixup(DEIT["mixup"], DEIT["cutmix"], num_classes=1000, label_smoothing=0.1) if deit else None
    made: Any = create_loader(
        create_dataset("", root=str(folder), is_training=True), SIZE, BATCH, is_training=True, interpolation="bicubic",
        color_jitter=0.0, auto_augment=DEIT["aa"] if deit else None, collate_fn=mixing, num_workers=0,
        num_aug_repeats=repeats, distributed=bool(repeats), persistent_workers=False, device=torch.device("cpu"),
        use_prefetcher=prefetcher,
    )  # fmt: skip
    made = made.loader if prefetcher else made
    return endless(lambda epoch: (len(images) for images, _ in made))


def mend_posterize() -> None:
    """timm draws 0 bits now and then, which Pillow 13 refuses."""
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **_: auto_augment.posterize(
        image, max(1, bits)
    )


def start_group() -> None:
    """timm's repeated augmentation asks how many processes there are."""
    if not torch.distributed.is_initialized():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)
