"""A run on disk: what rank 0 writes while it trains.

args.yaml            the flags, and what they were applied to
classes.txt          class names in the order of the logits
config.json          what plain timm needs beside model_best.safetensors, and how photos became views
summary.csv          a row an epoch, as timm's
final.json           the last epoch's figures, and what they cost
predictions.parquet  the last epoch's answer to every validation image
*.pth.tar            see checkpoint.py
"""

import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from torch import Tensor

from shards.errors import TicketSetError
from shards.storage import atomic_file, write_atomic
from trainer.config import read_yaml
from trainer.hooks import Epoch, Hook
from trainer.options import FREE_TO_CHANGE, Output
from trainer.output import checkpoint
from trainer.output.claim import TAKEN, Claim
from trainer.student import timm_config, views_said

if TYPE_CHECKING:
    from trainer.evaluate import Figures
    from trainer.trainer import Trainer

log = logging.getLogger("datalth")
ARGUMENTS, CLASSES, CONFIG = "args.yaml", "classes.txt", "config.json"
TEMPORARY = re.compile(
    r"(config\.json|args\.yaml|classes\.txt|summary\.csv|final\.json|predictions\.parquet|\w+\.pth\.tar|model_best\.\w[\w.]*)\.\d+-[0-9a-f]{6}\.tmp"
)


class RunFolder(Hook):
    """The files of one run, written by rank 0; a run that goes on keeps its args.yaml.

    Args:
        path: of its folder, made where it is missing; one with a run in it only goes on from a checkpoint.
        output: what else args.yaml holds.
        claim: a hold on the folder, where there is one to be made or kept, see `Claim`.
    """

    def __init__(self, path: Path, output: Output | None = None, claim: Claim | None = None) -> None:
        self.path, self._output, self._claim = path, output or Output(), claim
        self._arguments: dict[str, Any] = {}
        self._summary: Summary | None = None  # on rank 0, once it has begun

    def begin(self, trainer: "Trainer") -> None:
        self._arguments = vars(self._output) | trainer.arguments()
        self.path = trainer.rank.on_first(lambda: self._open(trainer))

    def _open(self, trainer: "Trainer") -> Path:
        if self._claim is None:  # a program's; the command has looked before
            if not trainer.own_updates and self.path.is_dir() and _is_begun(self.path):
                raise TicketSetError(
                    f"{self.path}: a run is there already; restore its checkpoint, or name another folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
        elif self._claim.path is None:
            self.path = self._claim.make(self.path, named=bool(self._output.experiment or self._output.resume))
        _remove_temporaries(self.path)
        files = {
            CLASSES: "".join(f"{name}\n" for name in trainer.opened.classes),
            ARGUMENTS: yaml.safe_dump(self._arguments, sort_keys=False),
        }
        for name, text in files.items():  # a folder with args.yaml is a run: it comes last
            if not (self.path / name).exists():
                write_atomic(self.path / name, text.encode())
        first = trainer.subnetwork.first_epoch
        self._summary = Summary(self.path / "summary.csv", range(first, trainer.state.epoch))
        return self.path

    def save(self, trainer: "Trainer") -> None:
        if self._summary is not None:
            checkpoint.save(self.path / checkpoint.RECOVERY, trainer, self._arguments, None)

    def after_epoch(self, trainer: "Trainer", epoch: Epoch) -> None:
        """Best weights, the epoch's row, then the checkpoint that goes on."""
        if self._summary is None:
            return
        if epoch.is_best and epoch.metric is not None:
            checkpoint.save_best(self.path, trainer, self._arguments, epoch.metric, epoch.number)
            # After the weights: where they are missing, timm would take another checkpoint of the folder.
            opened, recipe = trainer.opened, trainer.recipe
            config = timm_config(recipe.model, opened.classes, trainer.student)
            config["views"] = views_said(opened, recipe.tickets, recipe.model, trainer.dataset.lengths)
            write_atomic(self.path / CONFIG, (json.dumps(config, indent=1) + "\n").encode())
        self._summary.add(_row(trainer, epoch))
        checkpoint.save(self.path / checkpoint.LAST, trainer, self._arguments, epoch.metric)
        (self.path / checkpoint.RECOVERY).unlink(missing_ok=True)

    def at_end(self, trainer: "Trainer", results: "Mapping[str, Figures]", answers: Tensor) -> None:
        """What the verdict reads; final.json stands for the whole run: it is written last."""
        if self._summary is None:
            return
        rows, state = trainer.validation.rows, trainer.state
        columns = dict(zip(trainer.protocols, answers.numpy(), strict=False))  # other models' follow
        table = pa.table({"key": rows.keys, "label": rows.labels, **columns})
        with atomic_file(self.path / "predictions.parquet") as file:
            pq.write_table(table, file)
        cost = {**trainer.costs, "seconds": state.seconds}
        final = {"epoch": state.epoch - 1, "results": results, "best": state.best, "cost": cost}
        final |= {"weights": counted} if (counted := trainer.subnetwork.counts(trainer.student.model)) else {}
        write_atomic(self.path / "final.json", (json.dumps(final, indent=1) + "\n").encode())


def _row(trainer: "Trainer", epoch: Epoch) -> dict[str, Any]:
    """summary.csv's cells; EMA's stand empty until its weights have seen enough, random's until the last epoch, all of them
    where the epoch was not tested. `seconds` are those of training so far."""
    prefixes = ["", *(prefix for hook in trainer.hooks for prefix in hook.prefixes)]
    names = [f"{prefix}{protocol}" for prefix in prefixes for protocol in trainer.protocols]
    blank = dict.fromkeys(("top1", "top5", "loss"), "")
    cells = {
        f"eval_{name}_{figure}": {**blank, **epoch.results.get(name, {})}[figure] for name in names for figure in blank
    }
    rates = {"lr": epoch.rates.highest, "lr_lowest": epoch.rates.lowest, "lr_head": epoch.rates.head}
    seconds = round(trainer.state.seconds, 1)
    return {"epoch": epoch.number, "train_loss": epoch.loss, **cells, **rates, "seconds": seconds}


class Summary:
    """summary.csv, a row an epoch, written whole each time: a full disk or a crash leaves the last good one."""

    def __init__(self, path: Path, epochs: range) -> None:
        """Rows of epochs that will be trained again are taken back: a run may be killed between its row and its checkpoint.

        What is no row of the file's own columns, as the tail may be after a crash, is left out and said.

        Args:
            epochs: that are over.
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
        self._rows = [good[number] for number in epochs if number in good]
        if len(self._rows) < len(epochs):
            missing = ", ".join(str(number) for number in epochs if number not in good)
            log.warning(f"{path}: no readable row of epoch {missing}")
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Write an epoch's row; the first gives the file its columns."""
        self._head = self._head or ",".join(row)
        # A run that an older version began has fewer.
        self._rows.append(",".join(str(row.get(name, "")) for name in self._head.split(",")))
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


def find(output: Output, default: str, claim: Claim | None = None) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint to go on from.

    Args:
        output: what was asked for.
        default: the folder's name where none was given, after the time.
        claim: takes the folder, where it is there, before anything in it is looked at.
    Raises:
        TicketSetError: there is a run and `resume` was not given, or it is under way, or there is no checkpoint where
            one was named.
    """
    folder, named = _place(output, default)
    if claim is not None and folder.is_dir() and (output.resume or output.experiment):
        claim.hold(folder)
    if named is not None:
        return folder, named
    if output.resume:
        found = checkpoint.newest(folder)
        if output.resume != "latest" and not found:
            raise TicketSetError(f"`resume` {folder}: holds no {checkpoint.LAST} or {checkpoint.RECOVERY}")
        return folder, found
    if output.experiment and folder.exists() and _is_begun(folder):
        raise TicketSetError(f"{folder}: {TAKEN}")
    return folder, None


def _place(output: Output, default: str) -> tuple[Path, Path | None]:
    """The run's folder, and a checkpoint that was named."""
    if output.resume and output.resume != "latest":
        path = Path(output.resume)
        return (path, None) if path.is_dir() else (path.parent, path)
    if output.resume and not output.experiment:
        raise TicketSetError("`resume` latest: name the run with `experiment`")
    name = output.experiment or f"{time.strftime('%Y%m%d-%H%M%S')}-{default}"
    return Path(output.output) / name, None


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
        raise TicketSetError(f"`resume` {folder}: expected a run of datalth-train, got a folder without {ARGUMENTS}")
    else:
        return
    then, now = (
        json.loads(json.dumps(arguments, default=str)) for arguments in (then, now)
    )  # tuples are lists in a file
    differing = [name for name in now if name not in FREE_TO_CHANGE and then.get(name) != now[name]]
    if differing:
        raise TicketSetError(
            f"`resume` {folder}: trained with other arguments: "
            + "; ".join(f"{name}: {then.get(name)} there, {now[name]} here" for name in differing[:5])
            + f" (-c {folder / ARGUMENTS} gives the run's own)"
        )
