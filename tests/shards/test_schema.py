"""Files of a ticket set that lie: each field is checked where it is read, and nothing below trusts it."""

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import inspect, mine
from shards import format as fmt
from shards import schema
from shards.errors import ImageError, TicketSetError
from shards.index import index_schema, read_index
from shards.reader import TicketSet
from shards.rows import Rows
from shards.tar import split_members
from shards.verify import MAX_PROBLEMS, verify

pytestmark = pytest.mark.slow

HEX = "0" * 64


@pytest.fixture
def forged(center_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(center_set, tmp_path / "set"))


def seal(folder: Path) -> None:
    """Make every hash agree with what is there, as a forger would: the fast verify of before finds nothing."""
    shards = []
    for path in sorted(folder.glob("*-[0-9]*.json")):
        stats = json.loads(path.read_bytes())
        for member, name in (("tar", f"{path.stem}.tar"), ("parquet", f"index/{path.stem}.parquet")):
            data = (folder / name).read_bytes()
            stats[member] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_bytes(fmt.canonical_json(stats))
        shards.append([stats["split"], stats["shard"], stats["tar"]["sha256"], stats["parquet"]["sha256"]])
    manifest = json.loads((folder / "manifest.json").read_bytes())
    plan = (folder / "plan.json").read_bytes()
    manifest["plan"] = {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    manifest["set_id"] = fmt.digest(sorted(shards))
    manifest["digest"] = fmt.manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(fmt.canonical_json(manifest))


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(json.dumps(content).encode())


def put(*names: str | int, value: Any) -> Callable[[dict], None]:
    """Set a value deep inside."""

    def change(content: Any) -> None:
        for name in names[:-1]:
            content = content[name]
        content[names[-1]] = value

    return change


def rename_split(to: str) -> Callable[[dict], None]:
    return lambda manifest: manifest["splits"].update({to: manifest["splits"].pop("train")})


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("name: expected a split's name", rename_split("../victim/train")),
        ("name: expected a split's name", rename_split("/etc/train")),
        ("name: expected a split's name", rename_split("..")),
        ("name: expected a split's name", rename_split("a\nb")),
        ("name: expected a split's name", rename_split("")),
        ("set_id: expected 64 hex digits", put("set_id", value="../../../home/user/x")),
        ("set_id: expected 64 hex digits", put("set_id", value=HEX + "\n")),
        ("set_id: expected 64 hex digits", put("base", value={"set_id": "../../x", "path": "../base"})),
        ("path: expected 1 to 4096 characters", put("base", value={"set_id": HEX, "path": "a\x1b]0;b"})),
        ("path: expected 1 to 4096 characters", put("base", value={"set_id": HEX, "path": 7})),
        ("shards: expected a whole number from 0 to", put("splits", "train", "shards", value=10**9)),
        ("shards: expected a whole number from 0 to", put("splits", "train", "shards", value=-1)),
        ("shards: expected a whole number from 0 to", put("splits", "train", "shards", value=True)),
        ("views: expected a whole number from 1 to", put("splits", "train", "views", value=0)),
        ("k: expected at most 16", put("k", value=17)),
        ("k: expected a whole number", put("k", value=4.0)),
        ("grid: expected 64 px in patches of 16 px", put("grid", value=[4, 5])),
        ("grid: expected 64 px in patches of 8 px", put("patch_size", value=8)),
        ("grid: expected a list of 2 to 2", put("grid", value=[4, 4, 4])),
        ("seed: expected a whole number", put("seed", value=10**30)),
        ("exif: expected one of", put("exif", value="IGNORE")),
        ("classes[1]: expected 1 to 4096 characters", put("classes", 1, value="bee\nbug")),
        ("classes[1]: expected 1 to 4096 characters", put("classes", 1, value="\ud800")),
        ("classes: expected names that differ", put("classes", 1, value="ant")),
        ("ranking.npy: dtype: expected uint8", put("members", "ranking.npy", "dtype", value="object")),
        ("views.npy: columns: expected", put("members", "views.npy", "columns", value=["left", "top"])),
        ("selector: mean: expected a list", put("selector", "mean", value={})),
        ("selector: lacks the field 'blocks'", lambda m: m["selector"].pop("blocks")),
        ("hflip: expected a number from 0 to 1", put("splits", "val", "hflip", value="0.5")),
        ("format version", put("format", value=[10**400, 0])),
    ],
)
def test_a_manifest_whose_field_is_none_ends_in_one_line(forged: Path, words: str, change: Any) -> None:
    edit(forged / "manifest.json", change)
    for command in (("info",), ("verify", "--deep"), ("ls",)):
        output = inspect(command[0], forged, *command[1:], code=1).output
        assert words in output and output.count("\n") == 1, output
    assert words in mine("--data", forged, "--out", forged.parent / "new", "--method", "center", code=1).output
    assert sorted(p.name for p in forged.parent.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("ranked: tokens: expected K = 6 to N = 16 in rows of 4, got 4", put("ranked", "tokens", value=4)),
        ("ranked: tokens: expected K = 6 to N = 16 in rows of 4, got 10", put("ranked", "tokens", value=10)),
        ("ranked: tokens: expected K = 6 to N = 16 in rows of 4, got 20", put("ranked", "tokens", value=20)),
        ("ranked: cell: expected blocks of 8 px", put("ranked", "cell", value=8)),
        ("cell: expected a whole number", put("ranked", "cell", value="16")),
        ("quality: expected a whole number from 1 to 100", put("ranked", "quality", value=101)),
        ("decoded: expected one of", put("ranked", "decoded", value=None)),
        ("ranked.bin: shape: expected", put("members", "ranked.bin", "shape", value=["views", 8])),
        ("ranked: expected it where ranked views are members", lambda m: m.pop("ranked")),
        ("ranked: expected it where ranked views are members", lambda m: m["members"].pop("ranked.bin")),
        ("ranked: expected it where ranked views are members", put("base", value={"set_id": HEX, "path": "../base"})),
        ("ranked: expected at most 33554432 pixels a view, got 16 patches in cells of 2048 px",
         lambda m: m.update(img_size=8192, patch_size=2048, ranked={**m["ranked"], "cell": 2048})),
    ],
)  # fmt: skip
def test_a_manifest_of_ranked_views_that_cannot_be_ends_in_one_line(
    ranked_set: Path, tmp_path: Path, words: str, change: Any
) -> None:
    forged = Path(shutil.copytree(ranked_set, tmp_path / "set"))
    edit(forged / "manifest.json", change)
    for command in (("info",), ("verify", "--deep"), ("ls",)):
        output = inspect(command[0], forged, *command[1:], code=1).output
        assert words in output and output.count("\n") == 1, output


@pytest.mark.parametrize(
    "text", [b"[" * 200_000, b'{"a": ' * 50_000, b'{"format": NaN}', b"\xff\xfe{}", b"9" * 10_000, b"", b'"x"', b"null"]
)
def test_json_that_is_none_is_one_line(forged: Path, text: bytes) -> None:
    for name in ("manifest.json", "train-000000.json", "plan.json"):
        path = forged / name
        before = path.read_bytes()
        path.write_bytes(text)
        output = inspect("verify", forged, code=1).output
        assert name in output and "Traceback" not in output
        path.write_bytes(before)
    inspect("verify", forged, code=0)


@pytest.mark.parametrize(
    ("name", "words", "change"),
    [
        ("plan.json", "shard_size: expected a whole number", put("splits", "train", "shard_size", value="10")),
        ("plan.json", "name: expected a split's name", lambda p: p["splits"].update({"../x": p["splits"]["train"]})),
        ("plan.json", "common: grid: expected 64 px", put("common", "grid", value=[5, 5])),
        ("train-000000.json", "samples: expected a whole number", put("samples", value=10**9)),
        ("train-000000.json", "bytes: expected a whole number", put("tar", "bytes", value=10**30)),
        ("train-000000.json", "sha256: expected 64 hex digits", put("tar", "sha256", value="a")),
        ("train-000000.json", "lacks the field 'parquet'", lambda s: s.pop("parquet")),
    ],
)
def test_plan_and_shard_json_are_checked_too(forged: Path, name: str, words: str, change: Any) -> None:
    edit(forged / name, change)
    seal_all_but_shards(forged)
    output = inspect("verify", forged, code=1).output
    assert f"{name}: " in output and words in output and "Traceback" not in output


def test_half_a_character_where_nothing_looks_is_no_matter(forged: Path) -> None:
    edit(forged / "manifest.json", put("later", value="\ud800"))
    edit(forged / "plan.json", put("common", "later", value="\ud800"))
    seal_all_but_shards(forged)
    output = inspect("verify", forged, code=1).output
    assert "not as it was written: its digest is of other contents" in output
    assert "plan.json: split train is not what its plan_id" in output


def test_records_give_back_what_they_read(forged: Path) -> None:
    """Fields of a later minor version among it, so that hashes of the whole stay right."""
    parsers = {"manifest": schema.parse_manifest, "plan": schema.parse_plan, "train-000000": schema.parse_shard}
    for name, parse in parsers.items():
        data = (forged / f"{name}.json").read_bytes()
        assert fmt.canonical_json(parse(data, "here").to_json()) == data
        content = json.loads(data) | {"later": [1, {"a": None}], "others": 2}
        for nested in ("selector", "base", "tar"):
            if isinstance(content.get(nested), dict):
                content[nested]["later"] = [0.5]
        later = parse(fmt.canonical_json(content), "here")
        assert later.to_json() == content and later != parse(data, "here")
    manifest = schema.parse_manifest((forged / "manifest.json").read_bytes(), "here")
    assert manifest.identity() == manifest.digest and manifest.grid == (4, 4) and manifest.selector.method == "center"
    plan = schema.parse_plan((forged / "plan.json").read_bytes(), "here")
    assert {name: split.identity(name, plan.common) for name, split in plan.splits.items()} == {
        name: split.plan_id for name, split in plan.splits.items()
    }


def seal_all_but_shards(folder: Path) -> None:
    plan = (folder / "plan.json").read_bytes()
    said = {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    edit(folder / "manifest.json", lambda m: m.update(plan=said))


def test_a_million_missing_shards_are_not_listed_one_by_one(forged: Path) -> None:
    edit(forged / "manifest.json", put("splits", "train", "shards", value=10**6))
    problems = verify(TicketSet.open(str(forged)))
    assert len(problems) == MAX_PROBLEMS + 1 and problems[-1] == f"stopped after {MAX_PROBLEMS} problems"


# --- bases


def test_a_base_that_is_itself_or_a_link_or_elsewhere_is_one_line(forged: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    mine("--data", forged, "--out", link, "--method", "random", "--images", "link")
    own = json.loads((link / "manifest.json").read_bytes())["set_id"]
    for base, words in (
        ({"set_id": own, "path": "."}, "is a linked set itself"),
        ({"set_id": own, "path": "../link/../link"}, "is a linked set itself"),
        ({"set_id": own, "path": "ftp://127.0.0.1:9/base"}, "a local set's is a local folder"),
        ({"set_id": own, "path": "nowhere"}, "cannot be opened"),
        ({"set_id": own, "path": "../set"}, "has changed"),
    ):
        edit(link / "manifest.json", put("base", value=base))
        output = inspect("info", link, code=1).output
        assert words in output and output.count("\n") == 1, output
    assert "set" in inspect("info", link, "--base", forged, code=1).output  # named by the user, still another set


def test_deep_says_what_it_has_not_read_of_a_base(forged: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    mine("--data", forged, "--out", link, "--method", "random", "--images", "link")
    assert "were not hashed; --base-too" in inspect("verify", link, "--deep").output
    assert "were not hashed" not in inspect("verify", link, "--deep", "--base-too").output
    assert json.loads(inspect("verify", link, "--deep", "--json").output)["base_not_hashed"].endswith("set")
    tar = forged / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1  # behind the last sample: only a hash tells
    tar.write_bytes(data)
    inspect("verify", link, "--deep")
    output = inspect("verify", link, "--deep", "--base-too", code=1).output
    assert "base " in output and "train-000001.tar: expected sha256" in output
    assert "is not linked" in inspect("verify", forged, "--base-too", code=1).output


# --- the index


def rewrite(folder: Path, name: str, change: Callable[[list[dict]], Any]) -> None:
    path = folder / "index" / f"{name}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    seal(folder)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("column key: expected a key, got '../../etc/passwd'", lambda rows: rows[0].update(key="../../etc/passwd")),
        ("column key: expected a key", lambda rows: rows[0].update(key="k" * 89)),
        ("column key: expected a key", lambda rows: rows[0].update(key="a\x1b[2J")),
        ("column key: expected a key", lambda rows: rows[0].update(key=None)),
        ("expected keys that differ", lambda rows: rows[0].update(key=rows[1]["key"])),
        ("column label: expected a number below 3, or none, got '3'", lambda rows: rows[4].update(label=3)),
        ("column label: expected a number below 3, or none, got '-1'", lambda rows: rows[4].update(label=-1)),
        ("column status: expected ok or failed", lambda rows: rows[2].update(status="fine")),
        ("column height: expected a number of pixels", lambda rows: rows[2].update(height=0)),
        ("column offset: expected blocks of 512 bytes", lambda rows: rows[2].update(offset=-512)),
        ("column offset: expected blocks of 512 bytes", lambda rows: rows[2].update(offset=7)),
        ("column bytes: expected blocks of 512 bytes", lambda rows: rows[2].update(bytes=None)),
    ],
)
def test_an_index_is_checked_where_it_is_read(forged: Path, words: str, change: Any) -> None:
    rewrite(forged, "train-000000", change)
    opened = TicketSet.open(str(forged))
    for read in (lambda: opened.table("train"), lambda: list(opened.stream("train")), lambda: Rows(opened, "train")):
        with pytest.raises(TicketSetError) as caught:
            read()
        assert words in str(caught.value)
    assert words in inspect("verify", forged, code=1).output


def test_a_huge_extent_reads_no_more_than_the_tar_holds(forged: Path) -> None:
    rewrite(forged, "train-000000", lambda rows: rows[9].update(bytes=512 * 10**12))
    with pytest.raises(TicketSetError, match="expected a member of"):
        list(TicketSet.open(str(forged)).stream("train"))


def bomb(**columns: pa.Array) -> bytes:
    rows = len(next(iter(columns.values())))
    table = pa.table({f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in index_schema(16)})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


@pytest.mark.slow
def test_an_index_that_would_fill_the_memory_is_refused_before_it_is_read() -> None:
    texts = bomb(error=pa.array(["x" * 4096] * (1 << 17)))  # 512 MiB of text
    assert len(texts) < 100_000
    rows = bomb(label=pa.array(np.zeros((1 << 20) + 1, np.int32)))
    for data in (texts, rows):
        with pytest.raises(TicketSetError, match="expected at most 1048576 rows and 256 MiB"):
            read_index(data, "here", 16, 3)


@pytest.mark.parametrize(
    ("words", "table"),
    [
        ("no column key", pa.table({"source": ["a"]})),
        ("expected columns of plain values", pa.table({f.name: pa.array([[1]]) for f in index_schema(16)})),
        ("column label: expected int32, got int64", pa.table({f.name: pa.nulls(1, pa.int64() if f.name == "label" else f.type) for f in index_schema(16)})),
        ("column ticket: expected fixed_size_binary", pa.table({f.name: pa.nulls(1, f.type) for f in index_schema(64)})),
    ],
)  # fmt: skip
def test_an_index_of_other_columns_is_refused(words: str, table: pa.Table) -> None:
    out = io.BytesIO()
    pq.write_table(table, out)
    with pytest.raises(TicketSetError, match=words):
        read_index(out.getvalue(), "here", 16, 3)


def test_text_that_is_no_text_is_refused() -> None:
    data = bomb(source=pa.array(["abcdefgh"]), key=pa.array(["k"]), status=pa.array(["failed"]))
    assert len(read_index(data, "here", 16, 3)) == 1
    plain = pa.table({f.name: pa.nulls(1, f.type) for f in index_schema(16)})
    plain = plain.set_column(0, "key", pa.array(["abcdefgh"])).set_column(9, "status", pa.array(["failed"]))
    out = io.BytesIO()
    pq.write_table(plain, out, use_dictionary=False, compression="none")
    broken = out.getvalue().replace(b"abcdefgh", b"abc\xff\xfefgh")
    with pytest.raises(TicketSetError, match="here: "):
        read_index(broken, "here", 16, 3)


# --- members


def replace_members(folder: Path, name: str, change: Callable[[str, bytes], bytes]) -> None:
    """Write a shard's tar anew with other member contents, its index and every hash agreeing."""
    from shards.tar import SampleTarWriter

    opened = TicketSet.open(str(folder))
    rows = opened.joined(name).to_pylist()
    data = (folder / f"{name}.tar").read_bytes()
    out = io.BytesIO()
    writer = SampleTarWriter(out)
    extents = {}
    for row in rows:
        members = split_members(data[row["offset"] : row["offset"] + row["bytes"]], row["key"], "")
        changed = {member: change(member, content) for member, content in members.items()}
        extents[row["key"]] = writer.write(row["key"], changed)
    writer.close()
    (folder / f"{name}.tar").write_bytes(out.getvalue())

    def move(rows: list[dict]) -> None:
        for row in rows:
            row["offset"], row["bytes"] = extents[row["key"]]

    rewrite(folder, name, move)


def ranking(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[str, bytes], bytes]:
    return lambda member, data: fmt.encode_npy(change(fmt.decode_npy(data).copy())) if member == fmt.RANKING else data


def boxes(row: int, column: int, value: int) -> Callable[[str, bytes], bytes]:
    def change(member: str, data: bytes) -> bytes:
        if member != fmt.VIEWS:
            return data
        views = fmt.decode_npy(data).copy()
        views[row, column] = value
        return fmt.encode_npy(views)

    return change


def first_twice(rankings: np.ndarray) -> np.ndarray:
    rankings[:, 0] = rankings[:, 1]
    return rankings


def beyond(rankings: np.ndarray) -> np.ndarray:
    rankings[rankings == 3] = 16
    return rankings


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("permutations of 16 patches", ranking(first_twice)),
        ("permutations of 16 patches", ranking(beyond)),
        ("expected uint8 rankings", ranking(lambda r: r.astype(np.float32))),
        ("expected uint8 rankings", ranking(lambda r: r.astype(np.int64))),
        ("train/bee/bee_5: .npy member: expected plain numbers", ranking(lambda r: r.astype(np.complex64))),
        ("expected plain numbers", ranking(lambda r: r.astype("S1"))),
        ("expected uint8 rankings of 3 views", ranking(lambda r: r[:2])),
        ("expected uint8 rankings of 3 views", ranking(lambda r: r[:, :15])),
        ("expected uint8 rankings of 3 views", ranking(lambda r: r[None])),
        ("view 1 is not inside the 80x60 image", boxes(1, 0, -1)),
        ("view 2 is not inside the 80x60 image", boxes(2, 3, 2**31 - 1)),
        ("view 1 is not inside the 80x60 image", boxes(1, 2, 0)),
        ("view 1 is not inside the 80x60 image", boxes(1, 4, 2)),
        ("(index) in .cls, got b'9'", lambda m, d: b"9" if m == "cls" else d),
        ("(index) in .cls", lambda m, d: b"1_0" if m == "cls" else d),
    ],
)
def test_a_sample_is_checked_where_it_is_read(forged: Path, words: str, change: Any) -> None:
    """The fast verify finds nothing in these sets: every hash agrees."""
    replace_members(forged, "train-000000", change)
    inspect("verify", forged)
    opened = TicketSet.open(str(forged))
    rows = Rows(opened, "train")
    with pytest.raises(TicketSetError) as caught:
        list(opened.stream("train"))
    assert words in str(caught.value)
    with pytest.raises(TicketSetError) as caught:
        [rows.read(0, row) for row in range(rows.sizes[0])]
    assert words in str(caught.value)
    output = inspect("verify", forged, "--deep", code=1).output
    assert words in output and "Traceback" not in output
    assert words in mine("--data", forged, "--out", forged.parent / "new", "--method", "center", code=1).output


def test_an_image_of_another_size_than_its_row_is_refused(forged: Path) -> None:
    other = next(TicketSet.open(str(forged)).stream("val")).image

    def swap(member: str, data: bytes) -> bytes:
        from PIL import Image

        if member not in fmt.IMAGE_MEMBERS:
            return data
        out = io.BytesIO()
        Image.open(io.BytesIO(other)).resize((90, 70)).save(out, "JPEG" if member == "jpg" else "PNG")
        return out.getvalue()

    replace_members(forged, "train-000000", swap)
    sample = next(TicketSet.open(str(forged)).stream("train"))
    with pytest.raises(ImageError, match="expected an image of 80x60 pixels, got 90x70"):
        sample.render(0, 32)
    assert "expected an image of 80x60" in inspect("verify", forged, "--deep", code=1).output


@pytest.mark.parametrize("shape", [(2**32, 2**32), (-1, 16), (2**62,), (1,) * 9, (0, 10**30)])
def test_shapes_that_wrap_round_are_refused(shape: tuple[int, ...]) -> None:
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    with pytest.raises(TicketSetError, match=".npy member"):
        fmt.decode_npy(header)


@pytest.mark.parametrize(
    "text", [b"(" * 9000, b"{'descr': '|u1'", b"{'descr': [], 'fortran_order': False, 'shape': ()}"]
)
def test_headers_that_are_no_headers_are_refused(text: bytes) -> None:
    with pytest.raises(TicketSetError, match=".npy member"):
        fmt.decode_npy(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)


def test_a_member_of_negative_size_ends(forged: Path) -> None:
    """int() takes a sign: such a header led back to where it began, for ever."""
    info = tarfile.TarInfo("k.cls")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"-0000001000\0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    with pytest.raises(TicketSetError, match="expected a member of k, got .k.cls. with a header that is damaged"):
        split_members(bytes(header), "k", "here")
    with pytest.raises(TicketSetError, match="expected each member once"):
        split_members(2 * info.tobuf(tarfile.USTAR_FORMAT), "k", "here")


def test_names_of_splits() -> None:
    for good in ("train", "val", "test", "validation", "train-2012", "a.b_c+d", "0"):
        schema.check_split_name(good, "here")
    for bad in ("", ".", "..", ".hidden", "a/b", "a\\b", "-rf", "a b", "ä", "a" * 65, "a\n"):
        with pytest.raises(TicketSetError, match="expected a split's name"):
            schema.check_split_name(bad, "here")


def test_a_link_over_a_remote_base_says_how_to_read_it(center_set: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(center_set), "/far/set", recursive=True)
    link = tmp_path / "link"
    output = mine("--data", "memory://far/set", "--out", link, "--method", "random", "--images", "link").output
    assert f"datalth-shards verify {link} --base memory://far/set --deep" in output
    assert "name its place with --base" in inspect("verify", link, code=1).output
    assert "sound" in inspect("verify", link, "--base", "memory://far/set", "--deep").output


@pytest.mark.parametrize("name", ["a/b", "..", "a b"])
def test_a_split_whose_name_is_no_file_name_is_refused_before_mining(photos: Path, tmp_path: Path, name: str) -> None:
    output = mine("--data", photos, "--out", tmp_path / "x", "--method", "center", "--split", name, code=1).output
    assert "split" in output and output.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_stream_stops_where_the_set_is_mined_anew(forged: Path, photos: Path) -> None:
    stream = TicketSet.open(str(forged)).stream("train")
    next(stream)
    again = [
        "--data",
        photos,
        "--out",
        forged,
        "--method",
        "random",
        "--views",
        "3",
        "--shard-size",
        "10",
        "--overwrite",
    ]
    mine(*again)
    with pytest.raises(TicketSetError, match="mined anew while it was read"):
        list(stream)
