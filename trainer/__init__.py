"""A ticket set -> a trained ViT: only the kept patches, with their own position embeddings, reach the model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.families.vit import TicketViT

__all__ = ["TicketViT"]


def __getattr__(name: str) -> Any:
    """Import torch only when the model is asked for: the verdict answers without it."""
    if name in __all__:
        from trainer.families import vit as ticket_vit

        return getattr(ticket_vit, name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")
