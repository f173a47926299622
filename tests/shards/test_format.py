"""Format 1.0: literal bytes, what readers refuse, and what they must not mind."""

import hashlib
import io
import json
import pickle
import shutil
import tarfile
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from webdataset import TarWriter

from conftest import mine
from shards import format as fmt
from shards import spread
from shards.errors import TicketSetError
from shards.reader import TicketSet, resolve_base
from shards.sample import Sample
from shards.store import open_store
from shards.tar import SampleTarWriter, split_members
from shards.writer import ShardWriter, index_schema

RANKINGS = np.array([[2, 0, 3, 1], [1, 3, 0, 2]], np.uint8)
BOXES = np.array([[1, 2, 3, 4, 0], [0, 0, 9, 8, 1]], np.int32)
MEMBERS = {
    "jpg": b"image bytes",
    "cls": b"7",
    "ranking.npy": fmt.encode_npy(RANKINGS),
    "views.npy": fmt.encode_npy(BOXES),
}


def tar_of(key: str, members: dict[str, bytes]) -> tuple[bytes, tuple[int, int]]:
    """A tar of one sample, and the extent that the writer names."""
    out = io.BytesIO()
    writer = SampleTarWriter(out)
    extent = writer.write(key, members)
    writer.close()
    return out.getvalue(), extent


def test_npy_members_are_these_bytes() -> None:
    spaces = b" " * 58
    header = b"\x93NUMPY\x01\x00\x76\x00{'descr': '%s', 'fortran_order': False, 'shape': (%s), }" + spaces + b"\n"
    assert MEMBERS["ranking.npy"] == header % (b"|u1", b"2, 4") + b"\x02\x00\x03\x01\x01\x03\x00\x02"
    assert MEMBERS["views.npy"] == header % (b"<i4", b"2, 5") + bytes.fromhex(
        "01000000 02000000 03000000 04000000 00000000 00000000 00000000 09000000 08000000 01000000"
    )
    assert fmt.encode_npy(np.array([[256]], "<u2"))[-2:] == b"\x00\x01"


def test_npy_bytes_are_those_of_numpy_whatever_the_memory_order() -> None:
    for array in (RANKINGS, np.asfortranarray(RANKINGS), RANKINGS[:, ::-1][:, ::-1]):
        out = io.BytesIO()
        np.save(out, np.ascontiguousarray(RANKINGS))
        assert fmt.encode_npy(array) == out.getvalue() == MEMBERS["ranking.npy"]


def test_a_tar_of_one_sample_is_these_bytes() -> None:
    data, extent = tar_of("train/a", MEMBERS)
    assert extent == (0, 4096)
    header = bytearray(512)
    for offset, text in (
        (0, b"train/a.cls"),
        (100, b"0000444\x000000000\x000000000\x0000000000001\x0000000000000\x00012622\x00 0"),
        (257, b"ustar\x0000bigdata"),
        (297, b"bigdata"),
    ):
        header[offset : offset + len(text)] = text
    assert data[:512] == bytes(header)
    assert data[512:1024] == b"7" + bytes(511)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["train/a.cls", "train/a.jpg", "train/a.ranking.npy", "train/a.views.npy"]
    assert len(data) == 10240 and not any(data[4096:])
    assert hashlib.sha256(data).hexdigest() == "783d663427924df14f8ea4873ef05df54ccd113e916d066cf9bfd05aec09eea5"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513])
def test_a_member_costs_one_header_and_its_padding(size: int) -> None:
    expected = 512 + -(-size // 512) * 512
    assert tar_of("a", {"jpg": bytes(size)})[1] == (0, expected)
    # The negative control: webdataset's own mtime, a float, adds a PAX header of two blocks.
    plain = TarWriter(io.BytesIO(), encoder=False)
    plain.write({"__key__": "a", "jpg": bytes(size)})
    assert plain.tarstream.offset == expected + 1024


def test_the_longest_key_still_fits_a_plain_header() -> None:
    from shards.keys import MAX_KEY_BYTES

    data, extent = tar_of("k" * MAX_KEY_BYTES, {"ranking.npy": b""})
    assert extent == (0, 512)
    assert split_members(data[:512], "k" * MAX_KEY_BYTES, "here") == {"ranking.npy": b""}


def test_equal_samples_are_equal_bytes_whatever_the_order_of_members() -> None:
    assert tar_of("a", MEMBERS)[0] == tar_of("a", dict(reversed(MEMBERS.items())))[0]


def test_bitmaps_have_patch_zero_in_the_highest_bit() -> None:
    assert fmt.pack_ticket(np.array([0, 9, 3]), 12) == bytes([0b10010000, 0b01000000])
    assert np.flatnonzero(fmt.unpack_ticket(bytes([0b10010000, 0b01000000]), 12)).tolist() == [0, 3, 9]
    assert len(fmt.pack_ticket(np.arange(98), 196)) == 25


def test_rankings_take_the_smallest_type_that_holds_an_index() -> None:
    assert [fmt.ranking_dtype(n).str for n in (16, 256, 257, 65536)] == ["|u1", "|u1", "<u2", "<u2"]
    with pytest.raises(TicketSetError, match="at most 65536"):
        fmt.ranking_dtype(65537)


def test_json_has_one_spelling() -> None:
    assert fmt.canonical_json({"b": [1, 2.5, None], "a": "é"}) == (
        '{\n "a": "é",\n "b": [\n  1,\n  2.5,\n  null\n ]\n}\n'.encode()
    )
    assert fmt.digest({"a": 1}) == hashlib.sha256(b'{\n "a": 1\n}\n').hexdigest()
    assert fmt.shard_name("train", 12) == "train-000012"


def npy(array: np.ndarray, **kwargs: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, **kwargs)
    return out.getvalue()


def test_decode_npy_reads_what_numpy_writes() -> None:
    for array in (RANKINGS, BOXES, np.zeros((0, 5), np.int32), np.array(3.5), np.arange(600, dtype="<u2")):
        decoded = fmt.decode_npy(npy(array))
        assert decoded.dtype == array.dtype and decoded.shape == array.shape and np.array_equal(decoded, array)
        assert not decoded.flags.writeable


@pytest.mark.parametrize(
    ("words", "data"),
    [
        ("plain numbers", npy(np.array([{"a": 1}], object), allow_pickle=True)),
        ("C order", npy(np.asfortranarray(RANKINGS))),
        ("expected version 1.0", npy(RANKINGS, version=(2, 0))),
        ("expected 8 bytes of data, got 7", npy(RANKINGS)[:-1]),
        ("expected 8 bytes of data, got 9", npy(RANKINGS) + b"\0"),
        ("expected 8 bytes of data, got 0", npy(RANKINGS)[:128]),
        (".npy member", npy(RANKINGS)[:100]),
        (".npy member", npy(RANKINGS)[:5]),
        (".npy member", b""),
        (".npy member", pickle.dumps(RANKINGS)),
    ],
)
def test_decode_npy_refuses(words: str, data: bytes) -> None:
    with pytest.raises(TicketSetError, match=words):
        fmt.decode_npy(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy, of the odd types that flips make
def test_any_flipped_bit_of_an_npy_header_is_read_or_refused_in_words() -> None:
    good, odd = fmt.encode_npy(BOXES), set()
    refused = 0
    for bit in range(8 * 128):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        try:
            fmt.decode_npy(bytes(data))
        except TicketSetError:
            refused += 1
        except (SyntaxError, tokenize.TokenError) as error:
            odd.add(type(error).__name__)
    assert not odd
    assert refused > 900


def damage(position: int, value: bytes) -> bytes:
    """The sample's extent with some bytes overwritten."""
    data = tar_of("train/a", MEMBERS)[0][:4096]
    return data[:position] + value + data[position + len(value) :]


def test_members_come_back_as_they_were_written() -> None:
    assert split_members(damage(0, b""), "train/a", "here") == MEMBERS


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (damage(0, b""), "train/b"),
        (damage(0, b""), "train/a.cls"),
        (damage(0, b""), "rain/a"),
        (damage(0, b"")[512:], "train/a"),
        (damage(0, b"")[:100], "train/a"),
        (damage(0, b"")[: 4096 - 400], "train/a"),
        (damage(0, b"")[:1100], "train/a"),
        (damage(0, b"T"), "train/a"),
        (damage(149, b"7"), "train/a"),
        (damage(130, b"1"), "train/a"),
        (damage(1024 + 130, b"1"), "train/a"),
        (damage(124, b"-0000000001"), "train/a"),
        (bytes(512), "train/a"),
    ],
)
def test_split_members_refuses_what_is_not_this_sample(data: bytes, key: str) -> None:
    with pytest.raises(TicketSetError, match=f"here: expected a member of {key}"):
        split_members(data, key, "here")


def test_a_higher_major_is_refused_with_both_versions_and_a_higher_minor_is_not() -> None:
    fmt.check_format([1, 0], "x")
    fmt.check_format([1, 99], "x")
    with pytest.raises(TicketSetError, match=r"x: format 2\.3, but this datalth reads up to 1\.x"):
        fmt.check_format([2, 3], "x")
    for found in (None, "1.0", [1], [1, 0, 0], ["1", "0"], {"major": 1}):
        with pytest.raises(TicketSetError, match="x: expected a format version"):
            fmt.check_format(found, "x")


COLUMNS = {
    "key": "string",
    "source": "string",
    "label": "int32",
    "width": "int32",
    "height": "int32",
    "source_width": "int32",
    "source_height": "int32",
    "source_bytes": "int64",
    "orientation": "int8",
    "status": "string",
    "error": "string",
    "transcoded": "bool",
    "offset": "int64",
    "bytes": "int64",
    "ticket": "fixed_size_binary[2]",
    "k": "int32",
    "mean_score": "float",
    "entropy": "float",
    "spread": "binary",
}


def test_the_index_has_these_columns(center_set: Path) -> None:
    for path in sorted((center_set / "index").iterdir()):
        schema = pq.read_schema(path)
        assert {field.name: str(field.type) for field in schema} == COLUMNS
        stats = json.loads((center_set / f"{path.stem}.json").read_bytes())
        assert schema.metadata[b"datalth.shard"] == path.stem.encode()
        assert schema.metadata[b"datalth.plan_id"] == stats["plan_id"].encode()
    assert str(index_schema(196).field("ticket").type) == "fixed_size_binary[25]"
    assert spread.size(16, 196) == 112 and spread.size(16, 324) == 224  # 7 counts a view, of two bytes in the second
    for path in sorted((center_set / "index").iterdir()):
        assert set(pq.read_table(path)["spread"].to_pylist()) == {None}  # center's scores are no shares of a whole


def test_the_column_spread_has_7_counts_a_view(tickets: Path) -> None:
    for path in sorted((tickets / "index").iterdir()):
        views = 4 if path.stem.startswith("train") else 1
        sizes = {len(value) for value in pq.read_table(path)["spread"].to_pylist() if value is not None}
        assert sizes == {7 * views}


def test_the_index_tells_where_a_sample_is_and_what_its_ticket_is(center_set: Path) -> None:
    row = TicketSet.open(str(center_set)).shard_table("train-000000").to_pylist()[3]
    with tarfile.open(center_set / "train-000000.tar") as tar:
        members = [m for m in tar if m.name.startswith(row["key"] + ".")]
        data = {m.name.removeprefix(row["key"] + "."): tar.extractfile(m).read() for m in members}
    assert row["offset"] == members[0].offset
    assert row["bytes"] == members[-1].offset_data + -(-members[-1].size // 512) * 512 - row["offset"]
    assert (row["status"], row["error"], row["k"], row["width"], row["height"]) == ("ok", None, 13, 80, 60)
    ranking = np.load(io.BytesIO(data["ranking.npy"]))
    assert sorted(ranking[0, :13]) == np.flatnonzero(np.unpackbits(np.frombuffer(row["ticket"], np.uint8))).tolist()
    assert row["label"] == int(data["cls"]) == ["ant", "bee", "cat"].index(row["source"].split("/")[1])


def test_a_shard_s_json_has_these_fields(center_set: Path) -> None:
    stats = json.loads((center_set / "train-000001.json").read_bytes())
    assert sorted(stats) == [
        "failed",
        "format",
        "image_bytes",
        "parquet",
        "plan_id",
        "samples",
        "shard",
        "split",
        "tar",
        "timing",
    ]
    assert stats["format"] == [1, 3]
    assert (stats["split"], stats["shard"], stats["samples"], stats["failed"]) == ("train", 1, 10, 0)
    for name, path in (("tar", "train-000001.tar"), ("parquet", "index/train-000001.parquet")):
        data = (center_set / path).read_bytes()
        assert stats[name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_the_manifest_says_what_the_set_is(center_set: Path) -> None:
    manifest = json.loads((center_set / "manifest.json").read_bytes())
    assert manifest["kind"] == "datalth-ticket-set" and manifest["format"] == [1, 3]
    assert manifest["classes"] == ["ant", "bee", "cat"]
    assert (manifest["grid"], manifest["k"], manifest["base"]) == ([4, 4], 13, None)
    assert manifest["members"]["ranking.npy"] == {"dtype": "uint8", "shape": ["views", 16]}
    assert manifest["members"]["views.npy"] == {
        "dtype": "int32",
        "shape": ["views", 5],
        "columns": ["top", "left", "height", "width", "flip"],
    }
    assert {s: (v["shards"], v["samples"], v["views"]) for s, v in manifest["splits"].items()} == {
        "train": (3, 21, 3),
        "val": (1, 6, 1),
    }
    assert manifest["totals"]["samples"] == 27
    shards = [json.loads(p.read_bytes()) for p in sorted(center_set.glob("*-00*.json"))]
    listing = [[s["split"], s["shard"], s["tar"]["sha256"], s["parquet"]["sha256"]] for s in shards]
    assert manifest["set_id"] == fmt.digest(listing)


def plain(samples: Iterator[Sample]) -> list[tuple[Any, ...]]:
    return [(s.key, s.image, s.label, s.views.tolist(), s.rankings.tolist(), s.tickets.tolist()) for s in samples]


def later_minor_version(source: Path, out: Path) -> None:
    """The set as a later minor version might write it: more members, fields and columns."""
    opened = TicketSet.open(str(source))
    for name in opened.shard_names("train") + opened.shard_names("val"):
        rows = {row["key"]: row for row in opened.shard_table(name).to_pylist()}
        split, number = name.split("-")
        with ShardWriter(open_store(out), split, int(number), 16, "plan", spread=True) as writer:
            for sample in opened.stream_shard(name):
                members = {
                    "png" if sample.image[:4] == b"\x89PNG" else "jpg": sample.image,
                    "cls": str(sample.label).encode(),
                    "ranking.npy": fmt.encode_npy(sample.rankings),
                    "views.npy": fmt.encode_npy(sample.views),
                    "saliency.npy": b"unknown",
                    "a.txt": b"sorted before all others",
                }
                writer.add(rows[sample.key], members)
            writer.commit({"seconds": 0.0})
        index = out / "index" / f"{name}.parquet"
        table = pq.read_table(index)
        pq.write_table(table.append_column("blur", pa.array([0.5] * len(table))), index)
    manifest = {**opened.manifest.to_json(), "format": [1, 7], "owner": {"name": "later"}}
    manifest["splits"] = {name: {**split, "hue": 1} for name, split in manifest["splits"].items()}
    (out / "manifest.json").write_bytes(fmt.canonical_json(manifest))


def test_unknown_members_fields_and_columns_are_ignored(center_set: Path, tmp_path: Path) -> None:
    later_minor_version(center_set, tmp_path)
    known, later = TicketSet.open(str(center_set)), TicketSet.open(str(tmp_path))
    for split in ("train", "val"):
        assert plain(later.stream(split)) == plain(known.stream(split))
        columns = [c for c in COLUMNS if c not in ("offset", "bytes")]
        assert later.table(split).select(columns).equals(known.table(split).select(columns))
    assert later.find("train/ant/ant_0")[0] == "train"


def test_a_column_that_only_some_shards_have_is_ignored(center_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(center_set, out)
    index = out / "index" / "train-000001.parquet"
    table = pq.read_table(index)
    pq.write_table(table.append_column("blur", pa.array([0.5] * len(table))), index)
    assert TicketSet.open(str(out)).table("train")["key"].to_pylist() == [
        s.key for s in TicketSet.open(str(center_set)).stream("train")
    ]


@pytest.fixture
def in_memory(center_set: Path) -> Iterator[str]:
    """The set under memory://."""
    memory = fsspec.filesystem("memory")
    for path in center_set.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/sets/center/{path.relative_to(center_set).as_posix()}", path.read_bytes())
    yield "memory://sets/center"
    memory.rm("/sets", recursive=True)


def test_urls_give_what_the_local_path_gives(center_set: Path, in_memory: str) -> None:
    local = TicketSet.open(str(center_set))
    for url in (in_memory, in_memory + "/", f"file://{center_set}", f"{center_set}/"):
        remote = TicketSet.open(url)
        assert remote.manifest == local.manifest
        for split in local.splits:
            assert remote.table(split).equals(local.table(split))
            assert plain(remote.stream(split)) == plain(local.stream(split))
    assert len(plain(local.stream("train"))) == 21


def test_missing_urls_are_errors_in_words(in_memory: str) -> None:
    with pytest.raises(TicketSetError, match="found no manifest.json"):
        TicketSet.open("memory://sets/nothing")
    memory = fsspec.filesystem("memory")
    memory.rm("/sets/center/val-000000.tar")
    memory.rm("/sets/center/index/train-000002.parquet")
    opened = TicketSet.open(in_memory)
    for split, words in (("val", "val-000000.tar: missing"), ("train", "train-000002.parquet: missing")):
        with pytest.raises(TicketSetError, match=words):
            list(opened.stream(split))


def test_bases_of_urls_are_found_from_the_link() -> None:
    assert resolve_base("s3://bucket/sets/link", "../base") == "s3://bucket/sets/base"
    assert resolve_base("s3://bucket/sets/link", "s3://bucket/a/base") == "s3://bucket/a/base"
    assert resolve_base("/sets/link", "../base") == "/sets/base"
    assert resolve_base("/sets/link", "/base") == "/base"
    assert resolve_base("link", "../a/../base") == "base"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/sets/link", "ftp://127.0.0.1/base"),
        ("/sets/link", "s3://bucket/base"),
        ("/sets/link", "simplecache::s3://bucket/base"),
        ("s3://bucket/sets/link", "s3://other/base"),
        ("s3://bucket/sets/link", "s3://bucket2/base"),
        ("s3://bucket/sets/link", "ftp://bucket/base"),
        ("s3://bucket/sets/link", "/etc"),
        ("s3://bucket/sets/link", "file:///etc"),
        ("s3://bucket/sets/link", "../../../other/base"),
        ("s3://bucket/sets/link", "s3://bucket/../other/base"),
        ("s3://bucket/sets/link", "a::file"),
    ],
)
def test_a_manifest_cannot_send_a_reader_elsewhere(url: str, path: str) -> None:
    with pytest.raises(TicketSetError, match="name its place with `base`"):
        resolve_base(url, path)


@pytest.fixture(scope="module")
def pair(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set `base` of val alone and a set `link` of random tickets linked to it; read-only."""
    folder = tmp_path_factory.mktemp("pair")
    mine("--data", photos, "--out", folder / "base", "--method", "center", "--split", "val")
    mine("--data", folder / "base", "--out", folder / "link", "--method", "random", "--images", "link")
    return folder


Change = Callable[[Path], None]


def edit(path: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / path).read_bytes())
        (folder / path).write_bytes(fmt.canonical_json({**manifest, **fields}))

    return change


def remove(path: str) -> Change:
    return lambda folder: (folder / path).unlink()


def move(path: str) -> Change:
    return lambda folder: (folder / path).rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            remove("link/manifest.json"),
            "link: this ticket set is not finished (no manifest.json); run its datalth-mine",
        ),
        (move("link"), "expected a ticket set, found no manifest.json"),
        (edit("link/manifest.json", format=[2, 0]), "manifest.json: format 2.0, but this datalth reads up to 1.x"),
        (edit("link/manifest.json", kind="other"), "expected the manifest of a ticket set"),
        (lambda folder: (folder / "link/manifest.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "link/manifest.json").write_text("[]"), "expected names and values, got list"),
        (move("base"), "its images are in a base set that cannot be opened"),
        (remove("base/manifest.json"), "base: this ticket set is not finished"),
        (edit("base/manifest.json", format=[2, 0]), "format 2.0"),
        (edit("base/manifest.json", set_id="f" * 64), "has changed: expected set_id"),
    ],
)
def test_sets_that_cannot_be_opened_say_why(pair: Path, tmp_path: Path, change: Change, words: str) -> None:
    folder = tmp_path / "pair"
    shutil.copytree(pair, folder)
    TicketSet.open(str(folder / "link"))  # the negative control
    change(folder)
    with pytest.raises(TicketSetError) as error:
        TicketSet.open(str(folder / "link"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_linked_set_streams_the_images_of_its_base(pair: Path, tmp_path: Path) -> None:
    base = TicketSet.open(str(pair / "base"))
    link = TicketSet.open(str(pair / "link"))
    assert not any(m.split(".")[-1] in fmt.IMAGE_MEMBERS for m in names_in(pair / "link" / "val-000000.tar"))
    for ours, theirs in zip(link.stream("val"), base.stream("val"), strict=True):
        assert (ours.key, ours.image, ours.label) == (theirs.key, theirs.image, theirs.label)
        assert np.array_equal(ours.views, theirs.views) and not np.array_equal(ours.rankings, theirs.rankings)
    shutil.copytree(pair / "base", tmp_path / "moved")
    elsewhere = TicketSet.open(str(pair / "link"), base=str(tmp_path / "moved"))
    assert plain(elsewhere.stream("val")) == plain(link.stream("val"))


def test_a_link_reads_its_base_over_urls(pair: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in pair.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/pair/{path.relative_to(pair).as_posix()}", path.read_bytes())
    try:
        remote = TicketSet.open("memory://pair/link")
        assert remote.base.url == "memory://pair/base"
        assert plain(remote.stream("val")) == plain(TicketSet.open(str(pair / "link")).stream("val"))
    finally:
        memory.rm("/pair", recursive=True)


def test_a_stream_of_some_keys_gives_only_those(center_set: Path) -> None:
    opened = TicketSet.open(str(center_set))
    every = [s.key for s in opened.stream_shard("train-000000")]
    assert [s.key for s in opened.stream_shard("train-000000", {every[4], every[1]})] == [every[1], every[4]]
    with pytest.raises(TicketSetError, match="expected a split of"):
        opened.table("test")


def names_in(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()
