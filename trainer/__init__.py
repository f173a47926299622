"""A ticket set -> a trained ViT: only the kept patches, with their own position embeddings, reach the model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.data.dataset import TicketDataset
    from trainer.families.vit import TicketViT
    from trainer.trainer import Trainer

__all__ = ["TicketDataset", "TicketViT", "Trainer"]
_HOMES = {"TicketDataset": "trainer.data.dataset", "TicketViT": "trainer.families.vit", "Trainer": "trainer.trainer"}


def __getattr__(name: str) -> Any:
    """Import torch only when one of these is asked for: the verdict answers without it."""
    if name in __all__:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
