"""Selector models: built by timm, weights from timm's pretrained tag or from a file."""

import argparse
import hashlib
import os
from typing import Any

import torch

from shards.errors import TicketSetError

Model = Any  # a timm VisionTransformer; torch would type each of its attributes Tensor | Module
ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
}


def timm_name(name: str) -> str:
    """deit_tiny|small|base stand for timm's models of 224 px and patch 16."""
    return ALIASES.get(name, name)


def patch_size_of(name: str) -> int:
    """Patch side in pixels of a timm ViT, without building its weights.

    Raises:
        TicketSetError: timm has no such model, or it is no VisionTransformer with a square patch.
    """
    with torch.device("meta"):
        model = _create(name, num_classes=0)
    return square_patch(model)


def build_vit(name: str, grid: tuple[int, int], weights: str | None = None) -> Model:
    """A timm ViT without head whose patch grid is `grid`, with trained weights, in eval mode.

    Position embeddings are resampled by timm where the weights come from another grid.

    Args:
        name: timm model, or an alias.
        grid: (gh, gw); the model's input is then (gh * patch, gw * patch) pixels.
        weights: .safetensors or .pth; None takes timm's pretrained weights of this model.
    Raises:
        TicketSetError: no such model, weights that cannot be had, or that do not fit it.
    """
    patch = patch_size_of(name)
    size = (grid[0] * patch, grid[1] * patch)
    if weights is None:
        model = _create(name, num_classes=0, img_size=size, pretrained=True)
    else:
        model = _create(name, num_classes=0, img_size=size)
        load_weights(model, weights)
    return model.eval().requires_grad_(False)


def load_weights(model: Model, path: str, flag: str = "--weights") -> list[str]:
    """Load a checkpoint file into a timm ViT; a classifier that the model lacks, or has for other classes, is left out.

    Nothing in the file is run: safetensors, or torch.load with weights_only and argparse.Namespace as
    the one further class, which DeiT-style checkpoints hold. `state_dict_ema`, `model_ema`,
    `state_dict` and `model` are looked into in this order, as timm does.

    Returns:
        Names of the model's tensors that the file does not set: parts of its classifier.
    Raises:
        TicketSetError: not a checkpoint, or not of this model.
    """
    from timm.models import load_state_dict
    from timm.models.vision_transformer import checkpoint_filter_fn

    if not os.path.isfile(path):
        raise TicketSetError(f"{flag} {path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_state_dict(path, use_ema=True, device="cpu", weights_only=True)
        state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
    except Exception as error:  # pickle, zip, safetensors and shape errors have no common class
        raise TicketSetError(f"{flag} {path}: not a loadable checkpoint: {_first_line(error)}") from None
    own = model.state_dict()
    # A classifier for other classes: the model keeps its own, freshly drawn.
    state = {k: v for k, v in state.items() if not (k.startswith("head") and k in own and own[k].shape != v.shape)}
    extra = [k for k in state if k not in own and not k.startswith(("head", "fc_norm", "pre_logits"))]
    missing = [k for k in own if k not in state and not k.startswith("head")]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if extra or missing or wrong:
        example = (wrong or missing or extra)[0]
        detail = f"{example} {list(own[example].shape)}, got {list(state[example].shape)}" if wrong else example
        raise TicketSetError(
            f"{flag} {path}: do not fit {type(model).__name__} of depth {len(model.blocks)}, width {model.embed_dim}:"
            f" {len(missing)} tensors missing, {len(extra)} unknown, {len(wrong)} of another shape"
            f" (first: expected {detail})"
        )
    model.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}}, strict=True)
    return [k for k in own if k not in state]


def state_hash(model: Model) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of a state dict: what the selector really computes with."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> Model:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    full_name = timm_name(name)
    if not timm.is_model(full_name):
        import difflib

        near = difflib.get_close_matches(name, [*ALIASES, *timm.list_models(module="vision_transformer")], 3)
        near_text = f"; near: {', '.join(near)}" if near else ""
        raise TicketSetError(f"--selector {name}: expected a timm model or one of {', '.join(ALIASES)}{near_text}")
    try:
        model = timm.create_model(full_name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise TicketSetError(f"--selector {name}: timm cannot build it: {_first_line(error)}") from None
        raise TicketSetError(
            f"--selector {name}: no pretrained weights here ({type(error).__name__}). Give a file with --weights FILE"
            f" (.safetensors or .pth), or, where there is a network, run once:"
            f" python -c \"import timm; timm.create_model('{full_name}', pretrained=True)\""
        ) from None
    if not isinstance(model, VisionTransformer):
        raise TicketSetError(f"--selector {name}: expected a timm VisionTransformer, got {type(model).__name__}")
    return model


def square_patch(model: Model) -> int:
    """Side of a ViT's patch in pixels.

    Raises:
        TicketSetError: its patches are no squares.
    """
    height, width = model.patch_embed.patch_size
    if height != width:
        raise TicketSetError(f"selector {type(model).__name__}: expected square patches, got {height}x{width}")
    return height


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
