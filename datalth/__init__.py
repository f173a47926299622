"""Mine once, train many: every public name of shards, miner and trainer, behind one door.

    import datalth

    tickets = datalth.TicketSet.open("shards")

A name is imported when it is first asked for, so that `import datalth` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miner.selectors import create_selector, register_method
    from shards.images import render_view
    from shards.reader import TicketSet
    from shards.sample import Sample
    from trainer.data.dataset import TicketDataset
    from trainer.families.vit import TicketViT
    from trainer.trainer import Trainer
    from trainer.verdict.report import verdict

__version__ = "0.1.0"
__all__ = [
    "Sample",
    "TicketDataset",
    "TicketSet",
    "TicketViT",
    "Trainer",
    "create_selector",
    "register_method",
    "render_view",
    "verdict",
]
# The same imports again, for when the program runs: those above are for editors and type checkers alone.
_HOMES = {
    "Sample": "shards.sample",
    "TicketDataset": "trainer.data.dataset",
    "TicketSet": "shards.reader",
    "TicketViT": "trainer.families.vit",
    "Trainer": "trainer.trainer",
    "create_selector": "miner.selectors",
    "register_method": "miner.selectors",
    "render_view": "shards.images",
    "verdict": "trainer.verdict.report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'datalth' has no attribute {name!r}")
    found = globals()[name] = getattr(
        import_module(_HOMES[name]), name
    )  # asked for once: Python finds it there next time
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
