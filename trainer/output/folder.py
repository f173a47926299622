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
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from shards.errors import TicketSetError
from shards.storage import atomic_file, write_atomic
from trainer.config import read_yaml
from trainer.engine import State
from trainer.options import FREE_TO_CHANGE, Options
from trainer.output import checkpoint
from trainer.output.board import Board
from trainer.output.claim import TAKEN, Claim

log = logging.getLogger("datalth")
ARGUMENTS, CLASSES, CONFIG = "args.yaml", "classes.txt", "config.json"
TEMPORARY = re.compile(
    r"(config\.json|args\.yaml|classes\.txt|summary\.csv|final\.json|predictions\.parquet|\w+\.pth\.tar|model_best\.\w[\w.]*)\.\d+-[0-9a-f]{6}\.tmp"
)


class RunFolder:
    """The files of one run, written by rank 0; opening a run that is there keeps its args.yaml.

    Args:
        path: the run's alone, see `Claim`.
        epoch: that is trained next.
        config: timm's, for config.json.
    """

    def __init__(
        self,
        path: Path,
        arguments: dict[str, Any],
        classes: list[str],
        board: Board,
        epoch: int,
        config: dict[str, Any],
    ) -> None:
        self.path, self._arguments, self._classes, self._board, self._config = path, arguments, classes, board, config
        _remove_temporaries(path)
        files = {
            CLASSES: "".join(f"{name}\n" for name in classes),
            ARGUMENTS: yaml.safe_dump(arguments, sort_keys=False),
        }
        for name, text in files.items():  # a folder with args.yaml is a run: it comes last
            if not (path / name).exists():
                write_atomic(path / name, text.encode())
        self._summary = Summary(path / "summary.csv", epoch)

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
        evaluated = {f"eval_{name}": value for name, value in cells.items()}
        self._summary.add({"epoch": epoch, "train_loss": train_loss, **evaluated, "lr": lr})
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


class Summary:
    """summary.csv, a row an epoch, written whole each time: a full disk or a crash leaves the last good one."""

    def __init__(self, path: Path, epoch: int) -> None:
        """Rows of epochs that will be trained again are taken back: a run may be killed between its row and its checkpoint.

        What is no row of the file's own columns, as the tail may be after a crash, is left out and said.
        """
        self._path = path
        if not path.exists():
            self._head, self._rows = "", []
            return
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        self._head = lines[0] if lines and lines[0].startswith("epoch,") else ""
        # Where the head is lost, the next row brings it back.
        width = (self._head or max(lines, key=len, default="")).count(",")
        sound = (line for line in lines if line.isprintable() and line.count(",") == width)
        good = {int(number): line for line in sound if (number := line.partition(",")[0]).isdecimal()}
        self._rows = [good[number] for number in range(epoch) if number in good]
        if len(self._rows) < epoch:
            missing = ", ".join(str(number) for number in range(epoch) if number not in good)
            log.warning(f"{path}: no readable row of epoch {missing}")
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        self._head = self._head or ",".join(row)
        self._rows.append(",".join(map(str, row.values())))
        self._write()

    def _write(self) -> None:
        lines = [self._head, *self._rows] if self._head or self._rows else []
        write_atomic(self._path, "".join(f"{line}\n" for line in lines).encode())


def _remove_temporaries(folder: Path) -> None:
    """What a killed run was writing; the folder is this run's alone."""
    for path in folder.glob("*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_begun(folder: Path) -> bool:
    """Whether a folder holds more than a run leaves that is killed before its args.yaml."""
    return any(path.name != CLASSES and not TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def find(options: Options, claim: Claim | None = None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from.

    Args:
        claim: takes the folder, where it is there, before anything in it is looked at.
    Raises:
        TicketSetError: there is a run and --resume was not given, or it is under way, or there is no checkpoint where
            one was named.
    """
    folder, named = _place(options)
    if claim is not None and folder.is_dir() and (options.resume or options.experiment):
        claim.hold(folder)
    if named is not None:
        return folder, named
    if options.resume:
        found = checkpoint.newest(folder)
        if options.resume != "latest" and not found:
            raise TicketSetError(f"--resume {folder}: holds no {checkpoint.LAST} or {checkpoint.RECOVERY}")
        return folder, found
    if options.experiment and folder.exists() and _is_begun(folder):
        raise TicketSetError(f"{folder}: {TAKEN}")
    return folder, None


def _place(options: Options) -> tuple[Path, Path | None]:
    """The run's folder, and a checkpoint that was named."""
    if options.resume and options.resume != "latest":
        path = Path(options.resume)
        return (path, None) if path.is_dir() else (path.parent, path)
    if options.resume and not options.experiment:
        raise TicketSetError("--resume latest: name the run with --experiment")
    name = options.experiment or "-".join([time.strftime("%Y%m%d-%H%M%S"), options.model, options.tickets])
    return Path(options.output) / name, None


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
        then = read_yaml(folder / ARGUMENTS)
        if not then:
            raise TicketSetError(f"{folder / ARGUMENTS}: expected the arguments of a run, got none")
    elif folder.exists() and _is_begun(folder):
        raise TicketSetError(f"--resume {folder}: expected a run of datalth-train, got a folder without {ARGUMENTS}")
    else:
        return
    then, now = (
        json.loads(json.dumps(arguments, default=str)) for arguments in (then, now)
    )  # tuples are lists in a file
    differing = [name for name in now if name not in FREE_TO_CHANGE and then.get(name) != now[name]]
    if differing:
        raise TicketSetError(
            f"--resume {folder}: trained with other arguments: "
            + "; ".join(f"{name}: {then.get(name)} there, {now[name]} here" for name in differing[:5])
            + f" (-c {folder / ARGUMENTS} gives the run's own)"
        )
