"""Which models can take tickets, and what a ticket becomes for each: the registry. A family is a file and a line here."""

import re
from typing import Any, NamedTuple

from torch import nn

from shards.errors import TicketSetError
from trainer.ticket_hiera import TicketHiera
from trainer.ticket_lvvit import TicketLVViT  # registers its models with timm
from trainer.ticket_model import TicketModel
from trainer.ticket_swin import TicketSwin, packed_side
from trainer.ticket_vit import TicketViT
from trainer.ticket_zero import TicketZero


class Family(NamedTuple):
    """Models of one kind.

    Attributes:
        name: for people.
        timm_class: name of timm's class, or of one that the model's class derives from.
        feeds: names of --feed; the first is the default.
    """

    name: str
    timm_class: str
    feeds: tuple[str, ...]


FAMILIES = (
    Family("LV-ViT", "LVViT", ("late", "early")),
    Family("ViT (DeiT, DeiT-III, CLIP, SigLIP, ...)", "VisionTransformer", ("tokens",)),
    Family("Eva (rotary positions)", "Eva", ("tokens",)),
    Family("Swin", "SwinTransformer", ("small-dense", "zero")),
    Family("Hiera", "Hiera", ("units",)),
)
CNN = Family("CNNs", "", ("zero",))
FEEDS: dict[str, type[TicketModel]] = {
    "tokens": TicketViT,
    "small-dense": TicketSwin,
    "zero": TicketZero,
    "units": TicketHiera,
    "late": TicketLVViT,
    "early": TicketLVViT,
}


def family_of(model: nn.Module) -> Family:
    """The family that a timm model belongs to.

    Raises:
        TicketSetError: none.
    """
    classes = [kind.__name__ for kind in type(model).__mro__]
    for family in FAMILIES:
        if family.timm_class in classes:
            return family
    parts = " ".join(type(part).__name__ for part in model.modules())
    if "Conv2d" in parts and not re.search("Att|XCA|Mixer|Vision", parts):
        return CNN
    known = "; ".join(f"{family.name}: {', '.join(family.feeds)}" for family in (*FAMILIES, CNN))
    raise TicketSetError(f"model {type(model).__name__}: cannot take tickets. What can, and its --feed: {known}")


def feed_of(model: nn.Module, wanted: str | None) -> str:
    """The --feed of a model: the wanted one, or its family's first.

    Raises:
        TicketSetError: the family has no such feed.
    """
    family = family_of(model)
    if wanted is not None and wanted not in family.feeds:
        raise TicketSetError(f"--feed {wanted}: {family.name} take {', '.join(family.feeds)}")
    return wanted or family.feeds[0]


def whole_side(feed: str, tokens: int, img_size: int, patch_size: int) -> int:
    """Pixels of the whole views that a model of this feed takes, for tickets of K tokens cut from img_size pixels."""
    if feed == "small-dense":
        return packed_side(tokens, (img_size // patch_size) ** 2) * patch_size
    return img_size


def size_arguments(model: nn.Module, side: int) -> dict[str, Any]:
    """What timm.create_model needs to be told of the images' size; nothing for models of any size."""
    return {} if family_of(model) is CNN else {"img_size": side}


def wrap(feed: str, model: Any, grid: tuple[int, int], patch_size: int, side: int) -> TicketModel:
    """A timm model that takes tickets of (gh, gw) patches, and whole views of `side` pixels.

    Raises:
        TicketSetError: it cannot take these.
    """
    if feed == "tokens":
        return TicketViT(model)
    if FEEDS[feed] is TicketLVViT:
        return TicketLVViT(model, feed)
    return FEEDS[feed](model, grid, patch_size, side)  # type: ignore[call-arg]
