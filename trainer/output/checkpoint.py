"""Checkpoints: as timm reads them, weights-only loadable, written whole or not at all.

last.pth.tar           after every epoch
recovery.pth.tar       within an epoch, and before its validation
model_best.pth.tar     the best epoch by the arm's own protocol, raw weights
model_best.safetensors the same weights alone, with the class names; beside it its sum, for sha256sum -c
"""

import copy
import hashlib
import json
import logging
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from miner.models import in_class_order, in_our_words, timm_name
from shards.errors import TicketSetError, first_line
from shards.storage import atomic_file, write_atomic
from trainer.hooks import Beside

if TYPE_CHECKING:
    from trainer.trainer import Trainer

log = logging.getLogger("datalth")
LAST, RECOVERY, BEST, BEST_WEIGHTS = "last.pth.tar", "recovery.pth.tar", "model_best.pth.tar", "model_best.safetensors"
WEIGHTS_ALONE = f"holds weights alone; take {LAST}, or start anew from it as `initial_checkpoint`"
COUNTERS = ("epoch", "step", "loss_sum", "loss_count", "seconds", "best", "best_epoch")


def save(path: Path, trainer: "Trainer", arguments: dict[str, Any], metric: float | None) -> None:
    """Write a checkpoint: plain containers and tensors only, so that weights-only loading takes it.

    Hooks add what is theirs, such as the `state_dict_ema` that timm prefers to `state_dict`.
    """
    state = trainer.state
    content = {
        **{name: getattr(state, name) for name in COUNTERS},
        "arch": timm_name(arguments["model"]),
        "state_dict": state.student.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "amp_scaler": state.scaler.state_dict(),
        "version": 2,
        "args": arguments,
        "classes": trainer.opened.classes,
        "metric": metric,
    }
    for hook in trainer.hooks:
        added = hook.on_save(trainer)
        assert not added.keys() & content.keys(), (
            f"{type(hook).__name__} would overwrite {added.keys() & content.keys()}"
        )
        content |= added
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        watched: Any = _Watched(file)
        try:
            torch.save(content, watched)
        except RuntimeError:  # of torch's zip writer, which hides why
            if watched.error is not None:
                raise watched.error from None
            raise


class _Watched:
    """A file that keeps the error of its writing: no space left."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def save_best(folder: Path, trainer: "Trainer", arguments: dict[str, Any], metric: float, epoch: int) -> None:
    """Write the best weights so far, for timm and as safetensors."""
    from safetensors.torch import save as to_bytes

    # No EMA weights in here: timm's checkpoint_path would take them, and the metric is the raw weights'.
    state, classes = trainer.student.model.state_dict(), trainer.opened.classes
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    arch = timm_name(arguments["model"])
    content = {"epoch": epoch + 1, "arch": arch, "state_dict": weights, "version": 2}
    _write(folder / BEST, {**content, "args": arguments, "classes": classes, "metric": metric})
    # One key alone: the order of several would differ from file to file.
    data = to_bytes(weights, {"classes": json.dumps(classes)})
    sums = _sums(folder / BEST_WEIGHTS)
    sums.unlink(missing_ok=True)  # killed in between, the weights have no sum rather than a wrong one
    write_atomic(folder / BEST_WEIGHTS, data)
    write_atomic(sums, f"{hashlib.sha256(data).hexdigest()}  {BEST_WEIGHTS}\n".encode())


def _sums(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def check(path: Path, field: str) -> None:
    """Hold a file against the checksums in it, of a zip's records, and beside it; a file may have none.

    Raises:
        TicketSetError: it is not what was written.
    """
    damaged = f"`{field}` {path}: damaged, not what was written"
    if _sums(path).exists():
        expected = _sums(path).read_bytes()[:64].decode("ascii", "replace")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise TicketSetError(f"{damaged}: expected sha256 {expected[:12]}, got {digest.hexdigest()[:12]}")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.CRC:  # torch can leave them out
                    with archive.open(record) as data:
                        while data.read(1 << 20):
                            pass
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError) as error:
        raise TicketSetError(f"{damaged}: {first_line(error)}") from None


def lying(folder: Path) -> Path | None:
    """The checkpoint that was written last, unread, or None."""
    found = [path for name in (LAST, RECOVERY) if (path := folder / name).exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def newest(folder: Path) -> Path | None:
    """The checkpoint of a run that is furthest on, or None."""
    found = [path for name in (LAST, RECOVERY) if (path := folder / name).exists()]
    return max(found, key=lambda path: _progress(read(path))) if len(found) > 1 else next(iter(found), None)


def _progress(content: dict[str, Any]) -> tuple[int, int]:
    return content.get("epoch", -1), content.get("step", -1)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents.

    Raises:
        TicketSetError: not one of ours, or damaged.
    """
    if path.suffix == ".safetensors":
        raise TicketSetError(f"`resume` {path}: {WEIGHTS_ALONE}")
    try:
        check(path, "resume")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TicketSetError(f"`resume` {path}: no such file") from None
    except TicketSetError:
        raise
    except Exception as error:  # zip and pickle errors have no common class
        raise TicketSetError(f"`resume` {path}: not a loadable checkpoint: {in_our_words(error)}") from None
    kinds = {"state_dict": dict, "args": dict, "classes": list}
    if not isinstance(content, dict) or not all(isinstance(content.get(n), kind) for n, kind in kinds.items()):
        raise TicketSetError(f"`resume` {path}: expected a checkpoint of datalth-train")
    if not all(isinstance(name, str) for name in content["classes"]) or not content["classes"]:
        raise TicketSetError(f"`resume` {path}: expected names of classes in it, got {content['classes'][:3]}")
    return content


def restore_weights(path: Path, content: dict[str, Any], trainer: "Trainer") -> None:
    """Weights alone, for validation on a set of the same classes in whatever order; an average where one is worth it.

    Raises:
        TicketSetError: other classes, or of another size than the set asks for.
    """
    model, theirs, classes = trainer.student.model, content["classes"], trainer.opened.classes
    if sorted(theirs) != sorted(classes):
        raise TicketSetError(
            f"`resume` {path}: trained on other classes ({len(theirs)}, from {min(theirs, default='')})"
            f" than the set's ({len(classes)}, from {min(classes)})"
        )
    try:
        model.load_state_dict(in_class_order(model, content["state_dict"], theirs, classes))
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise TicketSetError(f"`resume` {path}: does not fit this set: {reason}") from None
    average = content.get("state_dict_ema")
    if average is not None:
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(in_class_order(model, average, theirs, classes))
        trainer.hooks.append(Beside("ema_", averaged))


def restore(path: Path, trainer: "Trainer", content: dict[str, Any] | None = None) -> None:
    """Let a trainer that has not begun go on from a checkpoint, exactly.

    Args:
        content: what `read` gave, where it was read before.
    Raises:
        TicketSetError: it is damaged, holds weights alone, as model_best.pth.tar does, or those of another model.
    """
    content = read(path) if content is None else content
    if not {"optimizer", "step"} <= content.keys():
        raise TicketSetError(f"`resume` {path}: {WEIGHTS_ALONE}")
    if any(not isinstance(content.get(name), int) or content[name] < 0 for name in ("epoch", "step")):
        raise TicketSetError(f"`resume` {path}: expected a checkpoint of datalth-train: no epoch and step in it")
    state = trainer.state
    try:
        state.student.model.load_state_dict(content["state_dict"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.scaler.load_state_dict(content["amp_scaler"])
        for name in COUNTERS:
            setattr(state, name, content[name])
        for hook in trainer.hooks:
            hook.on_restore(trainer, content)
        state.scheduler.step_update(trainer.updates)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise TicketSetError(f"`resume` {path}: does not fit this run: {first_line(error)}") from None
    log.info(f"resuming {path}: epoch {state.epoch}, step {state.step}")
