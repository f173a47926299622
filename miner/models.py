"""Models of selectors and token labels: built by timm, weights from timm's pretrained tag or from a file."""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data.config import resolve_model_data_config

from shards.errors import TicketSetError, first_line
from shards.ranks import local_rank

T = TypeVar("T")
Model = Any  # a timm model; torch would type each of its attributes Tensor | Module
ALIASES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "dinov2": "vit_small_patch14_dinov2",
}
WEIGHTS = {"selector": "weights", "token_labels": "token_label_weights", "model": "initial_checkpoint"}  # fields


def choose_device(name: str | None = None, kinds: tuple[str, ...] = ()) -> torch.device:
    """The device to compute on.

    Args:
        name: as torch spells it; `cuda` is the GPU of this rank. None: the best there is.
        kinds: cuda, mps, cpu: the only ones that will do. Empty: whatever torch has.
    Raises:
        TicketSetError: it is not there, or of another kind.
    """
    try:
        if name is None:
            there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
            name = next(kind for kind, found in there.items() if found and (not kinds or kind in kinds))
        device = torch.device(name)
        if kinds and device.type not in kinds:
            raise RuntimeError(f"expected {' or '.join(kinds)}")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank())
        torch.empty(0, device=device)  # is it there?
    except (RuntimeError, AssertionError) as error:
        raise TicketSetError(f"`device` {name}: {first_line(error)}") from None
    return device


def timm_name(name: str) -> str:
    """deit_tiny|small|base stand for timm's models of 224 px and patch 16, dinov2 for its smallest DINOv2."""
    return ALIASES.get(name, name)


def patch_size_of(name: str) -> int:
    """Patch side in pixels of a timm ViT, without building its weights.

    Raises:
        TicketSetError: timm has no such model, or it is no VisionTransformer or Eva with a square patch.
    """
    return square_patch(meta_model(lambda: _create_vit(name, num_classes=0)))


def meta_model(build: Callable[[], T]) -> T:
    """A model for its shapes alone: on the meta device, without storage; where timm cannot (1.0.15), a real one."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TicketSetError):
        return build()


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
        model = _create_vit(name, num_classes=0, img_size=size, pretrained=True)
    else:
        model = _create_vit(name, num_classes=0, img_size=size)
        load_weights(model, weights)
    return model.eval().requires_grad_(False)


def build_classifier(
    name: str, side: int, classes: Sequence[str], weights: str | None = None, size: int | None = None
) -> tuple[Model, int]:
    """A timm classifier with trained weights, in eval mode, and the input that it should be given.

    Args:
        name: timm model, or an alias.
        side: places wanted along each side of its final feature map.
        classes: that it must have; where the weights' file names its own, its answers come in this order.
        weights: .safetensors or .pth; None takes timm's pretrained weights of this model.
        size: side in pixels of the square input; None: that at which the model's stride gives `side` places.
    Returns:
        The model, and the side in pixels of its input.
    Raises:
        TicketSetError: no such model, weights that cannot be had or do not fit it, or other classes.
    """
    field, weights_field = "token_labels", "token_label_weights"
    meta = meta_model(lambda: create(name, field))
    try:
        size = size or side * meta.feature_info[-1]["reduction"]
    except (AttributeError, LookupError, TypeError):
        raise TicketSetError(
            f"`{field}` {name}: expected a model whose stride timm knows, got {type(meta).__name__}"
        ) from None
    fixed: dict[str, Any] = {"img_size": size} if meta.pretrained_cfg.get("fixed_input_size") else {}
    if weights is None:
        model = create(name, field, pretrained=True, **fixed)
        _check_classes(f"`{field}` {name}", len(classes), model.num_classes)
    else:
        model = create(name, field, num_classes=len(classes), **fixed)
        state = read_weights(model, weights, weights_field)
        classifier = state.get(f"{_classifiers(model)[0]}.weight", ())
        _check_classes(f"`{weights_field}` {weights}", len(classes), len(classifier))
        if (theirs := class_names(weights)) is not None:
            if sorted(theirs) != sorted(classes):
                raise TicketSetError(
                    f"`{weights_field}` {weights}: expected a classifier of the set's classes (from {min(classes)}),"
                    f" got one of others (from {min(theirs, default='')})"
                )
            state = in_class_order(model, state, theirs, classes)
        fresh = _fit(model, state, f"`{weights_field}` {weights}")
        if fresh:
            raise TicketSetError(f"`{weights_field}` {weights}: expected a whole classifier, found none of {fresh[0]}")
    return model.eval().requires_grad_(False), size


def _check_classes(where: str, expected: int, found: int) -> None:
    if found != expected:
        raise TicketSetError(f"{where}: expected a classifier of the set's {expected} classes, got one of {found}")


def load_weights(model: Model, path: str, field: str = "weights", classes: Sequence[str] | None = None) -> list[str]:
    """Load a checkpoint file into a timm model; a classifier that the model lacks, or has for other classes, is left out.

    Args:
        field: that the path was given by, for errors.
        classes: the model's, in the order of its logits. Where the file names its own (datalth-train's do), the rows of
            its classifier come in this order.
    Returns:
        Names of the model's tensors that the file does not set: parts of its classifier.
    Raises:
        TicketSetError: not a checkpoint, or not of this model.
    """
    state = read_weights(model, path, field)
    if classes is not None and (theirs := class_names(path)) is not None:
        state = in_class_order(model, state, theirs, classes)
    return _fit(model, state, f"`{field}` {path}")


def class_names(path: str) -> list[str] | None:
    """The classes that a checkpoint file of datalth-train names, in the order of its logits; None where it names none.

    The file is one that `read_weights` could read; nothing in it is run.
    """
    if path.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("classes")
        try:
            names = json.loads(text) if text else None
        except (ValueError, RecursionError):
            return None
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True)
        names = content.get("classes") if isinstance(content, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def in_class_order(
    model: Model, state: dict[str, torch.Tensor], theirs: Sequence[str], ours: Sequence[str]
) -> dict[str, torch.Tensor]:
    """A state dict for the classes `ours`, of one whose classifier is for `theirs`.

    The same names in another order: its rows change places. Other names: without a classifier.
    """
    if list(theirs) == list(ours):
        return state
    names = {f"{layer}.{part}" for layer in _classifiers(model) for part in ("weight", "bias")} & state.keys()
    if sorted(theirs) != sorted(ours):
        return {name: tensor for name, tensor in state.items() if name not in names}
    rows = [list(theirs).index(name) for name in ours]
    return state | {name: state[name][rows] for name in names if len(state[name]) == len(rows)}


def read_weights(model: Model, path: str, field: str) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint file, renamed and resampled by timm's own filter for this model.

    Nothing in the file is run: safetensors, or torch.load with weights_only and argparse.Namespace as
    the one further class, which DeiT-style checkpoints hold. `state_dict_ema`, `model_ema`,
    `state_dict` and `model` are looked into in this order, as timm does.

    Raises:
        TicketSetError: not a checkpoint.
    """
    from timm.models import load_state_dict
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    where = f"`{field}` {path}"
    if not os.path.isfile(path):
        raise TicketSetError(f"{where}: {'expected a file, got a folder' if os.path.isdir(path) else 'no such file'}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = load_state_dict(path, use_ema=True, device="cpu", weights_only=True)
        _check_tensors(model, state, where)
        if isinstance(model, VisionTransformer):
            return checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        own_filter = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        return own_filter(state, model) if own_filter else state
    except TicketSetError:
        raise
    except Exception as error:  # pickle, zip, safetensors and shape errors have no common class
        raise TicketSetError(f"{where}: not a loadable checkpoint: {in_our_words(error)}") from None


def in_our_words(error: Exception) -> str:
    """Why a checkpoint cannot be loaded.

    torch's own words on a file that it refuses name flags that are not ours, and advise to run what is in it.
    """
    text = str(error)
    objects = re.search(r"Unsupported globals?: (?:GLOBAL )?([\w., ]+?)(?:\. | was |$)", text)
    if objects:
        name = min(objects[1].split(", "))
        return f"it holds {name}, and nothing but tensors, numbers and text is read; save model.state_dict() alone"
    if "TorchScript" in text:
        return "a TorchScript archive; save model.state_dict() instead"
    if isinstance(error, EOFError):
        return "the file is empty"
    foreign = "weights_only" in text or "inline_container" in text or "PytorchStreamReader" in text
    if foreign or isinstance(error, pickle.UnpicklingError):
        return "no whole file of torch.save; one of safetensors is to be named .safetensors"
    if isinstance(error, AttributeError):
        return "expected a dict of tensors by name"
    return first_line(error)


def _check_tensors(model: Model, state: dict[str, torch.Tensor], where: str) -> None:
    """Refuse what has no tensors, or those of a distilled model for a plain one, which timm's filter would stumble over."""
    odd = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        raise TicketSetError(f"{where}: expected tensors by name, got {type(state[odd]).__name__} {str(odd)[:80]!r}")
    if "dist_token" in state and "dist_token" not in model.state_dict():
        name = getattr(model, "default_cfg", {}).get("architecture", "")
        distilled = name.replace("_patch", "_distilled_patch")
        example = f", like {distilled}" if timm.is_model(distilled) else ""
        raise TicketSetError(f"{where}: weights of a distilled model (they hold dist_token); name that model{example}")


def _fit(model: Model, state: dict[str, torch.Tensor], where: str) -> list[str]:
    """Load a state dict, and name the model's tensors that it does not set."""
    own = model.state_dict()
    heads = ("head", *_classifiers(model))
    # A classifier for other classes: the model keeps its own, freshly drawn.
    state = {k: v for k, v in state.items() if not (k.startswith(heads) and k in own and own[k].shape != v.shape)}
    extra = [k for k in state if k not in own and not k.startswith((*heads, "fc_norm", "pre_logits"))]
    missing = [k for k in own if k not in state and not k.startswith(heads)]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if extra or missing or wrong:
        if wrong:
            first = f"expected {wrong[0]} {list(own[wrong[0]].shape)}, got {list(state[wrong[0]].shape)}"
        else:
            first = f"{missing[0]} is missing" if missing else f"unknown tensor {extra[0][:80]}"
        vit = hasattr(model, "blocks") and hasattr(model, "embed_dim")
        size = f" of depth {len(model.blocks)}, width {model.embed_dim}" if vit else ""
        raise TicketSetError(
            f"{where}: do not fit {type(model).__name__}{size}:"
            f" {len(missing)} tensors missing, {len(extra)} unknown, {len(wrong)} of another shape (first: {first})"
        )
    floating = [k for k in state if k in own and own[k].is_floating_point()]
    integer = next((k for k in floating if not state[k].is_floating_point()), None)
    if integer is not None:
        raise TicketSetError(
            f"{where}: expected {integer} in floating point, got {state[integer].dtype}: weights of a quantized model"
        )
    model.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}}, strict=True)
    return [k for k in own if k not in state]


def _classifiers(model: Model) -> tuple[str, ...]:
    """Names of the model's last layers, as timm's configuration has them."""
    names = model.pretrained_cfg.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def classifier_weights(model: Model) -> frozenset[str]:
    """Names of the weights of the model's last layers."""
    layers = tuple(f"{layer}." for layer in _classifiers(model))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(layers))


def state_hash(model: Model) -> str:
    """sha256 over the sorted (name, dtype, shape, bytes) of a state dict: what the selector really computes with."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Make one line of what torch.compile raises at the first batch: its tracebacks are fifty lines long.

    Raises:
        TicketSetError: the blocks cannot be compiled on this machine.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            raise
        raise TicketSetError(
            f"`torchcompile`: torch cannot compile here ({first_line(error)}); it needs a C++ compiler (g++, or CXX), on a GPU"
            f" triton too; without `torchcompile` it runs as well, slower"
        ) from None


def _create_vit(name: str, pretrained: bool = False, **kwargs: Any) -> Model:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    model = create(name, "selector", pretrained, **kwargs)
    if not isinstance(model, VisionTransformer | Eva):
        raise TicketSetError(f"`selector` {name}: expected a timm VisionTransformer or Eva, got {type(model).__name__}")
    return model


def create(name: str, field: str, pretrained: bool = False, **kwargs: Any) -> Model:
    """timm.create_model, whose every failure is one line about a field: selector, token_labels or model.

    Raises:
        TicketSetError: no such model, arguments that it does not take, or no pretrained weights to be had.
    """
    full_name = timm_name(name)
    run = full_name.removeprefix("local-dir:")
    if run != full_name and not Path(run, "config.json").is_file():
        raise TicketSetError(f"`{field}` {name}: expected the folder of a run with its config.json, found none")
    if run == full_name and not timm.is_model(full_name):
        import difflib

        modules = ("vision_transformer", "eva") if field == "selector" else ("",)
        known = [*ALIASES, *(model for module in modules for model in timm.list_models(module=module))]
        near = difflib.get_close_matches(name, known, 3)
        near_text = f"; near: {', '.join(near)}" if near else ""
        raise TicketSetError(f"`{field}` {name}: expected a timm model or one of {', '.join(ALIASES)}{near_text}")
    try:
        return timm.create_model(full_name, pretrained=pretrained, **kwargs)
    except Exception as error:
        if not pretrained:
            raise TicketSetError(f"`{field}` {name}: timm cannot build it: {first_line(error)}") from None
        raise TicketSetError(
            f"`{field}` {name}: no pretrained weights here ({type(error).__name__}); {_where_to_get(full_name)}, and give it"
            f" with `{WEIGHTS[field]}` FILE"
        ) from None


def _where_to_get(full_name: str) -> str:
    """In words, the file of a model's pretrained weights."""
    config: Any = timm.get_pretrained_cfg(full_name)
    file = config.url if config else None
    if config and config.hf_hub_id:
        file = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{config.hf_hub_filename or 'model.safetensors'}"
    return f"fetch {file} where there is a network" if file else "find a file of them (.safetensors or .pth)"


def mean_and_std(model: Model) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel of the model's input, 0 to 1, as timm knows them."""
    resolve: Any = resolve_model_data_config
    config = resolve(model)
    return tuple(config["mean"]), tuple(config["std"])


def square_patch(model: Model) -> int:
    """Side of a ViT's patch in pixels.

    Raises:
        TicketSetError: its patches are no squares.
    """
    height, width = model.patch_embed.patch_size
    if height != width:
        raise TicketSetError(f"selector {type(model).__name__}: expected square patches, got {height}x{width}")
    return int(height)
