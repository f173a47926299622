"""Format 1.3 of a ticket set: names, versions, dtypes, and the bytes of its members.

A sample of `train-000000.tar` is these tar members in this order (docs/FORMAT.md draws the bytes):

    KEY.cls           ASCII digits, the label; absent where the image has none
    KEY.jpg|png|webp  the image; absent in a linked set and in one of ranked views
    KEY.labels.npy    [2, T, G, G] uint16, token labels (`shards.token_labels`); only since 1.1, only where they were mined
    KEY.ranking.npy   [V, N] uint8 (uint16 where N > 256), most informative patch first
    KEY.views.npy     [V, 5] int32, columns VIEW_COLUMNS
    KEY.ranked.bin    the views themselves, patch by patch in ranked order (`shards.ranked`); only since 1.2, and last, so
                      that all it takes to read a part of it stands before

Every JSON file is written by `canonical_json`, so that equal contents are equal bytes.
"""

import functools
import hashlib
import io
import json
import math
import re
import reprlib
import tokenize
from typing import Any

import numpy as np

from shards.errors import TicketSetError, first_line

KIND = "datalth-ticket-set"
FORMAT = (1, 3)  # (major, minor): readers refuse a higher major and ignore what a higher minor added
SPREAD_FORMAT = (1, 3)  # since then the index of a set with rankings says how scores are spread
TOKEN_LABELS_FORMAT = (1, 1)  # what a set is written as that holds token labels alone

PLAN = "plan.json"
MANIFEST = "manifest.json"
TIMM_INFO = "_info.json"  # timm's wds/ reader
OPEN_CLIP_SIZES = "sizes.json"
INDEX = "index"
SHARD_JSON = re.compile(r".*-[0-9]{6}\.json", re.DOTALL)
CLAIMS, LISTINGS = "claims", "listings"  # while several workers mine: who is at which shard, what is in remote tars

IMAGE_MEMBERS = ("jpg", "png", "webp")
RANKING, VIEWS, LABEL, TOKEN_LABELS, RANKED = "ranking.npy", "views.npy", "cls", "labels.npy", "ranked.bin"
PIXEL_MEMBERS = (*IMAGE_MEMBERS, RANKED)
VIEW_COLUMNS = ("top", "left", "height", "width", "flip")


def shard_name(split: str, number: int) -> str:
    """`train-000000`, the stem shared by a shard's tar, parquet and JSON."""
    return f"{split}-{number:06d}"


def taken_mark(by: str) -> bytes:
    """What stands in the place of a shard's JSON while its files are replaced; no JSON of a shard is as short.

    Args:
        by: 32 hex digits that nobody else has.
    """
    return canonical_json({"taken_over": by})


def is_mark(size: int) -> bool:
    """Whether a shard's JSON of so many bytes is `taken_mark`: a listing shall do to tell."""
    return size <= len(taken_mark("0" * 32))


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, indented, UTF-8, newline at the end."""
    return _spell(value).encode()


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    # Somebody's file may hold half a character where nothing looks at it.
    return hashlib.sha256(_spell(value).encode("utf-8", "surrogatepass")).hexdigest()


def _spell(value: Any) -> str:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def manifest_digest(manifest: dict[str, Any]) -> str:
    """The manifest's hash of itself: of everything in it but this hash."""
    return digest({field: value for field, value in manifest.items() if field != "digest"})


def check_format(found: Any, where: str, ours: tuple[int, int] = FORMAT) -> None:
    """Refuse a format this code cannot read.

    Raises:
        TicketSetError: `found` is no [major, minor], or its major version is higher than ours.
    """
    if not (isinstance(found, list) and len(found) == 2 and all(type(v) is int and 0 <= v < 1000 for v in found)):
        raise TicketSetError(f"{where}: expected a format version [major, minor], got {reprlib.repr(found)}")
    if found[0] > ours[0]:
        raise TicketSetError(
            f"{where}: format {found[0]}.{found[1]}, but this datalth reads up to {ours[0]}.x; upgrade datalth"
        )


def ranking_dtype(num_patches: int) -> np.dtype:
    """uint8 where every patch index fits, else uint16 (little-endian)."""
    if num_patches > 65536:
        raise TicketSetError(f"patch grid: expected at most 65536 patches, got {num_patches}")
    return np.dtype("u1" if num_patches <= 256 else "<u2")


def encode_npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file, version 1.0."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def decode_npy(data: bytes, where: str = "") -> np.ndarray:
    """A read-only array over .npy bytes: np.load without pickle, and without parsing each header anew.

    Args:
        data: of the member.
        where: for the error.
    Raises:
        TicketSetError: not a .npy 1.0 file in C order, or its length is not what its header says.
    """
    length = int.from_bytes(data[8:10], "little")
    try:
        dtype, shape = _npy_header(bytes(data[: 10 + length]))
        count = math.prod(shape)  # of Python's integers: numpy's would wrap round
        if len(data) - 10 - length != count * dtype.itemsize:
            raise TicketSetError(
                f".npy member: expected {count * dtype.itemsize} bytes of data, got {len(data) - 10 - length}"
            )
    except TicketSetError as error:
        raise TicketSetError(f"{where}: {error}" if where else str(error)) from None
    return np.ndarray(shape, dtype, data, 10 + length)


@functools.lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """dtype and shape; cached, since a ticket set has a handful of different headers."""
    stream = io.BytesIO(header)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("expected version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise TicketSetError(f".npy member: {first_line(error)}") from None
    if fortran or dtype.kind not in "biuf":
        raise TicketSetError(f".npy member: expected plain numbers in C order, got {str(dtype)[:100]}")
    if len(shape) > 8 or not all(0 <= side < 1 << 31 for side in shape):
        raise TicketSetError(f".npy member: expected a shape of up to 8 sides, got {reprlib.repr(shape)}")
    return dtype, shape


def pack_ticket(ticket: np.ndarray, num_patches: int) -> bytes:
    """Bitmap of a ticket: bit i (most significant first) is 1 where patch i is kept. ceil(N/8) bytes."""
    mask = np.zeros(num_patches, bool)
    mask[ticket] = True
    return np.packbits(mask).tobytes()


def unpack_ticket(bitmap: bytes, num_patches: int) -> np.ndarray:
    """The bool [N] mask that `pack_ticket` packed."""
    return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=num_patches).astype(bool)
