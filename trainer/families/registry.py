"""Which models can take tickets, and what a ticket becomes for each: the registry. A family is a file and a line here."""

from typing import NamedTuple

import torch
from torch import nn

from shards.errors import TicketSetError
from trainer.families.base import TicketModel
from trainer.families.hiera import TicketHiera
from trainer.families.lvvit import TicketLVViT  # registers its models with timm
from trainer.families.swin import TicketSwin
from trainer.families.vit import TicketViT
from trainer.families.zero import TicketZero


class Family(NamedTuple):
    """Models of one kind.

    Attributes:
        name: for people.
        timm_class: name of timm's class, or of one that the model's class derives from.
        feeds: names of `feed`, the first is the default, and what takes tickets for the model there.
    """

    name: str
    timm_class: str
    feeds: dict[str, type[TicketModel]]


FAMILIES = (
    Family("LV-ViT", "LVViT", {"late": TicketLVViT, "early": TicketLVViT}),
    Family("ViT (DeiT, DeiT-III, CLIP, SigLIP, ...)", "VisionTransformer", {"tokens": TicketViT}),
    Family("Eva (rotary positions)", "Eva", {"tokens": TicketViT}),
    Family("Swin", "SwinTransformer", {"small-dense": TicketSwin, "zero": TicketZero}),
    Family("Hiera", "Hiera", {"units": TicketHiera}),
)
CNN = Family("CNNs", "", {"zero": TicketZero})


def family_of(model: nn.Module) -> Family:
    """The family that a timm model belongs to.

    Raises:
        TicketSetError: none.
    """
    classes = [kind.__name__ for kind in type(model).__mro__]
    for family in FAMILIES:
        if family.timm_class in classes:
            return family
    if _keeps_a_map(model):
        return CNN
    known = "; ".join(f"{family.name}: {', '.join(family.feeds)}" for family in (*FAMILIES, CNN))
    raise TicketSetError(f"model {type(model).__name__}: cannot take tickets. What can, and its `feed`: {known}")


def feed_of(model: nn.Module, wanted: str | None) -> tuple[str, type[TicketModel]]:
    """The `feed` of a model and what takes tickets there: the wanted one, or its family's first.

    Raises:
        TicketSetError: no family, or it has no such feed.
    """
    family = family_of(model)
    if wanted is not None and wanted not in family.feeds:
        raise TicketSetError(f"`feed` {wanted}: {family.name} take {', '.join(family.feeds)}")
    name = wanted or next(iter(family.feeds))
    return name, family.feeds[name]


@torch.no_grad()
def _keeps_a_map(model: nn.Module) -> bool:
    """Whether a model's last features are a map, [B, ., ., .], as those of CNNs of every kind; other families' are tokens."""
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    training = model.training
    try:
        device = next(model.parameters()).device
        features = model.eval().forward_features(torch.zeros(1, *size, device=device))  # type: ignore[operator]
    except Exception:  # whatever else it is
        return False
    finally:
        model.train(training)
    return isinstance(features, torch.Tensor) and features.ndim == 4
