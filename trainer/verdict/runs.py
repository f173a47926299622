"""A finished run as its folder says it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from shards.errors import TicketSetError, first_line
from shards.index import read_parquet

PROTOCOLS = ("tickets", "all", "random")
COSTS = ("tokens", "patches", "train_gmacs", "dense_gmacs", "seconds")
TOP1_TOLERANCE = 0.01  # points


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        args: args.yaml.
        top1: {protocol: percent}, raw weights, last epoch.
        cost: final.json's: tokens, patches, train_gmacs, test_gmacs {protocol: GMACs}, dense_gmacs, seconds.
        keys: of the validation images.
        hits: {protocol: bool [images]}, in the order of `keys`.
    """

    folder: Path
    args: dict[str, Any]
    top1: dict[str, float]
    cost: dict[str, Any]
    keys: pa.Array
    hits: dict[str, np.ndarray]

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def arm(self) -> str:
        """What it trained on; full and resized runs see every patch anyway, so unmasking does not change them."""
        if self.args["resize_to_tokens"]:
            return "resized"
        unmasked = self.args["unmask_epochs"] if self.args["tickets"] != "full" else 0
        return self.args["tickets"] + (f" +{unmasked} unmasked" if unmasked else "")

    @property
    def set_id(self) -> str | None:
        """The ticket set; None where its tickets play no part in training: runs of any set of the base are the same."""
        return None if self.arm in ("full", "resized") else self.args["set_id"]


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        TicketSetError: no run's folder, not finished, made by an older datalth-train, or damaged.
    """
    if not (folder / "args.yaml").is_file():
        raise TicketSetError(f"{folder}: not a run's folder: {'no args.yaml' if folder.is_dir() else 'no such folder'}")
    args = _mapping(folder / "args.yaml")
    _expect(folder / "args.yaml", args, ["tickets", "tokens", "resize_to_tokens", "unmask_epochs", "seed", "model"])
    _expect(folder / "args.yaml", args, ["epochs", "set_id", "set_method", "base_set_id", "resolved_tokens"])
    if args.get("drop_blocks"):
        raise TicketSetError(f"{folder}: a ticket selector's run (--drop-blocks), which is of no arm; leave it out")
    if not (folder / "final.json").is_file():
        raise TicketSetError(f"{folder}: not finished: no final.json; datalth-train --resume {folder} goes on")
    path = folder / "final.json"
    final = _mapping(path)
    _expect(path, final, ["epoch", "results", "cost"])
    _expect(path, final["cost"], [*COSTS, "test_gmacs"])
    if final["epoch"] != args["epochs"] - 1:
        raise TicketSetError(f"{path}: expected epoch {args['epochs'] - 1}, the last, got {final['epoch']}")
    needed = ["all"] if args["resize_to_tokens"] else PROTOCOLS
    _expect(path, final["results"], needed)
    for name in needed:
        _expect(path, final["results"][name], ["top1"])
    top1 = {name: float(final["results"][name]["top1"]) for name in needed}
    keys, hits = _read_predictions(folder / "predictions.parquet", top1)
    return Run(folder, args, top1, final["cost"], keys, hits)


def _mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file with names and values."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise TicketSetError(f"{path}: not readable: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise TicketSetError(f"{path}: expected names and values, got {type(value).__name__}")
    return value


def _expect(path: Path, values: Any, names: Sequence[str]) -> None:
    missing = [name for name in names if not isinstance(values, dict) or name not in values]
    if missing:
        raise TicketSetError(f"{path}: no {', '.join(missing)}; made by an older datalth-train, or damaged")


def _read_predictions(path: Path, top1: dict[str, float]) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Keys, and which images were right under each protocol; they must give the accuracies of final.json."""
    if not path.is_file():
        raise TicketSetError(f"{path}: missing; datalth-train writes it when a run finishes")
    table = read_parquet(path.read_bytes(), f"{path}: damaged", ["key", "label", *top1])
    if not len(table):
        raise TicketSetError(f"{path}: damaged: no images")
    labels = table["label"].to_numpy()
    hits = {name: table[name].to_numpy() == labels for name in top1}
    for name, found in hits.items():
        if abs(100 * found.mean() - top1[name]) > TOP1_TOLERANCE:
            raise TicketSetError(
                f"{path}: not this run's: top-1 on {name} is {100 * found.mean():.2f} here, {top1[name]:.2f} in final.json"
            )
    return table["key"].combine_chunks(), hits
