"""Training feeds at toy size, for the tests of what is in a batch."""

from typing import Any

import torch

from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset
from trainer.data.loader import Batch
from trainer.options import Augment, Tickets, group_of

PLAIN: dict[str, Any] = {"tickets": "winning", "tokens": 6, "repeats": 1, "aa": "", "color_jitter": 0.0, "reprob": 0.0,
                         "mixup": 0.0, "cutmix": 0.0, "batch_size": 8, "seed": 0}  # fmt: skip
RICH = {
    **PLAIN,
    "tickets": "random",
    "repeats": 3,
    "aa": "rand-m9-mstd0.5-inc1",
    "reprob": 0.5,
    "mixup": 0.8,
    "cutmix": 1.0,
}


def dataset(opened: TicketSet, settings: dict[str, Any], **changes: Any) -> TicketDataset:
    """Of the train split; `settings` are of tickets and augmentation, and what else the dataset takes."""
    values = {**settings, **changes}
    tickets, augment = group_of(Tickets, values), group_of(Augment, values)
    rest = {name: value for name, value in values.items() if name not in {**vars(tickets), **vars(augment)}}
    return TicketDataset(opened, "train", tickets=tickets, augment=augment, **rest)


def equal(a: Batch, b: Batch) -> bool:
    assert a.keys() == b.keys()
    return all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
