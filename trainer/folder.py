"""A run on disk: what rank 0 writes while it trains.

args.yaml            the flags, and what they were applied to
classes.txt          class names in the order of the logits
config.json          what plain timm needs beside model_best.safetensors
summary.csv          a row an epoch, as timm's
final.json           the last epoch's figures, and what they cost
predictions.parquet  the last epoch's answer to every validation image
*.pth.tar            see checkpoint.py
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from timm.utils import update_summary

from shards.errors import TicketSetError
from shards.storage import atomic_file, write_atomic
from trainer import checkpoint
from trainer.board import Board
from trainer.engine import State
from trainer.options import FREE_TO_CHANGE, Options

log = logging.getLogger("datalth")
ARGUMENTS, CONFIG = "args.yaml", "config.json"


class RunFolder:
    """The files of one run, written by rank 0; opening a run that is there keeps its args.yaml."""

    def __init__(
        self, path: Path, arguments: dict[str, Any], classes: list[str], board: Board, config: dict[str, Any]
    ) -> None:
        self.path, self._arguments, self._classes, self._board, self._config = path, arguments, classes, board, config
        path.mkdir(parents=True, exist_ok=True)
        if not (path / ARGUMENTS).exists():
            write_atomic(path / ARGUMENTS, yaml.safe_dump(arguments, sort_keys=False).encode())
            write_atomic(path / "classes.txt", "".join(f"{name}\n" for name in classes).encode())

    def save_recovery(self, state: State, ema_is_mature: bool) -> None:
        path = self.path / checkpoint.RECOVERY
        checkpoint.save(path, state, self._arguments, None, self._classes, ema_is_mature)

    def save_epoch(
        self, state: State, metric: float, train_loss: float, cells: dict[str, Any], lr: float, ema_is_mature: bool
    ) -> None:
        """Everything of the epoch before `state.epoch`: best weights, its row, then the checkpoint that goes on."""
        epoch = state.epoch - 1
        if state.best_epoch == epoch:
            checkpoint.save_best(self.path, state, self._arguments, metric, self._classes)
            # After the weights: where they are missing, timm would take another checkpoint of the folder.
            write_atomic(self.path / CONFIG, (json.dumps(self._config, indent=1) + "\n").encode())
        summary = self.path / "summary.csv"
        update_summary(epoch, {"loss": train_loss}, cells, summary, lr=lr, write_header=not summary.exists())
        path = self.path / checkpoint.LAST
        checkpoint.save(path, state, self._arguments, metric, self._classes, ema_is_mature)
        figures = {name: value for name, value in cells.items() if value != ""}
        self._board.write(epoch, {"train_loss": train_loss, "lr": lr, **figures})
        (self.path / checkpoint.RECOVERY).unlink(missing_ok=True)

    def save_final(self, final: dict[str, Any], keys: pa.Array, labels: np.ndarray, answers: dict[str, Any]) -> None:
        """final.json stands for the whole run: it is written last."""
        table = pa.table({"key": keys, "label": labels, **answers})
        with atomic_file(self.path / "predictions.parquet") as file:
            pq.write_table(table, file)
        write_atomic(self.path / "final.json", (json.dumps(final, indent=1) + "\n").encode())


def find(options: Options) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from.

    Raises:
        TicketSetError: there is a run and --resume was not given, or no checkpoint where one was named.
    """
    if options.resume and options.resume != "latest":
        path = Path(options.resume)
        if not path.is_dir():
            return path.parent, path
        if not (found := checkpoint.newest(path)):
            raise TicketSetError(f"--resume {path}: holds no {checkpoint.LAST} or {checkpoint.RECOVERY}")
        return path, found
    if options.resume and not options.experiment:
        raise TicketSetError("--resume latest: name the run with --experiment")
    name = options.experiment or "-".join([time.strftime("%Y%m%d-%H%M%S"), options.model, options.tickets])
    folder = Path(options.output) / name
    if options.resume:
        return folder, checkpoint.newest(folder)
    if folder.exists() and any(folder.iterdir()):
        raise TicketSetError(
            f"{folder}: a run is there already; go on with --resume latest, or name another --experiment"
        )
    return folder, None


def check_arguments(folder: Path, content: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """A run goes on with the arguments that it began with.

    Args:
        content: of its checkpoint; None where it had none yet.
    Raises:
        TicketSetError: others, named.
    """
    if content is not None:
        then = content["args"]
    elif (folder / ARGUMENTS).exists():
        then = yaml.safe_load((folder / ARGUMENTS).read_text(encoding="utf-8"))
    elif folder.exists() and any(folder.iterdir()):
        raise TicketSetError(f"--resume {folder}: expected a run of datalth-train, got a folder without {ARGUMENTS}")
    else:
        return
    then, now = (json.loads(json.dumps(arguments)) for arguments in (then, now))  # tuples are lists in a file
    differing = [name for name in now if name not in FREE_TO_CHANGE and then.get(name) != now[name]]
    if differing:
        raise TicketSetError(
            f"--resume {folder}: trained with other arguments: "
            + "; ".join(f"{name}: {then.get(name)} there, {now[name]} here" for name in differing[:5])
            + f" (-c {folder / ARGUMENTS} gives the run's own)"
        )


def drop_rows(folder: Path, epoch: int) -> None:
    """Take back the rows of epochs that will be trained again: a run may be killed between its row and its checkpoint."""
    summary = folder / "summary.csv"
    if summary.exists():
        lines = summary.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines[1:] if int(line.split(",")[0]) < epoch]
        write_atomic(summary, "".join([*lines[:1], *kept]).encode())
