"""What the JSON files of a ticket set hold: every field's type, range and form, checked where a file is read.

A set may come from anywhere, and its files become loops, paths and array shapes: a split's name is part of file names, a
count is the length of a loop. So nothing reaches the rest of the code but the records that were made here. Fields that
are not listed are kept and not looked at: a higher minor version may add some.
"""

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Annotated, Any

from shards import checks, token_labels
from shards import format as fmt
from shards.errors import TicketSetError
from shards.record import Record

# Bounds above what any real set needs: the next size up is an attack or a damaged file.
MAX_JSON_BYTES = 32 << 20  # parsed, JSON may take twenty times its bytes
MAX_COUNT = 1 << 40  # samples of a split, bytes that sum up
MAX_SHARDS = 1_000_000  # their names have six digits
MAX_SHARD_IMAGES = 1 << 20
MAX_VIEWS = 4096
MAX_SIDE = 1 << 15  # pixels of a view
MAX_STORE_SIDE = 65_500  # pixels; libjpeg's
MAX_MOSAIC_PIXELS = 1 << 25  # of one ranked view
MAX_SEED = (1 << 63) - 1
MAX_BYTES = 1 << 60

SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
HEX = re.compile(r"[0-9a-f]{64}")

_ID = checks.matching(HEX, "64 hex digits")
_COUNT = checks.integer(0, MAX_COUNT)
_SPLIT = checks.matching(SPLIT_NAME, "a split's name (letters, digits, _.+-)")
_GRID = checks.list_of(checks.integer(1, 1 << 15), 2, 2)
_COLORS = checks.list_of(checks.number(-1e6, 1e6), 0, 3)
_FORMAT = checks.list_of(checks.integer(0, 999), 2, 2)
_SIDE = checks.rule(lambda v: type(v) is int or isinstance(v, str), "a number or a word")


@dataclass(frozen=True, kw_only=True)
class FileDigest(Record):
    """A file, by its length and its sha256."""

    bytes: Annotated[int, checks.integer(0, MAX_BYTES)]
    sha256: Annotated[str, _ID]


@dataclass(frozen=True, kw_only=True)
class SelectorIdentity(Record):
    """Who ranked the patches: method, model and weights, and how they computed.

    Attributes:
        method: by which patches are ranked; with MODULE:FUNCTION one of a user's own.
        model: timm's name; None where the method uses none.
        state: sha256 of its weights; of method masks, of their names and sizes.
        keep_rate: share of the patches that each stage keeps; None where K was given.
        counts: patches left after each stage.
        blocks: after which a stage ends.
        input_size: pixels a side of its input; None where no pixels are looked at.
        mean, std: by which its input is normalized.
        dtype: it computed in.
        compiled: by torch.compile.
        code: sha256 of the file of a user's own method.
    """

    method: Annotated[str, checks.text(300)]
    model: Annotated[str | None, checks.or_null(checks.text(300))]
    state: Annotated[str | None, checks.or_null(_ID)]
    keep_rate: Annotated[float | None, checks.or_null(checks.number(0, 1))]
    counts: Annotated[tuple[int, ...], checks.list_of(checks.integer(0, 65536), 0, 1000)]
    blocks: Annotated[tuple[int, ...], checks.list_of(checks.integer(0, 10_000), 0, 1000)]
    input_size: Annotated[int | None, checks.or_null(checks.integer(1, MAX_SIDE))]
    mean: Annotated[tuple[float, ...], _COLORS]
    std: Annotated[tuple[float, ...], _COLORS]
    dtype: Annotated[str, checks.text(30)]
    compiled: Annotated[bool, checks.one_of(True, False)]
    code: Annotated[str | None, checks.or_null(_ID)]


@dataclass(frozen=True, kw_only=True)
class LabelerIdentity(Record):
    """Who made the token labels.

    Attributes:
        model: timm's name.
        state: sha256 of its weights.
        input_size: pixels a side of its input.
        grid: rows and columns of places.
        top: classes a place, at most.
        mean, std: by which its input is normalized.
        dtype: it computed in.
        batch_size: images a batch.
    """

    model: Annotated[str, checks.text(300)]
    state: Annotated[str, _ID]
    input_size: Annotated[int, checks.integer(1, MAX_SIDE)]
    grid: Annotated[tuple[int, int], _GRID]
    top: Annotated[int, checks.integer(1, 1000)]
    mean: Annotated[tuple[float, ...], _COLORS]
    std: Annotated[tuple[float, ...], _COLORS]
    dtype: Annotated[str, checks.text(30)]
    batch_size: Annotated[int, checks.integer(1, 1 << 31)]


@dataclass(frozen=True, kw_only=True)
class RankedViews(Record):
    """How views are stored patch by patch; see `shards.ranked`.

    Attributes:
        quality: of the JPEGs.
        tokens: patches stored of each view, whole rows of the mosaic; N where nothing is cut off.
        cell: pixels a side of a patch's place in the mosaic.
        decoded: the selector saw the views as they are stored; else rankings were kept that a set had already.
    """

    quality: Annotated[int, checks.integer(1, 100)]
    tokens: Annotated[int, checks.integer(1, 65536)]
    cell: Annotated[int, checks.integer(1, MAX_SIDE)]
    decoded: Annotated[bool, checks.one_of(True, False)]


@dataclass(frozen=True, kw_only=True)
class Setting(Record):
    """What plan and manifest both say.

    Attributes:
        selector: who ranked the patches.
        img_size: S, pixels a side of a view as the selector sees it.
        patch_size: pixels a side of a patch.
        grid: (gh, gw), patches of a view.
        k: K, patches of a ticket; 0 where there are no rankings.
        exif: "ignore" or "apply": the frame that boxes refer to.
        store_side: pixels of an image's short side, to which larger ones were made smaller.
        seed: of views and order.
        token_labels: who made them; None where there are none.
        ranked: how views are stored instead of images; None where they are not.
    """

    selector: SelectorIdentity
    img_size: Annotated[int, checks.integer(1, MAX_SIDE)]
    patch_size: Annotated[int, checks.integer(1, MAX_SIDE)]
    grid: Annotated[tuple[int, int], _GRID]
    k: Annotated[int, checks.integer(0, 65536)]
    exif: Annotated[str, checks.one_of("ignore", "apply")]
    store_side: Annotated[int | None, checks.or_null(checks.integer(1, MAX_STORE_SIDE))]
    seed: Annotated[int, checks.integer(0, MAX_SEED)]
    token_labels: Annotated[LabelerIdentity | None, LabelerIdentity.parse] = None
    ranked: Annotated[RankedViews | None, RankedViews.parse] = None

    @property
    def num_patches(self) -> int:
        """N = gh * gw"""
        return math.prod(self.grid)

    def check_geometry(self, where: str) -> None:
        """
        Raises:
            TicketSetError: grid, sizes and K do not go together.
        """
        n = self.num_patches
        if n > 65536 or self.grid != (self.img_size // self.patch_size,) * 2:
            raise TicketSetError(
                f"{where}: grid: expected {self.img_size} px in patches of {self.patch_size} px, got {list(self.grid)}"
            )
        if self.k > n:
            raise TicketSetError(f"{where}: k: expected at most {n}, the patches of a view, got {self.k}")
        ranked = self.ranked
        if ranked and not (self.k <= ranked.tokens <= n and ranked.tokens % self.grid[1] == 0):
            raise TicketSetError(
                f"{where}: ranked: tokens: expected K = {self.k} to N = {n} in rows of {self.grid[1]}, got {ranked.tokens}"
            )
        if ranked and not (self.k and self.patch_size <= ranked.cell < self.patch_size + 8 and ranked.cell % 8 == 0):
            raise TicketSetError(f"{where}: ranked: cell: expected blocks of 8 px round a patch, got {ranked.cell}")
        if ranked and ranked.tokens * ranked.cell**2 > MAX_MOSAIC_PIXELS:
            raise TicketSetError(
                f"{where}: ranked: expected at most {MAX_MOSAIC_PIXELS} pixels a view, got {ranked.tokens} patches in cells"
                f" of {ranked.cell} px"
            )


@dataclass(frozen=True, kw_only=True)
class SplitViews(Record):
    """How the views of a split are drawn.

    Attributes:
        views: V, of an image, the canonical one included.
        scale: least and greatest share of the image's area.
        ratio: least and greatest width / height.
        hflip: probability of a flip.
    """

    views: Annotated[int, checks.integer(1, MAX_VIEWS)]
    scale: Annotated[tuple[float, float], checks.list_of(checks.number(0, 1), 2, 2)]
    ratio: Annotated[tuple[float, float], checks.list_of(checks.number(0, 1e6), 2, 2)]
    hflip: Annotated[float, checks.number(0, 1)]


@dataclass(frozen=True, kw_only=True)
class PlanCommon(Setting):
    """What a plan says of all splits.

    Attributes:
        algorithm: raised when the same options give other bytes.
        crop_pct: of view 0.
        interpolation: of views.
        images: "copy", "link" or "ranked".
        val_share: of train, for a val split that the source lacks.
        batch_size: views a batch.
        base: set_id of the ticket set that was the source.
        classes: digest of their names.
    """

    algorithm: Annotated[int, checks.integer(1, 1 << 31)]
    crop_pct: Annotated[float, checks.number(0, 1)]
    interpolation: Annotated[str, checks.text(100)]
    images: Annotated[str, checks.one_of("copy", "link", "ranked")]
    val_share: Annotated[float, checks.number(0, 1)]
    batch_size: Annotated[int, checks.integer(1, 1 << 31)]
    base: Annotated[str | None, checks.or_null(_ID)]
    classes: Annotated[str, _ID]


@dataclass(frozen=True, kw_only=True)
class PlanSplit(SplitViews):
    """What a plan says of one split.

    Attributes:
        inputs: hash of the listing.
        keys: digest of the keys.
        images: inputs that are mined.
        limit: at most so many inputs; None for all.
        shard_size: inputs a shard.
        shards: their number.
        plan_id: identity of what decides the split's bytes.
        retried_inputs: hash of the listing whose mended inputs were mined again.
    """

    inputs: Annotated[str, _ID]
    keys: Annotated[str, _ID]
    images: Annotated[int, _COUNT]
    limit: Annotated[int | None, checks.or_null(_COUNT)]
    shard_size: Annotated[int, checks.integer(1, MAX_COUNT)]
    shards: Annotated[int, checks.integer(0, MAX_SHARDS)]
    plan_id: Annotated[str, _ID]
    retried_inputs: Annotated[str | None, _ID] = None

    def identity(self, name: str, common: PlanCommon) -> str:
        """What `plan_id` should be: a hash of all that decides the bytes of this split."""
        said = self.to_json()
        decisive = {field: value for field, value in said.items() if field not in ("plan_id", "retried_inputs")}
        return fmt.digest({"common": common.to_json(), "name": name, "split": decisive})


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """plan.json: everything that determines the bytes of a ticket set. Make one with `Plan.of`.

    Attributes:
        format: (major, minor) that its sets need.
        plan_id: identity of the splits' plans together.
        common: what is so in all splits.
        splits: name -> what is so in one.
        recorded: versions and device, for people; never compared.
    """

    format: Annotated[tuple[int, int], _FORMAT]
    plan_id: Annotated[str, _ID]
    common: PlanCommon
    splits: Annotated[dict[str, PlanSplit], checks.mapping_of(_SPLIT, PlanSplit.parse, 1000)]
    recorded: Annotated[dict[str, Any] | None, checks.OBJECT] = None

    @classmethod
    def of(cls, common: PlanCommon, splits: dict[str, PlanSplit]) -> "Plan":
        """The plan of some splits, whose plan_ids are set."""
        version = fmt.FORMAT if common.k else fmt.TOKEN_LABELS_FORMAT
        return cls(format=version, plan_id=plan_identity(splits), common=common, splits=splits)

    def shards(self) -> list[tuple[str, int]]:
        """(split, number) of every shard."""
        return [(name, number) for name, split in self.splits.items() for number in range(split.shards)]


@dataclass(frozen=True, kw_only=True)
class Counts(Record):
    """What is in a split, or in the whole set.

    Attributes:
        shards: their number.
        samples: inputs that succeeded.
        failed: inputs that did not.
        bytes: of the tars.
        image_bytes: of the images in them, or of the views stored instead.
    """

    shards: Annotated[int, checks.integer(0, MAX_SHARDS)]
    samples: Annotated[int, _COUNT]
    failed: Annotated[int, _COUNT]
    bytes: Annotated[int, checks.integer(0, MAX_BYTES)]
    image_bytes: Annotated[int, checks.integer(0, MAX_BYTES)]


@dataclass(frozen=True, kw_only=True)
class SplitStats(SplitViews, Counts):
    """What the manifest says of a split: its views and its counts."""


@dataclass(frozen=True, kw_only=True)
class Member(Record):
    """What each sample's file of one name holds.

    Attributes:
        dtype: numpy's name, or words.
        shape: numbers, or words for what differs from sample to sample.
        columns: names along the last axis.
    """

    dtype: Annotated[str | None, checks.text(100)] = None
    shape: Annotated[tuple[int | str, ...] | None, checks.list_of(_SIDE, 0, 8)] = None
    columns: Annotated[tuple[str, ...] | None, checks.list_of(checks.text(100), 0, 100)] = None


@dataclass(frozen=True, kw_only=True)
class BaseLink(Record):
    """The set that holds a linked set's images: its identity, and where it is, from the linked set's folder."""

    set_id: Annotated[str, _ID]
    path: Annotated[str, checks.text(4096)]


@dataclass(frozen=True, kw_only=True)
class Manifest(Setting):
    """manifest.json: what is in a finished set.

    Attributes:
        format: (major, minor).
        kind: that it is a ticket set.
        plan_id: of its plan.
        set_id: identity of its contents.
        plan: the file plan.json.
        classes: their names, in the order of labels.
        members: name -> what each sample's file of this name holds.
        base: the set that holds the images; None where they are inside.
        splits: name -> views and counts.
        totals: of all splits.
        digest: hash of all other fields.
    """

    format: Annotated[tuple[int, int], _FORMAT]
    kind: Annotated[str, checks.one_of(fmt.KIND)]
    plan_id: Annotated[str, _ID]
    set_id: Annotated[str, _ID]
    plan: FileDigest
    classes: Annotated[tuple[str, ...], checks.list_of(checks.text(4096), 0, 1_000_000)]
    members: Annotated[dict[str, Member], checks.mapping_of(checks.text(100), Member.parse, 100)]
    base: Annotated[BaseLink | None, checks.or_null(BaseLink.parse)]
    splits: Annotated[dict[str, SplitStats], checks.mapping_of(_SPLIT, SplitStats.parse, 1000)]
    totals: Counts
    digest: Annotated[str | None, _ID] = None

    def identity(self) -> str:
        """What `digest` should be."""
        return fmt.manifest_digest(self.to_json())


@dataclass(frozen=True, kw_only=True)
class ShardStats(Record):
    """A shard's JSON, which says that the shard is done.

    Attributes:
        format: (major, minor).
        plan_id: of the split's plan.
        split: its name.
        shard: number of the shard within the split.
        samples: inputs that succeeded.
        failed: inputs that did not.
        image_bytes: of the images in the tar.
        tar, parquet: the two files.
        timing: seconds, by what took them; for people.
    """

    format: Annotated[tuple[int, int], _FORMAT]
    plan_id: Annotated[str, _ID]
    split: Annotated[str, _SPLIT]
    shard: Annotated[int, checks.integer(0, MAX_SHARDS)]
    samples: Annotated[int, checks.integer(0, MAX_SHARD_IMAGES)]
    failed: Annotated[int, checks.integer(0, MAX_SHARD_IMAGES)]
    image_bytes: Annotated[int, checks.integer(0, MAX_BYTES)]
    tar: FileDigest
    parquet: FileDigest
    timing: Annotated[dict[str, Any] | None, checks.OBJECT] = None

    @property
    def name(self) -> str:
        """The stem of its files."""
        return fmt.shard_name(self.split, self.shard)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """manifest.json, checked.

    Raises:
        TicketSetError: not the manifest of a ticket set, of a newer major format, or a field is not what it should be.
    """
    content = checks.parse_json(data, where)
    if content.get("kind") != fmt.KIND:
        raise TicketSetError(f"{where}: expected the manifest of a ticket set (kind {fmt.KIND!r})")
    fmt.check_format(content.get("format"), where)
    manifest = Manifest.parse(content, where)
    manifest.check_geometry(where)
    _check_members(manifest, where)
    if len(set(manifest.classes)) < len(manifest.classes):
        raise TicketSetError(f"{where}: classes: expected names that differ")
    return manifest


def parse_plan(data: bytes, where: str) -> Plan:
    """plan.json, checked.

    Raises:
        TicketSetError: not a plan, of a newer major format, or a field is not what it should be.
    """
    content = checks.parse_json(data, where)
    fmt.check_format(content.get("format"), where)
    plan = Plan.parse(content, where)
    plan.common.check_geometry(f"{where}: common")
    return plan


def parse_shard(data: bytes, where: str) -> ShardStats:
    """A shard's JSON, checked.

    Raises:
        TicketSetError: not a shard's JSON, of a newer major format, or a field is not what it should be.
    """
    content = checks.parse_json(data, where)
    fmt.check_format(content.get("format"), where)
    return ShardStats.parse(content, where)


def plan_identity(splits: dict[str, PlanSplit]) -> str:
    """What a plan's `plan_id` should be: a hash of its splits'."""
    return fmt.digest({name: split.plan_id for name, split in splits.items()})


def members_of(setting: Setting, num_classes: int, images: bool) -> dict[str, Member]:
    """What the samples of a set hold.

    Args:
        setting: of the set.
        num_classes: of the set.
        images: whether they are inside.
    """
    members = {fmt.LABEL: Member(dtype="ascii int", shape=())}
    if setting.k:
        n, columns = setting.num_patches, fmt.VIEW_COLUMNS
        members[fmt.RANKING] = Member(dtype=str(fmt.ranking_dtype(n)), shape=("views", n))
        members[fmt.VIEWS] = Member(dtype="int32", shape=("views", len(columns)), columns=columns)
    if setting.token_labels:
        shape = token_labels.shape(num_classes, setting.token_labels.grid[0])
        members[fmt.TOKEN_LABELS] = Member(dtype="uint16", shape=shape)
    if setting.ranked:
        members[fmt.RANKED] = Member(dtype="table and JPEG files", shape=("views", setting.ranked.tokens))
    elif images:
        members["|".join(fmt.IMAGE_MEMBERS)] = Member(dtype="image file", shape=("height", "width", 3))
    return members


def check_split_name(name: str, where: str) -> None:
    """
    Raises:
        TicketSetError: a name that cannot be part of file names.
    """
    _SPLIT(name, where)


def _check_members(manifest: Manifest, where: str) -> None:
    """The members that this version knows are what it would have written."""
    members = manifest.members
    if fmt.TOKEN_LABELS in members and not (manifest.token_labels and manifest.classes):
        raise TicketSetError(f"{where}: members: token labels without their model or without classes")
    if (fmt.RANKING in members) != (manifest.k > 0):
        raise TicketSetError(f"{where}: k: expected one above 0 where there are rankings, and only there")
    if (fmt.RANKED in members) != (manifest.ranked is not None) or (manifest.ranked and manifest.base):
        raise TicketSetError(f"{where}: ranked: expected it where ranked views are members, and only there")
    known = {fmt.TOKEN_LABELS, fmt.RANKED} & members.keys() | ({fmt.RANKING, fmt.VIEWS} if manifest.k else set())
    expected = members_of(manifest, len(manifest.classes), images=False)
    for name in sorted(known):
        said, found = expected[name].to_json(), members[name].to_json() if name in members else {}
        for field, value in said.items():
            if found.get(field) != value:
                raise TicketSetError(
                    f"{where}: members: {name}: {field}: expected {value}, got {reprlib.repr(found.get(field))}"
                )
