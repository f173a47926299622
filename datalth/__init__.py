"""Mine once, train many: every public name of shards, miner and trainer, behind one door.

    import datalth

    tickets = datalth.TicketSet.open("shards")

A name is imported when it is first asked for, so that `import datalth` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.selectors import create_selector, register_method
    from shards.copies import TarCopies
    from shards.images import render_view
    from shards.reader import TicketSet
    from shards.sample import Sample
    from trainer.data.dataset import TicketDataset, ValidationDataset
    from trainer.families.patches import normalize
    from trainer.families.vit import TicketViT
    from trainer.hooks import Hook
    from trainer.options import Augment, Recipe, Tickets
    from trainer.trainer import Trainer
    from trainer.verdict.report import verdict
    from trainer.weights.subnetwork import Subnetwork
    from trainer.weights.ticket import WeightTicket

__version__ = "0.1.0"
__all__ = [
    "Augment",
    "Hook",
    "Recipe",
    "Sample",
    "Subnetwork",
    "TarCopies",
    "TicketDataset",
    "TicketSet",
    "TicketViT",
    "Tickets",
    "Trainer",
    "ValidationDataset",
    "WeightTicket",
    "create_selector",
    "normalize",
    "register_method",
    "render_view",
    "verdict",
]
# The same imports again, for when the program runs: those above are for editors and type checkers alone.
_HOMES = {
    "Augment": "trainer.options",
    "Hook": "trainer.hooks",
    "Recipe": "trainer.options",
    "Sample": "shards.sample",
    "Subnetwork": "trainer.weights.subnetwork",
    "TarCopies": "shards.copies",
    "TicketDataset": "trainer.data.dataset",
    "TicketSet": "shards.reader",
    "TicketViT": "trainer.families.vit",
    "Tickets": "trainer.options",
    "Trainer": "trainer.trainer",
    "ValidationDataset": "trainer.data.dataset",
    "WeightTicket": "trainer.weights.ticket",
    "create_selector": "miner.selectors",
    "normalize": "trainer.families.patches",
    "register_method": "miner.selectors",
    "render_view": "shards.images",
    "verdict": "trainer.verdict.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datalth' has no attribute {name!r}")
    # Kept: Python finds it there the next time, and does not ask again.
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
