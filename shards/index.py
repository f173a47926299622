"""The index of a shard: one row per INPUT sample, failures too (docs/FORMAT.md explains the columns).

A parquet file of a few MB may stand for any number of gigabytes (runs, dictionaries, compression), so what it would become
is added up before it is made.
"""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards import spread
from shards.errors import TicketSetError, first_line
from shards.keys import KEY_PATTERN
from shards.schema import MAX_SHARD_IMAGES
from shards.tar import BLOCK

MAX_BYTES = 256 << 20  # of the columns read, in memory


def index_schema(num_patches: int, spread: bool = False) -> pa.Schema:
    """Columns of index/*.parquet, of all splits the same, so that they are one table.

    Args:
        num_patches: N.
        spread: whether the index says how views' scores are spread.
    """
    more = [("spread", pa.binary())] if spread else []
    return pa.schema(
        [
            ("key", pa.string()),
            ("source", pa.string()),
            ("label", pa.int32()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("source_width", pa.int32()),
            ("source_height", pa.int32()),
            ("source_bytes", pa.int64()),
            ("orientation", pa.int8()),
            ("status", pa.string()),
            ("error", pa.string()),
            ("transcoded", pa.bool_()),
            ("offset", pa.int64()),
            ("bytes", pa.int64()),
            ("ticket", pa.binary(-(-num_patches // 8))),
            ("k", pa.int32()),
            ("mean_score", pa.float32()),
            ("entropy", pa.float32()),
            *more,
        ]
    )


def read_index(data: bytes, where: str, num_patches: int, num_classes: int, views: int | None = None) -> pa.Table:
    """The index of one shard, checked: what it says can be used as a key, a label, a place in the tar, a frame.

    Args:
        data: the parquet file.
        where: for errors.
        num_patches: N of the set.
        num_classes: of the set; labels are below it.
        views: V, where the set's format says that there is the column `spread`.
    Raises:
        TicketSetError: not a parquet file, or not such an index.
    """
    schema = index_schema(num_patches, views is not None)
    table = read_parquet(data, where, schema.names)
    for field in schema:
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise TicketSetError(f"{where}: column {field.name}: expected {field.type}, got {found}")
    _require(table, where, "key", pc.match_substring_regex(table["key"], KEY_PATTERN), "a key")
    if pc.count_distinct(table["key"]).as_py() < len(table):
        raise TicketSetError(f"{where}: expected keys that differ, got some that stand twice in the shard")
    ok = pc.equal(table["status"], "ok")
    _require(table, where, "status", pc.or_(ok, pc.equal(table["status"], "failed")), "ok or failed")
    below = pc.and_(pc.greater_equal(table["label"], 0), pc.less(table["label"], num_classes))
    unlabeled = pc.is_null(table["label"])
    _require(table, where, "label", pc.or_kleene(below, unlabeled), f"a number below {num_classes}, or none")
    good = table.filter(ok)
    for name in ("width", "height"):
        _require(good, where, name, pc.greater(good[name], 0), "a number of pixels")
    for name, least in (("offset", 0), ("bytes", BLOCK)):
        whole = pc.equal(pc.multiply(pc.divide(good[name], BLOCK), BLOCK), good[name])
        _require(good, where, name, pc.and_(pc.greater_equal(good[name], least), whole), f"blocks of {BLOCK} bytes")
    if views is not None:
        size = spread.size(views, num_patches)
        sized = pc.or_kleene(pc.is_null(table["spread"]), pc.equal(pc.binary_length(table["spread"]), size))
        _require(table, where, "spread", sized, f"{size} bytes, for {views} views, or none")
        counts = spread.decode(table["spread"].to_pylist(), views, num_patches)
        sound = pa.chunked_array([pa.array(spread.is_sound(counts, num_patches))])
        _require(table, where, "spread", sound, f"numbers of patches that rise from 1 to {num_patches}, or none")
    return table


def _require(table: pa.Table, where: str, name: str, holds: pa.ChunkedArray, says: str) -> None:
    """Every value of a column must hold; a null does not."""
    bad = pc.index(pc.fill_null(holds, False), False).as_py()
    if bad >= 0:
        key, value = table["key"][bad].as_py(), table[name][bad].as_py()
        at = "" if name == "key" else f" of {key}"
        raise TicketSetError(f"{where}: column {name}: expected {says}, got {str(value)[:100]!r}{at}")


def read_parquet(data: bytes, where: str, columns: Sequence[str], most: int = MAX_SHARD_IMAGES) -> pa.Table:
    """Some columns of a small parquet file, read in this thread: Arrow's pools cost more than they give, and may abort at exit.

    Raises:
        TicketSetError: not a parquet file, a column is missing, or it has more than `most` rows or MAX_BYTES.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
        rows, schema = file.metadata.num_rows, file.schema_arrow
        missing = next((name for name in columns if name not in schema.names), None)
        if missing is not None or len(set(schema.names)) < len(schema.names):
            raise TicketSetError(f"{where}: no column {missing}" if missing else f"{where}: columns of one name")
        texts = {name: kind for name in columns if (kind := schema.field(name).type) in (pa.string(), pa.binary())}
        fixed = [schema.field(name).type for name in columns if name not in texts]
        odd = next((kind for kind in fixed if not _is_plain(kind)), None)
        if odd is not None:
            raise TicketSetError(f"{where}: expected columns of plain values, got {odd}")
        _check_size(where, rows, most, rows * sum(kind.bit_width for kind in fixed) // 8)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        _check_size(where, rows, most, sum(group.total_byte_size for group in groups))
        # As dictionaries: a text that a million rows share is then in memory once, and can be multiplied out on paper.
        file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False, read_dictionary=[*texts])
        table = file.read(list(columns), use_threads=False)
        for name, kind in texts.items():
            column = table[name].combine_chunks()
            lengths = pc.binary_length(column.dictionary).take(column.indices)
            _check_size(where, rows, most, pc.sum(lengths).as_py() or 0)
            table = table.set_column(table.schema.get_field_index(name), name, column.cast(kind))
        table.validate(full=True)  # text is UTF-8
        return table
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, TicketSetError):
            raise
        raise TicketSetError(f"{where}: not a readable parquet file: {first_line(error)}") from None


def _is_plain(kind: pa.DataType) -> bool:
    return bool(pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind))


def _check_size(where: str, rows: int, most: int, size: int) -> None:
    if not 0 <= rows <= most or not 0 <= size <= MAX_BYTES:
        raise TicketSetError(
            f"{where}: expected at most {most} rows and {MAX_BYTES >> 20} MiB of columns, got {rows} rows and"
            f" {size >> 20} MiB"
        )
