"""What the JSON files of a ticket set hold: every field's type, range and form, checked where a file is read.

A set may come from anywhere, and its files become loops, paths and array shapes: a split's name is part of file names, a
count is the length of a loop. So nothing reaches the rest of the code but what passed here. Fields that are not
listed are ignored: a higher minor version may add some.
"""

import json
import math
import re
import reprlib
from collections.abc import Callable
from typing import Any

from shards import format as fmt
from shards import token_labels
from shards.errors import TicketSetError

# Bounds above what any real set needs: the next size up is an attack or a damaged file.
MAX_JSON_BYTES = 32 << 20  # parsed, JSON may take twenty times its bytes
MAX_COUNT = 1 << 40  # samples of a split, bytes that sum up
MAX_SHARDS = 1_000_000  # their names have six digits
MAX_SHARD_IMAGES = 1 << 20
MAX_VIEWS = 4096
MAX_SIDE = 1 << 15  # pixels of a view
MAX_SEED = (1 << 63) - 1
MAX_BYTES = 1 << 60

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
HEX = re.compile(r"[0-9a-f]{64}")
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # no line of a file, nor a terminal, may meet them

Check = Callable[[Any, str], None]  # (value, its name); raises TicketSetError


def _rule(holds: Callable[[Any], bool], says: str) -> Check:
    def check(value: Any, name: str) -> None:
        if not holds(value):
            raise TicketSetError(f"{name}: expected {says}, got {reprlib.repr(value)}")

    return check


def _integer(low: int, high: int) -> Check:
    return _rule(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def _number(low: float, high: float) -> Check:
    return _rule(
        lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high,
        f"a number from {low:g} to {high:g}",
    )


def _one_of(*values: Any) -> Check:
    return _rule(lambda v: any(type(v) is type(w) and v == w for w in values), f"one of {list(values)}")


def _text(longest: int) -> Check:
    return _rule(
        lambda v: isinstance(v, str) and 0 < len(v) <= longest and not _CONTROL.search(v),
        f"1 to {longest} characters without control characters",
    )


def _matching(pattern: re.Pattern[str], says: str) -> Check:
    return _rule(lambda v: isinstance(v, str) and pattern.fullmatch(v) is not None, says)


def _or_null(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def _list(check: Check, shortest: int, longest: int) -> Check:
    whole = _rule(
        lambda v: isinstance(v, list) and shortest <= len(v) <= longest, f"a list of {shortest} to {longest} values"
    )

    def check_all(value: Any, name: str) -> None:
        whole(value, name)
        for number, item in enumerate(value):
            check(item, f"{name}[{number}]")

    return check_all


def _object(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    def check(value: Any, name: str) -> None:
        _rule(lambda v: isinstance(v, dict), "names and values")(value, name)
        for field, rule in required.items():
            if field not in value:
                raise TicketSetError(f"{name}: lacks the field {field!r}")
            rule(value[field], f"{name}: {field}")
        for field, rule in (optional or {}).items():
            if field in value:
                rule(value[field], f"{name}: {field}")

    return check


def _named(names: Check, check: Check, most: int) -> Check:
    whole = _rule(lambda v: isinstance(v, dict) and 0 < len(v) <= most, f"1 to {most} names and values")

    def check_all(value: Any, name: str) -> None:
        whole(value, name)
        for field, item in value.items():
            names(field, f"{name}: name")
            check(item, f"{name}: {field}")

    return check_all


_ID = _matching(HEX, "64 hex digits")
_COUNT = _integer(0, MAX_COUNT)
_FILE = {"bytes": _integer(0, MAX_BYTES), "sha256": _ID}
_SPLIT = _matching(SPLIT_NAME, "a split's name (letters, digits, _.+-)")
_GRID = _list(_integer(1, 1 << 15), 2, 2)
_COLORS = _list(_number(-1e6, 1e6), 0, 3)
_VIEWS = {
    "views": _integer(1, MAX_VIEWS),
    "scale": _list(_number(0, 1), 2, 2),
    "ratio": _list(_number(0, 1e6), 2, 2),
    "hflip": _number(0, 1),
    "shards": _integer(0, MAX_SHARDS),
}
_COUNTS = {
    "shards": _integer(0, MAX_SHARDS),
    "samples": _COUNT,
    "failed": _COUNT,
    "bytes": _integer(0, MAX_BYTES),
    "image_bytes": _integer(0, MAX_BYTES),
}
_SELECTOR = _object(
    {
        "method": _text(300),
        "model": _or_null(_text(300)),
        "state": _or_null(_ID),
        "keep_rate": _or_null(_number(0, 1)),
        "counts": _list(_integer(0, 65536), 0, 1000),
        "blocks": _list(_integer(0, 10_000), 0, 1000),
        "input_size": _or_null(_integer(1, MAX_SIDE)),
        "mean": _COLORS,
        "std": _COLORS,
        "dtype": _text(30),
    }
)
_LABELLER = _object(
    {
        "model": _text(300),
        "state": _ID,
        "input_size": _integer(1, MAX_SIDE),
        "grid": _GRID,
        "top": _integer(1, 1000),
        "dtype": _text(30),
        "batch_size": _integer(1, 1 << 31),
    }
)
# What plan and manifest both say.
_SHARED: dict[str, Check] = {
    "selector": _SELECTOR,
    "img_size": _integer(1, MAX_SIDE),
    "patch_size": _integer(1, MAX_SIDE),
    "grid": _GRID,
    "k": _integer(0, 65536),
    "exif": _one_of("ignore", "apply"),
    "store_side": _or_null(_integer(1, 65500)),
    "seed": _integer(0, MAX_SEED),
}
_MANIFEST = _object(
    {
        **_SHARED,
        "plan_id": _ID,
        "set_id": _ID,
        "plan": _object(_FILE),
        "classes": _list(_text(1024), 0, 1_000_000),
        "members": _named(_text(100), _object({}), 100),
        "base": _or_null(_object({"set_id": _ID, "path": _text(4096)})),
        "splits": _named(_SPLIT, _object(_VIEWS | _COUNTS), 1000),
        "totals": _object(_COUNTS),
    },
    {"token_labels": _LABELLER, "digest": _ID},
)
_PLAN = _object(
    {
        "plan_id": _ID,
        "common": _object(
            {
                **_SHARED,
                "algorithm": _integer(1, 1 << 31),
                "images": _one_of("copy", "link"),
                "val_share": _number(0, 1),
                "batch_size": _integer(1, 1 << 31),
                "base": _or_null(_ID),
                "classes": _ID,
            },
            {"token_labels": _LABELLER},
        ),
        "splits": _named(
            _SPLIT,
            _object(
                {
                    **_VIEWS,
                    "plan_id": _ID,
                    "inputs": _ID,
                    "keys": _ID,
                    "images": _COUNT,
                    "limit": _or_null(_COUNT),
                    "shard_size": _integer(1, MAX_COUNT),
                },
                {"retried_inputs": _ID},
            ),
            1000,
        ),
    }
)
_SHARD = _object(
    {
        "plan_id": _ID,
        "split": _SPLIT,
        "shard": _integer(0, MAX_SHARDS),
        "samples": _integer(0, MAX_SHARD_IMAGES),
        "failed": _integer(0, MAX_SHARD_IMAGES),
        "image_bytes": _integer(0, MAX_BYTES),
        "tar": _object(_FILE),
        "parquet": _object(_FILE),
    }
)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        TicketSetError: it does not.
    """

    def refuse(word: str) -> float:  # NaN and Infinity are Python's, not JSON's
        raise ValueError(f"a number that is none: {word}")

    try:
        content = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise TicketSetError(f"{where}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise TicketSetError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise TicketSetError(f"{where}: expected names and values, got {type(content).__name__}")
    return content


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """manifest.json, checked.

    Raises:
        TicketSetError: not the manifest of a ticket set, of a newer major format, or a field is not what it should be.
    """
    manifest = parse_json(data, where)
    if manifest.get("kind") != fmt.KIND:
        raise TicketSetError(f"{where}: expected the manifest of a ticket set (kind {fmt.KIND!r})")
    _check(manifest, where, _MANIFEST)
    _check_geometry(manifest, where)
    _check_members(manifest, where)
    classes = manifest["classes"]
    if len(set(classes)) < len(classes):
        raise TicketSetError(f"{where}: classes: expected names that differ")
    return manifest


def parse_plan(data: bytes, where: str) -> dict[str, Any]:
    """plan.json, checked.

    Raises:
        TicketSetError: not a plan, of a newer major format, or a field is not what it should be.
    """
    plan = parse_json(data, where)
    _check(plan, where, _PLAN)
    _check_geometry(plan["common"], f"{where}: common")
    return plan


def parse_shard(data: bytes, where: str) -> dict[str, Any]:
    """A shard's JSON, checked.

    Raises:
        TicketSetError: not a shard's JSON, of a newer major format, or a field is not what it should be.
    """
    stats = parse_json(data, where)
    _check(stats, where, _SHARD)
    return stats


def check_split_name(name: str, where: str) -> None:
    """
    Raises:
        TicketSetError: a name that cannot be part of file names.
    """
    _SPLIT(name, where)


def _check(content: dict[str, Any], where: str, rules: Check) -> None:
    fmt.check_format(content.get("format"), where)
    rules(content, where)


def _check_geometry(said: dict[str, Any], where: str) -> None:
    n = math.prod(said["grid"])
    if n > 65536 or said["grid"] != [said["img_size"] // said["patch_size"]] * 2:
        raise TicketSetError(
            f"{where}: grid: expected {said['img_size']} px in patches of {said['patch_size']} px, got {said['grid']}"
        )
    if said["k"] > n:
        raise TicketSetError(f"{where}: k: expected at most {n}, the patches of a view, got {said['k']}")


def _check_members(manifest: dict[str, Any], where: str) -> None:
    """The members that this version knows are what it would have written."""
    members, n = manifest["members"], math.prod(manifest["grid"])
    expected: dict[str, dict[str, Any]] = {}
    if fmt.RANKING in members:
        expected[fmt.RANKING] = {"dtype": str(fmt.ranking_dtype(n)), "shape": ["views", n]}
        columns = list(fmt.VIEW_COLUMNS)
        expected[fmt.VIEWS] = {"dtype": "int32", "shape": ["views", len(columns)], "columns": columns}
    if fmt.TOKEN_LABELS in members:
        if "token_labels" not in manifest or not manifest["classes"]:
            raise TicketSetError(f"{where}: members: token labels without their model or without classes")
        side = manifest["token_labels"]["grid"][0]
        shape = token_labels.shape(len(manifest["classes"]), side)
        expected[fmt.TOKEN_LABELS] = {"dtype": "uint16", "shape": shape}
    if (fmt.RANKING in members) != (manifest["k"] > 0):
        raise TicketSetError(f"{where}: k: expected one above 0 where there are rankings, and only there")
    for name, said in expected.items():
        for field, value in said.items():
            if members.get(name, {}).get(field) != value:
                found = reprlib.repr(members.get(name, {}).get(field))
                raise TicketSetError(f"{where}: members: {name}: {field}: expected {value}, got {found}")
