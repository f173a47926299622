"""What the JSON files of a ticket set hold: every field's type, range and form, checked where a file is read.

A set may come from anywhere, and its files become loops, paths and array shapes: a split's name is part of file names, a
count is the length of a loop. So nothing reaches the rest of the code but what passed here. Fields that are not
listed are ignored: a higher minor version may add some.
"""

import math
import re
import reprlib
from typing import Any

from shards import checks, token_labels
from shards import format as fmt
from shards.errors import TicketSetError

# Bounds above what any real set needs: the next size up is an attack or a damaged file.
MAX_JSON_BYTES = 32 << 20  # parsed, JSON may take twenty times its bytes
MAX_COUNT = 1 << 40  # samples of a split, bytes that sum up
MAX_SHARDS = 1_000_000  # their names have six digits
MAX_SHARD_IMAGES = 1 << 20
MAX_VIEWS = 4096
MAX_SIDE = 1 << 15  # pixels of a view
MAX_STORE_SIDE = 65_500  # pixels; libjpeg's
MAX_SEED = (1 << 63) - 1
MAX_BYTES = 1 << 60

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
HEX = re.compile(r"[0-9a-f]{64}")

_ID = checks.matching(HEX, "64 hex digits")
_COUNT = checks.integer(0, MAX_COUNT)
_FILE = {"bytes": checks.integer(0, MAX_BYTES), "sha256": _ID}
_SPLIT = checks.matching(SPLIT_NAME, "a split's name (letters, digits, _.+-)")
_GRID = checks.list_of(checks.integer(1, 1 << 15), 2, 2)
_COLORS = checks.list_of(checks.number(-1e6, 1e6), 0, 3)
_VIEWS = {
    "views": checks.integer(1, MAX_VIEWS),
    "scale": checks.list_of(checks.number(0, 1), 2, 2),
    "ratio": checks.list_of(checks.number(0, 1e6), 2, 2),
    "hflip": checks.number(0, 1),
    "shards": checks.integer(0, MAX_SHARDS),
}
_COUNTS = {
    "shards": checks.integer(0, MAX_SHARDS),
    "samples": _COUNT,
    "failed": _COUNT,
    "bytes": checks.integer(0, MAX_BYTES),
    "image_bytes": checks.integer(0, MAX_BYTES),
}
_SELECTOR = checks.fields(
    {
        "method": checks.text(300),
        "model": checks.or_null(checks.text(300)),
        "state": checks.or_null(_ID),
        "keep_rate": checks.or_null(checks.number(0, 1)),
        "counts": checks.list_of(checks.integer(0, 65536), 0, 1000),
        "blocks": checks.list_of(checks.integer(0, 10_000), 0, 1000),
        "input_size": checks.or_null(checks.integer(1, MAX_SIDE)),
        "mean": _COLORS,
        "std": _COLORS,
        "dtype": checks.text(30),
    }
)
_LABELLER = checks.fields(
    {
        "model": checks.text(300),
        "state": _ID,
        "input_size": checks.integer(1, MAX_SIDE),
        "grid": _GRID,
        "top": checks.integer(1, 1000),
        "dtype": checks.text(30),
        "batch_size": checks.integer(1, 1 << 31),
    }
)
# What plan and manifest both say.
_SHARED: dict[str, checks.Check] = {
    "selector": _SELECTOR,
    "img_size": checks.integer(1, MAX_SIDE),
    "patch_size": checks.integer(1, MAX_SIDE),
    "grid": _GRID,
    "k": checks.integer(0, 65536),
    "exif": checks.one_of("ignore", "apply"),
    "store_side": checks.or_null(checks.integer(1, MAX_STORE_SIDE)),
    "seed": checks.integer(0, MAX_SEED),
}
_MANIFEST = checks.fields(
    {
        **_SHARED,
        "plan_id": _ID,
        "set_id": _ID,
        "plan": checks.fields(_FILE),
        "classes": checks.list_of(checks.text(4096), 0, 1_000_000),
        "members": checks.mapping_of(checks.text(100), checks.fields({}), 100),
        "base": checks.or_null(checks.fields({"set_id": _ID, "path": checks.text(4096)})),
        "splits": checks.mapping_of(_SPLIT, checks.fields(_VIEWS | _COUNTS), 1000),
        "totals": checks.fields(_COUNTS),
    },
    {"token_labels": _LABELLER, "digest": _ID},
)
_PLAN = checks.fields(
    {
        "plan_id": _ID,
        "common": checks.fields(
            {
                **_SHARED,
                "algorithm": checks.integer(1, 1 << 31),
                "images": checks.one_of("copy", "link"),
                "val_share": checks.number(0, 1),
                "batch_size": checks.integer(1, 1 << 31),
                "base": checks.or_null(_ID),
                "classes": _ID,
            },
            {"token_labels": _LABELLER},
        ),
        "splits": checks.mapping_of(
            _SPLIT,
            checks.fields(
                {
                    **_VIEWS,
                    "plan_id": _ID,
                    "inputs": _ID,
                    "keys": _ID,
                    "images": _COUNT,
                    "limit": checks.or_null(_COUNT),
                    "shard_size": checks.integer(1, MAX_COUNT),
                },
                {"retried_inputs": _ID},
            ),
            1000,
        ),
    }
)
_SHARD = checks.fields(
    {
        "plan_id": _ID,
        "split": _SPLIT,
        "shard": checks.integer(0, MAX_SHARDS),
        "samples": checks.integer(0, MAX_SHARD_IMAGES),
        "failed": checks.integer(0, MAX_SHARD_IMAGES),
        "image_bytes": checks.integer(0, MAX_BYTES),
        "tar": checks.fields(_FILE),
        "parquet": checks.fields(_FILE),
    }
)


def parse_manifest(data: bytes, where: str) -> dict[str, Any]:
    """manifest.json, checked.

    Raises:
        TicketSetError: not the manifest of a ticket set, of a newer major format, or a field is not what it should be.
    """
    manifest = checks.parse_json(data, where)
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
    plan = checks.parse_json(data, where)
    _check(plan, where, _PLAN)
    _check_geometry(plan["common"], f"{where}: common")
    return plan


def parse_shard(data: bytes, where: str) -> dict[str, Any]:
    """A shard's JSON, checked.

    Raises:
        TicketSetError: not a shard's JSON, of a newer major format, or a field is not what it should be.
    """
    stats = checks.parse_json(data, where)
    _check(stats, where, _SHARD)
    return stats


def check_split_name(name: str, where: str) -> None:
    """
    Raises:
        TicketSetError: a name that cannot be part of file names.
    """
    _SPLIT(name, where)


def _check(content: dict[str, Any], where: str, rules: checks.Check) -> None:
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
