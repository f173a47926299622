"""Bytes: of a sample beyond its image, read to train on one ranked view, and of whole sets of ranked views."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.loader import PLAIN
from benchmarks.rounds import Part, Row
from benchmarks.setting import Setting, mine, rank
from shards import format as fmt
from shards import storage
from shards.reader import TicketSet
from shards.schema import SplitStats
from trainer.data.dataset import TicketDataset, loader
from trainer.options import Augment, Tickets

WANTED = ("<=", 6.8)
VIEWS, QUALITIES, IMAGES, BATCH = (4, 8, 16), (85, 90, 95), 50, 10


def measure(setting: Setting) -> Part:
    split = train_split(setting.shards)
    tar = (split.bytes - split.image_bytes) / split.samples / 1000
    index = sum(path.stat().st_size for path in (setting.shards / fmt.INDEX).glob("*.parquet")) / split.samples / 1000
    part = Part(notes=[f"exact, one round; ranked sets: {IMAGES} pictures"])
    part.rows = [
        Row(f"bytes a sample beyond its image, V = {split.views}, in the tar", "", [tar], [], WANTED, "kB"),
        Row("the same, in the index", "", [index], unit="kB"),
    ]
    photo = split.image_bytes / split.samples
    for tokens in (48, 96, 144, 196):
        read = bytes_a_view(setting.ranked, tokens)
        what = f"bytes read a view, ranked, K = {tokens}: {read / 1000:.1f} of {photo / 1000:.1f} kB"
        part.rows.append(Row(what, "its photo", [read / photo]))
    for views in VIEWS:
        part.rows += set_sizes(setting, views)
    return part


def train_split(folder: Path) -> SplitStats:
    return TicketSet.open(str(folder)).manifest.splits["train"]


def bytes_a_view(folder: Path, tokens: int) -> float:
    """What training on winning tickets reads from the tars for one view: rankings and all, and the first patches."""
    tickets = Tickets(tokens=tokens, repeats=1)
    dataset = TicketDataset(TicketSet.open(str(folder)), tickets=tickets, augment=Augment(**PLAIN), batch_size=BATCH)
    kind: Any = type(storage.open_ranges(str(next(folder.glob("*.tar")))))
    plain, read = kind.read, 0

    def counted(ranges: Any, offset: int, size: int) -> bytes:
        nonlocal read
        data: bytes = plain(ranges, offset, size)
        read += len(data)
        return data

    for epoch in range(2):  # the first one opens the tars
        read = 0
        with mock.patch.object(kind, "read", counted):
            views = sum(len(b["labels"]) for b in loader(dataset, dataset.places(epoch), 0, torch.device("cpu")))
    return read / views


def set_sizes(setting: Setting, views: int) -> list[Row]:
    copy = mine(setting.pictures, setting.work / f"copy{views}", "--views", str(views), "--limit", str(IMAGES))
    photos, rows = train_split(copy).image_bytes, []
    for quality in QUALITIES:
        ranked = train_split(rank(copy, setting.work / f"ranked{views}-{quality}", "--quality", str(quality)))
        sizes = f"{ranked.bytes / ranked.samples / 1000:.0f} kB a picture"
        what = f"size of a ranked set, V = {views}, quality {quality}: {sizes}"
        rows.append(Row(what, "its photos", [ranked.bytes / photos]))
    return rows
