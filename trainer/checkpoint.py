"""Checkpoints: as timm reads them, weights-only loadable, written whole or not at all.

last.pth.tar           after every epoch
recovery.pth.tar       within an epoch
model_best.pth.tar     the best epoch by the arm's own protocol, raw weights
model_best.safetensors the same weights alone, with the class names
"""

import json
from pathlib import Path
from typing import Any

import torch

from shards.errors import TicketSetError
from shards.storage import atomic_file, write_atomic
from trainer.engine import State

LAST, RECOVERY, BEST, BEST_WEIGHTS = "last.pth.tar", "recovery.pth.tar", "model_best.pth.tar", "model_best.safetensors"


def save(path: Path, state: State, arguments: dict[str, Any], metric: float | None) -> None:
    """Write a checkpoint: plain containers and tensors only, so that weights-only loading takes it."""
    content = {
        "epoch": state.epoch,
        "step": state.step,
        "arch": arguments["model"],
        "state_dict": state.vit.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "amp_scaler": state.scaler.state_dict(),
        "version": 2,
        "args": arguments,
        "metric": metric,
        "loss_sum": state.loss_sum,
        "loss_count": state.loss_count,
        "best": state.best,
        "best_epoch": state.best_epoch,
    }
    if state.ema is not None:
        content["state_dict_ema"] = state.ema.module.state_dict()
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        torch.save(content, file)


def save_best(folder: Path, state: State, arguments: dict[str, Any], metric: float, classes: list[str]) -> None:
    """Write the best weights so far, for timm and as safetensors."""
    from safetensors.torch import save as to_bytes

    # No EMA weights in here: timm's checkpoint_path would take them, and the metric is the raw weights'.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.vit.state_dict().items()}
    content = {"epoch": state.epoch, "arch": arguments["model"], "state_dict": weights, "version": 2}
    _write(folder / BEST, {**content, "args": arguments, "metric": metric})
    metadata = {"format": "pt", "arch": arguments["model"], "classes": json.dumps(classes)}
    write_atomic(folder / BEST_WEIGHTS, to_bytes(weights, metadata))


def latest(folder: Path) -> Path:
    """The checkpoint of a run that is furthest on.

    Raises:
        TicketSetError: there is none.
    """
    found = [path for name in (LAST, RECOVERY) if (path := folder / name).exists()]
    if not found:
        raise TicketSetError(f"--resume: {folder} holds no {LAST} or {RECOVERY}")
    return max(found, key=lambda path: _progress(read(path)))


def _progress(content: dict[str, Any]) -> tuple[int, int]:
    return content["epoch"], content["step"]


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents.

    Raises:
        TicketSetError: not one of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TicketSetError(f"--resume {path}: no such file") from None
    except Exception as error:  # zip and pickle errors have no common class
        raise TicketSetError(f"--resume {path}: not a loadable checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not {"state_dict", "optimizer", "epoch", "step"} <= content.keys():
        raise TicketSetError(f"--resume {path}: expected a checkpoint of datalth-train")
    return content


def restore(content: dict[str, Any], state: State) -> None:
    """Put a checkpoint's contents into a fresh state."""
    state.vit.load_state_dict(content["state_dict"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scaler.load_state_dict(content["amp_scaler"])
    if "state_dict_ema" not in content:  # trained without, and now only evaluated
        state.ema = None
    if state.ema is not None:
        state.ema.module.load_state_dict(content["state_dict_ema"])
    for name in ("epoch", "step", "loss_sum", "loss_count", "best", "best_epoch"):
        setattr(state, name, content[name])
