"""Token labels: a classifier's head at every place of its final feature map, as ReLabel and LV-ViT make them.

A place's logits are the model's own answer to a feature map that looks everywhere like this place: its pooling over
one place is the place itself, and whatever stands behind it (norm, linear layer) is used as it is. That is exact for
a model whose pooling is the mean, which `build_labeler` tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from miner import models
from shards.errors import TicketSetError, first_line
from shards.schema import LabelerIdentity
from shards.token_labels import MAX_CLASSES, TOP

SIDE = 18  # places, as LV-ViT's maps; a model whose stride does not allow it has others
TOLERANCE = 1e-3  # of the logits' spread


@dataclass(frozen=True, slots=True)
class Labeler:
    """Whole images -> the likeliest classes at every place. Build it with `build_labeler`.

    Attributes:
        name: timm's, of the model.
        model: in eval mode.
        side: G; the map has G x G places.
        input_size: S, pixels.
        mean, std: by which its input is normalized.
        device: where it computes.
        amp: bf16 autocast; probabilities stay float32.
    """

    name: str
    model: models.Model
    side: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device
    amp: bool

    @torch.inference_mode()
    def label(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S], normalized -> probabilities float32 and classes int64, [B, T, G, G], likeliest first.

        Of equal logits the lower class comes first.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = place_logits(self.model, self.model.forward_features(images))
        logits = logits.float()
        order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :TOP]
        shares = logits.softmax(-1).gather(-1, order)
        return shares.movedim(-1, 1), order.movedim(-1, 1)

    def identity(self, batch_size: int) -> LabelerIdentity:
        """What identifies it in the plan; `batch_size`: images a batch."""
        return LabelerIdentity(
            model=self.name,
            state=models.state_hash(self.model),
            input_size=self.input_size,
            grid=(self.side, self.side),
            top=TOP,
            mean=self.mean,
            std=self.std,
            dtype="bfloat16" if self.amp else "float32",
            batch_size=batch_size,
        )


def build_labeler(
    name: str,
    weights: str | None,
    classes: Sequence[str],
    device: str | torch.device,
    amp: bool,
    size: int | None = None,
) -> Labeler:
    """A labeler for a set of these classes.

    Args:
        name: timm model, or an alias.
        weights: .safetensors or .pth; None takes timm's pretrained ones.
        classes: of the set, in the order of their labels.
        device: to compute on.
        amp: bf16 autocast.
        size: pixels a side of its input; None gives SIDE places. A model that was trained at another scale answers
            badly: 576 px of a model of 96 px gave one class everywhere.
    Raises:
        TicketSetError: the set has no classes, the model others, or none of its heads fits a single place.
    """
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise TicketSetError(f"`token_labels` {name}: expected a set of 2 to {MAX_CLASSES} classes, got {len(classes)}")
    model, size = models.build_classifier(name, SIDE, classes, weights, size)
    side = _check_head(model, size, name)
    placed = torch.device(device)
    return Labeler(models.timm_name(name), model.to(placed), side, size, *models.mean_and_std(model), placed, amp)


def place_logits(model: models.Model, features: Tensor) -> Tensor:
    """`forward_features` of B images -> the head's logits at every place, [B, G, G, C]."""
    places = _places(model, features)  # [B, G*G, D]
    batch, count, _ = places.shape
    logits: Tensor = model.forward_head(_as_map(model, features, places.flatten(0, 1)))
    side = round(count**0.5)
    return logits.view(batch, side, side, -1)


def _places(model: models.Model, features: Tensor) -> Tensor:
    """Features of the places alone, in raster order: [B, G*G, D]."""
    if features.ndim == 3:  # [B, T, D]; prefix tokens are no places
        return features[:, getattr(model, "num_prefix_tokens", 0) :]
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return features.flatten(1, 2)
    return features.flatten(2).transpose(1, 2)


def _as_map(model: models.Model, features: Tensor, places: Tensor) -> Tensor:
    """[B, D] -> feature maps of one place each, in the layout of `features`; prefix tokens are zero."""
    if features.ndim == 3:
        prefix = getattr(model, "num_prefix_tokens", 0)
        return torch.nn.functional.pad(places[:, None], (0, 0, prefix, 0))
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        return places[:, None, None]
    return places[:, :, None, None]


@torch.inference_mode()
def _check_head(model: models.Model, size: int, name: str) -> int:
    """The side G of its map; refuses a model whose head does more with a map than to average it.

    The head's answer to a map of noise must be its answer to the map's mean: not so with a class token,
    maximum or attention pooling, or prefix tokens in the mean.
    """
    refusal = f"`token_labels` {name}: expected a classifier with a head over the mean of a square feature map"
    try:
        features = model.forward_features(torch.zeros(1, 3, size, size))
        noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
        answer = model.forward_head(noise)
        mean = model.forward_head(_as_map(model, noise, _places(model, noise).mean(1)))
        side: int = round(_places(model, noise).shape[1] ** 0.5)
        square = _places(model, noise).shape[1] == side**2 and side > 1
        fits = square and (answer - mean).abs().max() <= TOLERANCE * (answer - answer.mean()).abs().max()
    except (RuntimeError, ValueError, AttributeError, TypeError, LookupError, AssertionError) as error:
        raise TicketSetError(f"{refusal}; {type(model).__name__}: {first_line(error)}") from None
    if not fits:
        raise TicketSetError(f"{refusal}, got {type(model).__name__} with {tuple(noise.shape[1:])} features")
    return side
