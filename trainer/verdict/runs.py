"""A finished run as its folder says it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shards.checks import Check, fields, integer, number, one_of, or_null, parse_json, rule, text
from shards.errors import TicketSetError, first_line
from shards.index import read_parquet
from trainer.config import read_yaml
from trainer.options import ARMS, PROTOCOLS, WEIGHT_ARMS

TOP1_TOLERANCE = 0.01  # points
MAX_JSON, MAX_PREDICTIONS = 1_000_000, 1_000_000_000  # bytes
MAX_IMAGES = 1 << 22  # rows


def _is_tokens(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"auto:[1-9][0-9]{0,8}", value) is not None
    return type(value) is int and value > 0


COUNT, POSITIVE, AMOUNT, NAME = integer(0, 2**63), integer(1, 2**31), number(0, 1e15), text(200)
TOKENS = rule(_is_tokens, "K or auto:K")
# Of args.yaml and of final.json, what the verdict reads.
ARGUMENTS = fields(
    {
        "tickets": one_of(*ARMS),
        "tokens": or_null(TOKENS),
        "resize_to_tokens": one_of(True, False),
        "unmask_epochs": COUNT,
        "seed": COUNT,
        "model": NAME,
        "epochs": POSITIVE,
        "set_id": NAME,
        "set_method": NAME,
        "base_set_id": NAME,
        "resolved_tokens": POSITIVE,
    }
)
# And what a run with a weight ticket has more.
WEIGHT_ARGUMENTS = fields(
    {
        "weight_ticket_id": NAME,
        "weight_group_id": NAME,
        "weight_method": NAME,
        "weight_from": one_of("first", "rewound", "given", "transformed"),
        "weight_arm": one_of(*WEIGHT_ARMS),
        "weight_sparsity": number(0, 1),
    }
)
WEIGHT_COSTS = {"updates": COUNT, "mining_updates": COUNT, "sparse_gmacs": AMOUNT}
# A removed weight that is not zero makes it another model.
REMOVED = fields({"nonzero_under_mask": integer(0, 0)})


def final_of(names: Sequence[str], ticketed: bool = False) -> Check:
    """final.json of a run that was tested under some protocols; `ticketed`: of one with a weight ticket."""
    costs = {
        "tokens": POSITIVE,
        "patches": POSITIVE,
        "train_gmacs": AMOUNT,
        "dense_gmacs": number(1e-9, 1e15),
        "seconds": AMOUNT,
        "test_gmacs": fields(dict.fromkeys(names, AMOUNT)),
        **(WEIGHT_COSTS if ticketed else {}),
    }
    results = fields(dict.fromkeys(names, fields({"top1": number(0, 100)})))
    cost = fields(costs, {"updates": COUNT})
    return fields({"epoch": COUNT, "results": results, "cost": cost}, {"weights": REMOVED})


@dataclass(frozen=True)
class Weights:
    """What a weight ticket makes of a run, without its seed.

    Attributes:
        arm: of WEIGHT_ARMS.
        method: how the mask was found: "imp", ...; the arm's own name where a mask or the lack of one is the same in all plans.
        sparsity: share of the prunable weights that are removed.
        plan: weight_group_id; None where the plan plays no part.
        mark: the start of `plan` where plans are to be told apart by it, else empty.
        start: where the start weights come from, see `WeightPlan.start`.
    """

    arm: str
    method: str
    sparsity: float
    plan: str | None
    mark: str = ""
    start: str = field(default="first", compare=False)

    @property
    def name(self) -> str:
        """Without the sparsity: "imp winning", "random mask", "dense start" (of a ticket, without its mask)."""
        if self.plan is None:
            return {"random": "random mask", "dense": "dense start"}[self.arm]
        return " ".join(filter(None, [self.method, self.arm, self.mark]))

    @property
    def place(self) -> tuple[Any, ...]:
        """In a table."""
        return self.sparsity, self.plan is None, self.method, self.mark, WEIGHT_ARMS.index(self.arm)


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run.

    Attributes:
        args: args.yaml.
        top1: {protocol: percent}, raw weights, last epoch.
        cost: final.json's: tokens, patches, train_gmacs, test_gmacs {protocol: GMACs}, dense_gmacs, seconds; updates, but
            for older runs; with a weight ticket also mining_updates and sparse_gmacs.
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
        """Of its training."""
        return self.args["seed"]

    @property
    def arm(self) -> str:
        """What it trained on; full runs see every patch anyway, so unmasking does not change them."""
        arm = "resized" if self.args["resize_to_tokens"] else self.args["tickets"]
        unmasked = self.args["unmask_epochs"] if arm != "full" else 0
        varying = " auto" if isinstance(self.args["tokens"], str) and arm != "full" else ""
        return arm + varying + (f" +{unmasked} unmasked" if unmasked else "")

    @property
    def set_id(self) -> str | None:
        """The ticket set; None where its tickets play no part in training: runs of any set of the base are the same."""
        return None if self.arm.split(" +")[0] in ("full", "resized") else self.args["set_id"]

    @property
    def weights(self) -> Weights | None:
        """Its weight ticket's part; None without one."""
        if self.args.get("weight_ticket_id") is None:
            return None
        arm, method = self.args["weight_arm"], self.args["weight_method"]
        sparsity = round(self.args["weight_sparsity"], 6)  # that of a level is a power, an asked one is typed
        if arm == "winning" and method == "random":
            arm = "random"  # the ticket of a random mask is the control itself
        start = self.args["weight_from"]
        if arm in ("random", "dense") and start == "first":  # others are of a start that only their plan has
            return Weights(arm, arm, sparsity, None)
        return Weights(arm, method, sparsity, self.args["weight_group_id"], start=start)


DENSE = Weights("dense", "dense", 0.0, None)  # a weight ticket's start without its mask


class LeftOut(TicketSetError):
    """A folder with nothing wrong, and nothing for the verdict: `output/*` holds runs under way, selectors and other things."""


def read_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        LeftOut: not a run's folder, not finished, or the run of a selector.
        TicketSetError: no such folder, made by an older datalth-train, or damaged.
    """
    path = folder / "args.yaml"
    if not folder.exists():
        raise TicketSetError(f"{folder}: no such folder")
    if not path.exists():
        raise LeftOut(f"{folder}: not a run's folder: no args.yaml")
    if not (folder / "final.json").exists():
        raise LeftOut(f"{folder}: not finished: no final.json; datalth-train --resume {folder} goes on")
    args = read_yaml(path)
    _check(ARGUMENTS, args, path)
    ticketed = args.get("weight_ticket_id") is not None
    if args.get("weight_method") is not None and not ticketed:
        raise LeftOut(f"{folder}: a training by which a weight ticket was mined, which is of no arm")
    if ticketed:
        _check(WEIGHT_ARGUMENTS, args, path)
    try:
        json.dumps(args)  # so that any two values can be compared and shown
    except (TypeError, ValueError, RecursionError) as error:
        raise TicketSetError(f"{path}: expected plain values: {first_line(error)}") from None
    if args.get("drop_blocks"):
        raise LeftOut(f"{folder}: a ticket selector's run (it has drop_blocks), which is of no arm")
    if args["unmask_epochs"] > args["epochs"]:
        raise TicketSetError(
            f"{path}: unmask_epochs: expected at most epochs, {args['epochs']}, got {args['unmask_epochs']}"
        )
    path = folder / "final.json"
    final = parse_json(_read(path, MAX_JSON), str(path))
    names = ["all"] if args["resize_to_tokens"] else PROTOCOLS
    results = final.get("results")
    if isinstance(results, dict) and [*results] == ["tickets"]:  # of ranked views whose last patches were cut off
        names = ["tickets"]
    _check(final_of(names, ticketed), final, path)
    if final["epoch"] != args["epochs"] - 1:
        raise TicketSetError(f"{path}: expected epoch {args['epochs'] - 1}, the last, got {final['epoch']}")
    top1 = {name: float(final["results"][name]["top1"]) for name in names}
    keys, hits = _read_predictions(folder / "predictions.parquet", top1)
    return Run(folder, args, top1, final["cost"], keys, hits)


def _read(path: Path, limit: int) -> bytes:
    """
    Raises:
        TicketSetError: no plain file, or a larger one.
    """
    if not path.is_file():
        found = "something else" if path.exists() else "none"
        raise TicketSetError(f"{path}: expected a file, found {found}; datalth-train writes it when a run finishes")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise TicketSetError(f"{path}: expected at most {limit} bytes, got more")
    return data


def _check(rules: Check, values: dict[str, Any], path: Path) -> None:
    """
    Raises:
        TicketSetError: a value is missing, or not what it should be.
    """
    try:
        rules(values, str(path))
    except TicketSetError as error:
        raise TicketSetError(f"{error}; made by an older datalth-train, or damaged") from None


def _read_predictions(path: Path, top1: dict[str, float]) -> tuple[pa.Array, dict[str, np.ndarray]]:
    """Keys, and which images were right under each protocol; they must give the accuracies of final.json."""
    names = ["label", *top1]
    where = f"{path}: damaged"
    table = read_parquet(_read(path, MAX_PREDICTIONS), where, ["key", *names], MAX_IMAGES)
    if not len(table):
        raise TicketSetError(f"{where}: no images")
    wrong = [n for n in names if not pa.types.is_integer(table.schema.field(n).type) or table[n].null_count]
    if wrong:
        raise TicketSetError(f"{where}: column {wrong[0]}: expected classes, got {table.schema.field(wrong[0]).type}")
    keys = table["key"].combine_chunks()
    if not pa.types.is_string(keys.type) or keys.null_count or len(keys.unique()) < len(keys):
        raise TicketSetError(f"{where}: column key: expected names of images, each once")
    answers = {name: table[name].to_numpy() for name in names}
    hits = {name: answers[name] == answers["label"] for name in top1}
    for name, found in hits.items():
        if abs(100 * found.mean() - top1[name]) > TOP1_TOLERANCE:
            raise TicketSetError(
                f"{path}: not this run's: top-1 on {name} is {100 * found.mean():.2f} here, {top1[name]:.2f} in final.json"
            )
    return keys, hits
