"""A weight ticket, a folder: which weights of a model are kept, and what they start from. docs/FORMAT.md draws it.

    plan.json               first: everything that decides the bytes
    masks-01.safetensors    one a level, each within the one before; one bit a weight
    start.safetensors       start weights of the dense model, plain timm
    manifest.json           last; its presence means that the ticket is complete

A folder may come from anywhere: sizes are looked at before a file is read, and its JSON before it becomes a shape or a
name. No torch: `datalth-weights info` and the verdict read it too.
"""

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shards import checks, storage
from shards import format as fmt
from shards.errors import TicketSetError, first_line
from shards.record import Record
from shards.schema import HEX, MAX_SEED, FileDigest
from trainer.weights.options import METHODS

FORMAT = (1, 0)  # (major, minor): readers refuse a higher major and ignore what a higher minor added
PLAN, MANIFEST, START = "plan.json", "manifest.json", "start.safetensors"

MAX_JSON_BYTES = 10 << 20
MAX_MASKS_BYTES = 1 << 30
MAX_LEVELS = 999
MAX_UPDATES = 1 << 60
MASKS_PREFIX = "masks-"
_MASKS = "masks"  # the one key of a mask file's metadata: with two, safetensors writes them in any order

_ID = checks.matching(HEX, "64 hex digits")
_FORMAT = checks.list_of(checks.integer(0, 999), 2, 2)
_NAME = checks.text(300)
_COUNT = checks.integer(0, 8 * MAX_MASKS_BYTES)
_SHAPE = checks.list_of(checks.integer(1, 8 * MAX_MASKS_BYTES), 1, 8)
_METHOD = checks.matching(re.compile(rf"{'|'.join(METHODS)}|[^/\\\x00-\x1f]{{1,200}}:\w{{1,200}}"), "a method")
_SHARE = checks.rule(lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class WeightPlan(Record):
    """plan.json: everything that determines the bytes of a weight ticket. Make one with `WeightPlan.of`.

    Attributes:
        format: (major, minor).
        method: one of METHODS, or module:function, a user's own score.
        score_sha256: of the user's file.
        sparsity: share of the prunable weights that the last level removes.
        levels: L, masks.
        scope: "global": weights of all tensors compete; "layer": those of each by themselves.
        rewind_epochs: that the start weights were trained for.
        mining: the method's own settings.
        prunable: name -> shape of every tensor that may lose weights, sorted by name.
        heads: name of a qkv weight [3 * D, D] -> its heads; rows are (q, k, v) x heads x head_dim.
        arguments: of the runs, those that make them comparable, as args.yaml has them; without the seed.
        classes: names in the order of their labels.
        seed: of the runs.
        group_id: identity of all but the seed, so that of the same ticket of other seeds too.
        plan_id: identity of all.
    """

    format: Annotated[tuple[int, int], _FORMAT]
    method: Annotated[str, _METHOD]
    score_sha256: Annotated[str | None, checks.or_null(_ID)]
    sparsity: Annotated[float, _SHARE]
    levels: Annotated[int, checks.integer(1, MAX_LEVELS)]
    scope: Annotated[str, checks.one_of("global", "layer")]
    rewind_epochs: Annotated[int, checks.integer(0, 1 << 31)]
    mining: Annotated[dict[str, Any], checks.OBJECT]
    prunable: Annotated[dict[str, tuple[int, ...]], checks.mapping_of(_NAME, _SHAPE, 100_000)]
    heads: Annotated[dict[str, int], checks.mapping_of(_NAME, checks.integer(1, 1 << 16), 100_000, fewest=0)]
    arguments: Annotated[dict[str, Any], checks.OBJECT]
    classes: Annotated[tuple[str, ...], checks.list_of(checks.text(4096), 0, 1_000_000)]
    seed: Annotated[int, checks.integer(0, MAX_SEED)]
    group_id: Annotated[str, _ID]
    plan_id: Annotated[str, _ID]

    @classmethod
    def of(cls, **said: Any) -> "WeightPlan":
        """The plan of all fields but the format and the ids, exactly as it will be read.

        Raises:
            TicketSetError: a field is not what it should be.
        """
        content = json.loads(fmt.canonical_json({**said, "format": FORMAT}))  # lists for tuples, names sorted
        content["group_id"], content["plan_id"] = _identities(content)
        return _checked_plan(content, PLAN)

    @property
    def total(self) -> int:
        """N, prunable weights."""
        return sum(math.prod(shape) for shape in self.prunable.values())

    @property
    def start(self) -> str:
        """Where its start weights come from: "transformed" (rst), "given" (pretrained, or of a checkpoint), "rewound" (of a
        later epoch) or "first" (of the seed).
        """
        if self.method == "rst":
            return "transformed"
        if self.arguments.get("pretrained") or self.arguments.get("initial_checkpoint"):
            return "given"
        return "rewound" if self.rewind_epochs else "first"

    def identities(self) -> tuple[str, str]:
        """What `group_id` and `plan_id` should be."""
        return _identities(self.to_json())


@dataclass(frozen=True, kw_only=True)
class LevelRecord(Record):
    """What the manifest says of one level; level 0 is dense and has no masks.

    Attributes:
        level: 0 to L.
        sparsity: target.
        kept, prunable: weights, over all prunable tensors.
        tensors: name -> weights kept; empty at level 0.
        masks: the file.
        ticket_id: identity of masks and start weights together.
        results: protocol -> top-1 in percent; None where mining has not trained this level.
        updates: of the optimizer, that mining had cost before this level's mask was known.
        gmacs: of one view's forward with the zeros left out, in theory.
        dense_gmacs: as run.
    """

    level: Annotated[int, checks.integer(0, MAX_LEVELS)]
    sparsity: Annotated[float, checks.number(0, 1)]
    kept: Annotated[int, _COUNT]
    prunable: Annotated[int, _COUNT]
    tensors: Annotated[dict[str, int], checks.mapping_of(_NAME, _COUNT, 100_000, fewest=0)]
    masks: Annotated[FileDigest | None, checks.or_null(FileDigest.parse)]
    ticket_id: Annotated[str | None, checks.or_null(_ID)]
    results: Annotated[dict[str, float] | None, checks.or_null(checks.mapping_of(_NAME, checks.number(0, 100), 100))]
    updates: Annotated[int, checks.integer(0, MAX_UPDATES)]
    gmacs: Annotated[float, checks.number(0, 1e12)]
    dense_gmacs: Annotated[float, checks.number(0, 1e12)]


@dataclass(frozen=True, kw_only=True)
class WeightManifest(Record):
    """manifest.json: what is in a finished weight ticket.

    Attributes:
        format: (major, minor).
        plan_id, group_id: of its plan.
        start: the file of the start weights.
        levels: 0 to L.
        timing: seconds, for people; never compared.
        digest: hash of all other fields but `timing`; `write_manifest` sets it.
    """

    format: Annotated[tuple[int, int], _FORMAT]
    plan_id: Annotated[str, _ID]
    group_id: Annotated[str, _ID]
    start: FileDigest
    levels: Annotated[tuple[LevelRecord, ...], checks.list_of(LevelRecord.parse, 2, MAX_LEVELS + 1)]
    timing: Annotated[dict[str, Any] | None, checks.OBJECT] = None
    digest: Annotated[str | None, _ID] = None

    def identity(self) -> str:
        """What `digest` should be."""
        return fmt.manifest_digest({name: value for name, value in self.to_json().items() if name != "timing"})


class WeightTicket:
    """A finished weight ticket. Use `WeightTicket.open`.

    Attributes:
        path: its folder.
        plan: what plan.json says.
        manifest: what manifest.json says.
    """

    def __init__(self, path: Path, plan: WeightPlan, manifest: WeightManifest) -> None:
        self.path, self.plan, self.manifest = path, plan, manifest

    @classmethod
    def open(cls, path: str | Path) -> "WeightTicket":
        """Open a finished weight ticket.

        Raises:
            TicketSetError: not a weight ticket, not finished, of a newer major format, its JSON is damaged, or a file is
                not there with the manifest's size.
        """
        ticket = cls.read(path)
        for name, record in ticket.files():
            found = storage.size_of(str(ticket.path / name)) if (ticket.path / name).exists() else None
            if found != record.bytes:
                got = "none: it is missing" if found is None else f"{found}"
                raise TicketSetError(f"{ticket.path / name}: expected {record.bytes} bytes, got {got}")
        return ticket

    @classmethod
    def read(cls, path: str | Path) -> "WeightTicket":
        """`open` without a look at masks and start weights.

        Raises:
            TicketSetError: not a weight ticket, not finished, of a newer major format, or its JSON is damaged.
        """
        path = Path(path)
        where = path / MANIFEST
        data = _read_if_there(where)
        if data is not None and (content := checks.parse_json(data, str(where))).get("kind") == fmt.KIND:
            raise TicketSetError(f"{path}: expected a weight ticket, found a ticket set of patches")
        plan = read_plan(path)
        if plan is None:
            raise TicketSetError(f"{path}: expected a weight ticket, found no {PLAN}")
        if data is None:
            raise TicketSetError(
                f"{path}: this weight ticket is not finished (no {MANIFEST}); run its datalth-weights command again"
            )
        fmt.check_format(content.get("format"), str(where), FORMAT)
        manifest = WeightManifest.parse(content, str(where))
        _check_levels(manifest, plan, str(where))
        return cls(path, plan, manifest)

    @property
    def levels(self) -> int:
        """L, masks; the sparsest is the last."""
        return self.plan.levels

    def level(self, number: int | None = None) -> LevelRecord:
        """What the manifest says of one level with masks; None: of the last.

        Raises:
            TicketSetError: there is no such level.
        """
        number = self.levels if number is None else number
        if not 1 <= number <= self.levels:
            raise TicketSetError(f"{self.path}: expected a level from 1 to {self.levels}, got {number}")
        return self.manifest.levels[number]

    def files(self) -> Iterator[tuple[str, FileDigest]]:
        """(name, record) of masks and start weights."""
        yield START, self.manifest.start
        for record in self.manifest.levels:
            if record.masks is not None:
                yield masks_name(record.level), record.masks

    def kept(self, number: int | None = None) -> dict[str, np.ndarray]:
        """Name -> bool of the tensor's shape: which weights a level keeps.

        Raises:
            TicketSetError: the file is not what the manifest says, or does not fit the plan.
        """
        record = self.level(number)
        where = self.path / masks_name(record.level)
        assert record.masks is not None  # `_check_levels`
        kept = _decode_masks(_read_as(where, record.masks, MAX_MASKS_BYTES), record.level, self.plan, str(where))
        for name, mask in kept.items():
            if (count := int(mask.sum())) != record.tensors[name]:
                raise TicketSetError(f"{where}: {name}: expected {record.tensors[name]} weights kept, got {count}")
        return kept

    def start_bytes(self) -> bytes:
        """The start weights as a safetensors file.

        Raises:
            TicketSetError: the file is not what the manifest says.
        """
        return _read_as(self.path / START, self.manifest.start, storage.LARGE_FILE)


def masks_name(level: int) -> str:
    """`masks-01.safetensors`"""
    return f"{MASKS_PREFIX}{level:02d}.safetensors"


def ticket_identity(masks: FileDigest, start: FileDigest) -> str:
    """What a level's `ticket_id` should be."""
    return hashlib.sha256((masks.sha256 + start.sha256).encode()).hexdigest()


def file_record(path: Path) -> FileDigest:
    """Length and sha256 of a file."""
    sha, size = hashlib.sha256(), 0
    for block in storage.blocks(str(path), storage.LARGE_FILE):
        sha.update(block)
        size += len(block)
    return FileDigest(bytes=size, sha256=sha.hexdigest())


def read_plan(path: Path) -> WeightPlan | None:
    """A folder's plan.json, or None where there is none.

    Raises:
        TicketSetError: the file is there but is no plan of a weight ticket.
    """
    data, where = _read_if_there(path / PLAN), str(path / PLAN)
    return None if data is None else _checked_plan(checks.parse_json(data, where), where)


def write_plan(path: Path, plan: WeightPlan) -> None:
    """Write plan.json into a folder."""
    storage.write_atomic(path / PLAN, fmt.canonical_json(plan.to_json()))


def write_manifest(path: Path, manifest: WeightManifest) -> None:
    """Write manifest.json into a folder, when all else is there."""
    whole = replace(manifest, digest=manifest.identity())
    storage.write_atomic(path / MANIFEST, fmt.canonical_json(whole.to_json()))


def write_start(path: Path, data: bytes) -> FileDigest:
    """Write the start weights, a safetensors file without metadata, into a folder."""
    return _write(path / START, data)


def write_masks(path: Path, level: int, kept: Mapping[str, np.ndarray]) -> FileDigest:
    """Write which weights a level keeps into a folder; equal masks are equal bytes.

    Args:
        path: the folder.
        level: 1 to L.
        kept: name -> bool of the tensor's shape.
    """
    tensors = {name: {"shape": mask.shape, "kept": int(mask.sum())} for name, mask in kept.items()}
    packed = {name: np.packbits(mask.ravel(), bitorder="little") for name, mask in kept.items()}
    said = json.dumps({"level": level, "tensors": tensors}, sort_keys=True)
    return _write(path / masks_name(level), save(packed, {_MASKS: said}))


def read_masks(path: Path, level: int, plan: WeightPlan) -> dict[str, np.ndarray]:
    """Name -> bool of the tensor's shape: which weights a level keeps, whether the ticket is finished or not.

    Raises:
        FileNotFoundError: this level has no masks yet.
        TicketSetError: the file is damaged, or does not fit the plan.
    """
    where = str(path / masks_name(level))
    return _decode_masks(storage.read_bytes(where, MAX_MASKS_BYTES), level, plan, where)


def read_tensors(data: bytes, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Name -> tensor of a safetensors file, and its metadata.

    Raises:
        TicketSetError: it is none, or holds a type that numpy lacks.
    """
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(MAX_JSON_BYTES, len(data) - 8):
        raise TicketSetError(f"{where}: not readable as safetensors: a header of {length} bytes")
    header = checks.parse_json(data[8 : 8 + length], f"{where}: header")
    try:
        return load(data), header.get("__metadata__") or {}
    except SafetensorError as error:
        raise TicketSetError(f"{where}: not readable as safetensors: {first_line(error)}") from None
    except KeyError as error:
        raise TicketSetError(f"{where}: expected types that numpy has, got {error}") from None


def _identities(plan: dict[str, Any]) -> tuple[str, str]:
    """(group_id, plan_id) of a plan's JSON."""
    said = {field: value for field, value in plan.items() if field not in ("group_id", "plan_id")}
    return fmt.digest({field: value for field, value in said.items() if field != "seed"}), fmt.digest(said)


def _checked_plan(content: dict[str, Any], where: str) -> WeightPlan:
    if "method" not in content or "prunable" not in content:
        raise TicketSetError(f"{where}: expected the plan of a weight ticket")
    fmt.check_format(content.get("format"), where, FORMAT)
    plan = WeightPlan.parse(content, where)
    if (plan.method in METHODS) != (plan.score_sha256 is None):
        raise TicketSetError(f"{where}: score_sha256: expected that of the file of a module:function alone")
    if plan.total > 8 * MAX_MASKS_BYTES:
        raise TicketSetError(f"{where}: prunable: expected at most {8 * MAX_MASKS_BYTES} weights, got {plan.total}")
    return plan


def _check_levels(manifest: WeightManifest, plan: WeightPlan, where: str) -> None:
    """A manifest against its plan, as far as the code that reads masks counts on it."""
    if manifest.plan_id != plan.plan_id:
        raise TicketSetError(
            f"{where}: of another plan: expected plan_id {plan.plan_id[:12]}, got {manifest.plan_id[:12]}"
        )
    found = [record.level for record in manifest.levels]
    if found != list(range(plan.levels + 1)):
        raise TicketSetError(f"{where}: expected levels 0 to {plan.levels} ({PLAN}), got {reprlib.repr(found)}")
    for record in manifest.levels:
        masked = record.level > 0
        if (record.masks is not None, record.ticket_id is not None) != (masked, masked):
            raise TicketSetError(f"{where}: level {record.level}: expected masks and ticket_id from level 1 on")
        if record.tensors.keys() != (plan.prunable.keys() if masked else set()):
            raise TicketSetError(f"{where}: level {record.level}: its tensors are not those of {PLAN}")
        kept = sum(record.tensors.values()) if masked else plan.total
        if (record.kept, record.prunable) != (kept, plan.total):
            raise TicketSetError(
                f"{where}: level {record.level}: expected {kept} of {plan.total} weights kept (its tensors, {PLAN}),"
                f" got {record.kept} of {record.prunable}"
            )


def _decode_masks(data: bytes, level: int, plan: WeightPlan, where: str) -> dict[str, np.ndarray]:
    packed, metadata = read_tensors(data, where)
    said = _masks_said(metadata, where)
    if said["level"] != level:
        raise TicketSetError(f"{where}: expected level {level}, got {said['level']}")
    if not packed.keys() == said["tensors"].keys() == plan.prunable.keys():
        stranger = min(packed.keys() ^ plan.prunable.keys() or said["tensors"].keys() ^ plan.prunable.keys())
        raise TicketSetError(f"{where}: of another model: it and {PLAN} do not both have {reprlib.repr(stranger)}")
    kept = {}
    for name, shape in plan.prunable.items():
        size, found = math.prod(shape), said["tensors"][name]
        if tuple(found["shape"]) != shape:
            raise TicketSetError(f"{where}: {name}: expected shape {list(shape)} ({PLAN}), got {found['shape']}")
        bits = packed[name]
        if bits.dtype != np.uint8 or bits.shape != (-(-size // 8),):
            expected = f"{-(-size // 8)} bytes"
            raise TicketSetError(f"{where}: {name}: expected {expected}, got {bits.dtype} {list(bits.shape)}")
        if size % 8 and bits[-1] >> (size % 8):
            raise TicketSetError(f"{where}: {name}: expected unused bits 0 at its end")
        mask = np.unpackbits(bits, count=size, bitorder="little").astype(bool).reshape(shape)
        if (count := int(mask.sum())) != found["kept"]:
            raise TicketSetError(f"{where}: {name}: says {found['kept']} weights kept, its bits {count}")
        kept[name] = mask
    return kept


_OF_TENSOR = checks.fields({"shape": checks.list_of(checks.integer(1, 1 << 40), 1, 8), "kept": _COUNT})
_OF_MASKS = checks.fields(
    {"level": checks.integer(1, MAX_LEVELS), "tensors": checks.mapping_of(_NAME, _OF_TENSOR, 100_000)}
)


def _masks_said(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(metadata.get(_MASKS), str):
        raise TicketSetError(f"{where}: expected masks of a weight ticket: it has no metadata {_MASKS!r}")
    said: dict[str, Any] = _OF_MASKS(
        checks.parse_json(metadata[_MASKS].encode("utf-8", "surrogatepass"), f"{where}: {_MASKS}"), where
    )
    return said


def _read_if_there(path: Path) -> bytes | None:
    try:
        return storage.read_bytes(str(path), MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_as(path: Path, record: FileDigest, limit: int) -> bytes:
    """A file that the manifest lists."""
    try:
        data = storage.read_bytes(str(path), limit)
    except FileNotFoundError:
        raise TicketSetError(f"{path}: missing") from None
    if len(data) != record.bytes:
        raise TicketSetError(f"{path}: expected {record.bytes} bytes, got {len(data)}")
    if (found := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise TicketSetError(f"{path}: expected sha256 {record.sha256[:12]}, got {found[:12]}")
    return data


def _write(path: Path, data: bytes) -> FileDigest:
    storage.write_atomic(path, data)
    return FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
