"""What a student costs: multiply-accumulates of one image's forward, in units of 1e9 (GMACs)."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset, ValidationDataset, ticket_size
from trainer.families.base import TicketModel
from trainer.families.dropping import keep_rate_at
from trainer.families.zero import TicketZero
from trainer.options import Dropping, Model, Recipe
from trainer.student import create_model


def gmacs(student: TicketModel, tokens: int) -> float:
    """Of one image's forward on K patches, as torch counts them."""
    return _count(student, tokens)[0]


def sparse_gmacs(student: TicketModel, shares: Mapping[int, float], kept: Mapping[str, np.ndarray]) -> float:
    """GMACs of one image's forward with products of zeros left out: what no kernel here saves.

    Args:
        shares: {K: the share of the images that have it}.
        kept: name of a weight of the timm model -> bool of its shape.
    """
    total = 0.0
    for tokens, share in shares.items():
        dense, macs = _count(student, tokens)
        saved = sum(macs[name] * (1 - mask.mean()) for name, mask in kept.items() if name in macs) / 1e9
        total += share * float(dense - saved)
    return total


def _count(student: TicketModel, tokens: int) -> tuple[float, dict[str, int]]:
    """GMACs, and multiply-accumulates by the weight that they are made with.

    Counted on a copy without storage: of the CPU's attention kernel torch counts nothing.
    """
    try:
        return _counted(copy.deepcopy(student).to("meta"), tokens)
    except NotImplementedError:  # Hiera's mask counts what is there; the plain kernel is counted on a CPU too
        with sdpa_kernel(SDPBackend.MATH):
            return _counted(copy.deepcopy(student).cpu(), tokens)


def _counted(student: TicketModel, tokens: int) -> tuple[float, dict[str, int]]:
    student.eval().requires_grad_(False)
    device = next(student.parameters()).device
    given = student.grid[0] * student.grid[1] if student.wants_all else tokens
    patches = torch.zeros(1, given, 3 * student.patch_size**2, device=device)
    names = {id(weight): name for name, weight in student.model.named_parameters()}
    with FlopCounterMode(display=False) as counter, _Weights() as weights, torch.no_grad():
        student(patches, torch.arange(tokens, device=device)[None])
    macs = {names[key]: count for key, count in weights.macs.items() if key in names}
    return counter.get_total_flops() / 2e9, macs


class _Weights(TorchFunctionMode):
    """Multiply-accumulates by the weight they are made with: of linear layers and convolutions, also where a model calls
    the function with its layer's weight, as timm's attention with separate biases does."""

    def __init__(self) -> None:
        super().__init__()
        self.macs: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.nn.functional.linear, torch.conv2d) and len(args) > 1:
            weight = args[1]
            self.macs[id(weight)] = self.macs.get(id(weight), 0) + out.numel() * weight[0].numel()
        return out


def dense_gmacs(settings: Model, opened: TicketSet, student: TicketModel) -> float:
    """GMACs of the student on whole views of the set's own grid, also where it is trained on smaller ones."""
    side, patch = opened.grid[0] * student.patch_size, student.patch_size
    if student.whole_side != side:
        if "window_size" in settings.model_kwargs:  # Swin's is of the smaller image; timm's own is of the whole
            kept = {name: value for name, value in settings.model_kwargs.items() if name != "window_size"}
            settings = replace(settings, model_kwargs=kept)
        model = create_model(settings, opened, **TicketZero.size_arguments(student.model, side))
        student = TicketZero(model, opened.grid, patch, side)
    return gmacs(student, opened.num_patches)


def mean_gmacs(student: TicketModel, shares: Mapping[int, float]) -> float:
    """GMACs of one image's forward where K varies, by {K: the share of the images that have it}."""
    return sum(share * gmacs(student, tokens) for tokens, share in shares.items())


def training_gmacs(student: TicketModel, dropping: Dropping, epochs: int, shares: Mapping[int, float]) -> float:
    """GMACs of training on tickets; a keep rate that falls is looked at 16 times, and its mean taken."""
    if dropping.drop_blocks is None:
        return mean_gmacs(student, shares)
    first, last = dropping.shrink_start_epoch, dropping.shrink_start_epoch + dropping.shrink_epochs
    points, total = 16 if last else 1, 0.0
    shrinking: Any = copy.copy(student)
    for point in range(points):
        epoch = (point + 0.5) / points * epochs
        shrinking.set_rate(keep_rate_at(epoch, first, last, shrinking.keep_rate))
        total += mean_gmacs(shrinking, shares)
    return total / points


def costs(
    recipe: Recipe,
    opened: TicketSet,
    student: TicketModel,
    dataset: TicketDataset,
    validation: ValidationDataset,
    protocols: Sequence[str],
) -> dict[str, Any]:
    """Tokens, and GMACs of a view's forward: in training as the mean over the epochs, and under each protocol; where K
    varies, as the mean over the views."""
    epochs, unmask_epochs = recipe.optimization.epochs, recipe.tickets.unmask_epochs
    at_k = training_gmacs(student, recipe.dropping, epochs, dataset.token_shares)
    # What `full` too is tested on; a selector's tickets are its own.
    drops = recipe.dropping.drop_blocks is not None
    tested = {dataset.tokens if drops else ticket_size(opened, recipe.tickets): 1.0}
    at_test = mean_gmacs(student.tested(), validation.token_shares or tested)
    whole = gmacs(student.undropped(), (student.whole_side // student.patch_size) ** 2)
    unmasked = unmask_epochs / epochs
    return {
        "tokens": dataset.tokens,
        "patches": opened.num_patches,
        "train_gmacs": (1 - unmasked) * at_k + unmasked * whole,
        "test_gmacs": {name: whole if name == "all" else at_test for name in protocols},
        "dense_gmacs": dense_gmacs(recipe.model, opened, student.undropped()),
    }
