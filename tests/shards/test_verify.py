"""`datalth-shards verify` finds every kind of damage, and nothing in a sound set."""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import inspect, mine
from shards import format as fmt
from shards.ranked import Mosaic
from shards.reader import TicketSet
from shards.tar import BLOCK

pytestmark = pytest.mark.slow  # checks a set once for every flipped bit


def lines(folder: Path, *flags: str, code: int = 1) -> str:
    return inspect("verify", folder, *flags, code=code).output


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_bytes(fmt.canonical_json(content))


@pytest.fixture
def damaged(center_set: Path, tmp_path: Path) -> Path:
    """A copy of a sound set, to be damaged; its train split has two shards, of 10 and 9... and val one of 6."""
    return Path(shutil.copytree(center_set, tmp_path / "set"))


def test_a_sound_set_passes_fast_and_deep(center_set):
    assert "sound (fast: 4 shards, 27 samples" in lines(center_set, code=0)
    assert "sound (deep" in lines(center_set, "--deep", code=0)


def test_json_output_lists_the_problems(damaged):
    (damaged / "val-000000.tar").unlink()
    found = json.loads(lines(damaged, "--json"))
    assert found["problems"] == ["val-000000.tar: missing"] and found["deep"] is False


def cut_inside(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes()[:-3000])


def cut_between_members(tar: Path) -> None:
    """After the first member's padding: every reader of tars takes this for a whole tar."""
    data = tar.read_bytes()
    size = int(data[124:135], 8)
    tar.write_bytes(data[: BLOCK + -(-size // BLOCK) * BLOCK])


@pytest.mark.parametrize("cut", [cut_inside, cut_between_members])
def test_a_truncated_tar(damaged, cut):
    cut(damaged / "train-000000.tar")
    assert "train-000000.tar: expected" in lines(damaged)


def test_a_flipped_bit_in_a_tar_is_found_by_deep_alone(damaged):
    tar = damaged / "train-000001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 4
    tar.write_bytes(data)
    lines(damaged, code=0)
    assert "train-000001.tar: expected sha256" in lines(damaged, "--deep")


@pytest.mark.parametrize("name", ["index/train-000000.parquet", "train-000000.json", "plan.json", "_info.json"])
def test_a_flipped_bit_elsewhere_is_found_by_fast(damaged, name):
    path = damaged / name
    data = bytearray(path.read_bytes())
    at = data.index(b'"samples"') + 12 if name == "train-000000.json" else len(data) // 2
    data[at] ^= 1
    path.write_bytes(data)
    assert name in lines(damaged) or "manifest.json" in lines(damaged)


def test_a_missing_sample(damaged, monkeypatch):
    """Another tar in which one sample is gone, and the JSON agrees with it: the index still knows."""
    tar = damaged / "val-000000.tar"
    index = fmt.INDEX
    row = TicketSet.open(str(damaged)).table("val").to_pylist()[1]
    data = tar.read_bytes()
    tar.write_bytes(data[: row["offset"]] + data[row["offset"] + row["bytes"] :])
    refresh_tar(damaged, "val-000000")
    assert f"{index}/val-000000.parquet: its samples end" in lines(damaged) or "set_id" in lines(damaged)
    assert "expected a member of" in lines(damaged, "--deep")


def test_an_extra_sample(damaged):
    """Samples of another shard appended before the end blocks, the JSON made to agree."""
    first, other = damaged / "val-000000.tar", damaged / "train-000002.tar"
    first.write_bytes(first.read_bytes()[:-10240] + other.read_bytes())
    refresh_tar(damaged, "val-000000")
    assert "set_id" in lines(damaged)


def refresh_tar(folder: Path, name: str) -> None:
    """Make a shard's JSON agree with its tar, as a careless tool would."""
    data = (folder / f"{name}.tar").read_bytes()
    edit_json(
        folder / f"{name}.json",
        lambda s: s.update(tar={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}),
    )


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.json", "index/train-000001.parquet"])
def test_a_missing_file_of_a_shard(damaged, name):
    (damaged / name).unlink()
    assert f"{name}: missing" in lines(damaged)


def test_a_missing_last_shard_is_counted(damaged):
    for name in ("train-000002.tar", "train-000002.json", "index/train-000002.parquet"):
        (damaged / name).unlink()
    assert "train-000002" in lines(damaged)


def test_an_extra_shard(damaged):
    shutil.copy(damaged / "train-000000.tar", damaged / "train-000009.tar")
    assert "train-000009.tar: not one of this set's shards" in lines(damaged)


def test_swapped_indexes(damaged):
    a, b = (damaged / "index" / f"train-00000{i}.parquet" for i in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    assert "index/train-000000.parquet: expected" in lines(damaged)


def test_swapped_indexes_with_json_that_agrees(damaged):
    a, b = (damaged / "index" / f"train-00000{i}.parquet" for i in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    said = [json.loads((damaged / f"train-00000{i}.json").read_bytes())["parquet"] for i in (0, 1)]
    for i in (0, 1):
        edit_json(damaged / f"train-00000{i}.json", lambda s, i=i: s.update(parquet=said[1 - i]))
    assert "of another shard or plan: train-000001" in lines(damaged)


@pytest.fixture(scope="module")
def other_plan(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("other") / "set"
    mine("--data", photos, "--out", out, "--method", "center", "--views", "3", "--shard-size", "10", "--seed", "7")
    return out


def test_a_stale_parquet(damaged, other_plan):
    shutil.copy(other_plan / "index/train-000000.parquet", damaged / "index/train-000000.parquet")
    assert "index/train-000000.parquet: expected" in lines(damaged)


def test_a_whole_shard_of_another_plan(damaged, other_plan):
    for name in ("train-000000.tar", "train-000000.json", "index/train-000000.parquet"):
        shutil.copy(other_plan / name, damaged / name)
    assert "train-000000.json: of another plan" in lines(damaged)


def test_a_plan_that_was_edited(damaged):
    edit_json(damaged / "plan.json", lambda plan: plan["common"].update(k=3))
    assert "plan.json: expected" in lines(damaged)


def test_a_plan_that_was_edited_and_a_manifest_that_agrees(damaged):
    edit_json(damaged / "plan.json", lambda plan: plan["common"].update(k=3, seed=1))
    plan = (damaged / "plan.json").read_bytes()
    said = {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
    edit_json(damaged / "manifest.json", lambda manifest: manifest.update(plan=said))
    output = lines(damaged)
    assert "is not what its plan_id" in output and "k is 13" in output


def test_class_names_that_were_edited(damaged):
    edit_json(damaged / "manifest.json", lambda manifest: manifest["classes"].reverse())
    assert "class names" in lines(damaged)


def test_deep_checks_what_the_bytes_mean(damaged):
    """A tar whose hash agrees everywhere, but whose content breaks the format."""
    opened = TicketSet.open(str(damaged))
    sample, other = list(opened.stream_shard("train-000000"))[:2]
    ranking = fmt.encode_npy(sample.rankings)
    broken = sample.rankings.copy()
    broken[0, 0] = broken[0, 1]
    moved = other.views.copy()
    moved[1, 0] = 10_000
    tar = damaged / "train-000000.tar"
    data = tar.read_bytes()
    assert data.count(ranking) >= 1
    data = data.replace(ranking, fmt.encode_npy(broken), 1)
    tar.write_bytes(data.replace(fmt.encode_npy(other.views), fmt.encode_npy(moved), 1))
    refresh_tar(damaged, "train-000000")
    output = lines(damaged, "--deep")
    assert "permutations" in output and "view 1 is not inside" in output


def test_a_linked_set_is_checked_against_its_base(damaged, tmp_path):
    link = tmp_path / "link"
    mine("--data", damaged, "--out", link, "--method", "random", "--images", "link")
    lines(link, "--deep", code=0)
    edit_json(damaged / "manifest.json", lambda m: m.update(set_id="0" * 64))
    assert "has changed" in lines(link)
    shutil.move(damaged, tmp_path / "elsewhere")
    assert "--base" in lines(link)
    edit_json(
        tmp_path / "elsewhere/manifest.json",
        lambda m: m.update(set_id=json.loads((link / "manifest.json").read_bytes())["base"]["set_id"]),
    )
    lines(link, "--deep", "--base", str(tmp_path / "elsewhere"), code=0)


@pytest.mark.parametrize("name", ["manifest.json", "train-000000.json", "_info.json", "sizes.json", "plan.json"])
def test_no_flipped_bit_in_json_passes_or_ends_in_a_traceback(damaged, name):
    """Every 41st bit; `timing` alone may change unseen."""
    path = damaged / name
    data = path.read_bytes()
    end = data.index(b'"timing"') if b'"timing"' in data else len(data)
    for bit in range(0, 8 * end, 41):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        result = inspect("verify", damaged, code=1)
        assert result.output and "Traceback" not in result.output
    path.write_bytes(data)
    lines(damaged, code=0)


def test_a_label_that_is_no_number_is_a_problem_and_not_a_traceback(damaged):
    tar = damaged / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[BLOCK] ^= 0x80
    tar.write_bytes(data)
    output = lines(damaged, "--deep")
    assert "expected sha256" in output and "expected label" in output


def test_a_link_is_not_sound_where_a_tar_of_its_base_is_gone(damaged, tmp_path):
    link = tmp_path / "link"
    mine("--data", damaged, "--out", link, "--method", "random", "--images", "link")
    (damaged / "train-000001.tar").unlink()
    assert "train-000001.tar: missing" in lines(link)


def test_diff_and_score_need_no_base(damaged, tmp_path):
    links = [tmp_path / name for name in "ab"]
    for link in links:
        mine("--data", damaged, "--out", link, "--method", "random", "--images", "link")
    shutil.rmtree(damaged)
    assert "1.000" in inspect("diff", *links).output


@pytest.fixture(params=["ranked_set", "cut_set"])
def ranked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a sound set of ranked views, to be damaged; one that stores all patches, and one of 8 of 16."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "set"))


def member_of(tar: bytearray, number: int = 0) -> tuple[int, int]:
    """Where the ranked views of a sample begin, and their bytes; of the one of that number in the tar."""
    at = [found.start() for found in re.finditer(rb"[a-z0-9_/]+\.ranked\.bin\0", tar)][number]
    return at + BLOCK, int(tar[at + 124 : at + 135], 8)


def set_size(tar: bytearray, start: int, size: int) -> None:
    """Make a member's header say another size, with a checksum that agrees."""
    header = tar[start - BLOCK : start]
    header[124:135] = b"%011o" % size
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    tar[start - BLOCK : start] = header


def test_a_sound_ranked_set_passes_fast_and_deep(ranked):
    assert "sound (fast: 4 shards, 27 samples" in lines(ranked, code=0)
    assert "sound (deep" in lines(ranked, "--deep", code=0)


def in_header(pattern: bytes, behind: int, value: bytes) -> Callable[[bytearray, int, Mosaic], None]:
    def change(tar: bytearray, start: int, mosaic: Mosaic) -> None:
        at = tar.index(pattern, start) + behind
        tar[at : at + len(value)] = value

    return change


def in_table(place: int, amount: int) -> Callable[[bytearray, int, Mosaic], None]:
    """View 1's number at that place of its entry becomes another: its start, and the ends of its rows."""

    def change(tar: bytearray, start: int, mosaic: Mosaic) -> None:
        at = start + mosaic.entry.itemsize + 4 * (place % (1 + mosaic.rows))
        struct.pack_into("<I", tar, at, struct.unpack_from("<I", tar, at)[0] + amount)

    return change


def in_statistics(first: int, value: bytes) -> Callable[[bytearray, int, Mosaic], None]:
    def change(tar: bytearray, start: int, mosaic: Mosaic) -> None:
        at = start + mosaic.entry.itemsize - 8 + first
        tar[at : at + len(value)] = value

    return change


def swap_markers(tar: bytearray, start: int, mosaic: Mosaic) -> None:
    """The first row's marker goes two bytes back, and the bytes before it behind it: in row 0 something is missing."""
    at = start + struct.unpack_from("<I", tar, start + 4)[0]
    tar[at - 2 : at + 2] = tar[at : at + 2] + tar[at - 2 : at]


def trailing(tar: bytearray, start: int, mosaic: Mosaic) -> None:
    size = member_of(tar, 1)[1]
    assert size % BLOCK, "room in the last block"
    set_size(tar, start, size + 1)


RANKED_DAMAGE = {
    "another height": (in_header(b"\xff\xc0\0\x11", 5, b"\0\x10"), "view 0: expected a JPEG of 64x.*, got 64x16 px"),
    "another width": (in_header(b"\xff\xc0\0\x11", 7, b"\0\x10"), "view 0: expected a JPEG of 64x.*, got 16x"),
    "of another grid": (in_header(b"\xff\xdd\0\4", 4, b"\0\x20"), "view 0: .*16 blocks between.*, got 64x.* 32 blocks"),
    "begins elsewhere": (in_table(0, 1), "ranked view 1: expected to begin at byte"),
    "a row ends elsewhere": (in_table(1, 1), "ranked view 1: its rows end elsewhere than the table says"),
    "the last row ends elsewhere": (
        in_table(-1, 1),
        "view 1: expected row [13] to end [0-9]+ bytes behind its beginning",
    ),
    "a marker elsewhere": (swap_markers, "its rows end elsewhere|cannot be decoded"),
    "trailing bytes": (trailing, r"ranked views: expected (\d+) bytes, got \d+"),
    "greatest values": (in_statistics(4, b"\0\0\0"), "ranked view 0: expected statistics"),
    "least values": (in_statistics(1, b"\xff\xff\xff"), "ranked view 0: expected statistics"),
    "no zero": (in_statistics(7, b"\1"), "ranked view 0: expected a zero at the end of its entry, got 1"),
}


@pytest.mark.parametrize("name", RANKED_DAMAGE)
def test_ranked_views_that_disagree_with_themselves(ranked, name):
    """Whatever the hashes say: here the JSON of the shard agrees with the tar."""
    change, words = RANKED_DAMAGE[name]
    path = ranked / "train-000000.tar"
    tar = bytearray(path.read_bytes())
    start, _ = member_of(tar, 1)
    change(tar, start, Mosaic.of(TicketSet.open(str(ranked)).manifest))
    assert tar != path.read_bytes()
    path.write_bytes(tar)
    refresh_tar(ranked, "train-000000")
    output = lines(ranked, "--deep")
    key = TicketSet.open(str(ranked)).ok_keys("train-000000")[1]
    found = [line for line in output.splitlines() if f"{key}: " in line]
    assert re.search(words, "\n".join(found)) and "Traceback" not in output
    assert output.count("problems (deep") == 1 and len(found) <= 2


def test_a_mean_that_is_wrong_is_found_where_all_patches_are_stored(ranked):
    path = ranked / "train-000000.tar"
    tar = bytearray(path.read_bytes())
    start, _ = member_of(tar, 1)
    tar[start + Mosaic.of(TicketSet.open(str(ranked)).manifest).entry.itemsize - 8] ^= 1
    path.write_bytes(tar)
    refresh_tar(ranked, "train-000000")
    whole = TicketSet.open(str(ranked)).manifest.ranked.tokens == 16
    assert ("expected statistics" in lines(ranked, "--deep")) == whole


def test_a_flipped_byte_in_a_scan_and_exchanged_views_are_found_by_deep(ranked):
    path = ranked / "train-000000.tar"
    data = path.read_bytes()
    tar = bytearray(data)
    start, size = member_of(tar, 1)
    tar[start + size - 40] ^= 0x10
    path.write_bytes(tar)
    lines(ranked, code=0)
    assert "train-000000.tar: expected sha256" in lines(ranked, "--deep")
    other, longer = member_of(tar, 2)
    least = min(size, longer)
    exchanged = bytearray(data)
    exchanged[start : start + least], exchanged[other : other + least] = data[other:][:least], data[start:][:least]
    path.write_bytes(exchanged)
    lines(ranked, code=0)
    assert "train-000000.tar: expected sha256" in lines(ranked, "--deep")


def cut_in_half(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


@pytest.mark.parametrize("cut", [cut_in_half, cut_between_members])
def test_a_truncated_tar_of_ranked_views(ranked, cut):
    cut(ranked / "train-000000.tar")
    assert "train-000000.tar: expected" in lines(ranked)
    refresh_tar(ranked, "train-000000")
    assert "its samples end at" in lines(ranked, "--deep")


def test_ranked_views_that_are_not_last(ranked):
    """Before the rankings, or with something behind them; the JSON agrees."""
    path = ranked / "train-000000.tar"
    data = path.read_bytes()
    row = TicketSet.open(str(ranked)).table("train").to_pylist()[0]
    sample = bytearray(data[: row["bytes"]])
    start, size = member_of(sample)
    end = start + -(-size // BLOCK) * BLOCK
    assert end == len(sample)
    hidden = bytearray(data)
    set_size(hidden, start, size - BLOCK)
    for tar in (sample[start - BLOCK : end] + sample[: start - BLOCK] + data[row["bytes"] :], hidden):
        path.write_bytes(tar)
        refresh_tar(ranked, "train-000000")
        assert f"{row['key']}: expected ranked views last" in lines(ranked, "--deep")


def test_ranked_views_with_the_index_of_another_set(ranked, center_set):
    shutil.copy(center_set / "index/train-000000.parquet", ranked / "index/train-000000.parquet")
    assert "index/train-000000.parquet: expected" in lines(ranked)
    data = (ranked / "index/train-000000.parquet").read_bytes()
    said = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(ranked / "train-000000.json", lambda stats: stats.update(parquet=said))
    assert "of another shard or plan" in lines(ranked, "--deep")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 12}, "ranked: tokens|shape"),
        ({"quality": 91}, "but plan.json says"),
        ({"decoded": False}, "but plan.json says"),
        ({"cell": 24}, "expected blocks of 8 px"),
    ],
)
def test_a_manifest_that_says_other_ranked_views(ranked, change, words):
    edit_json(ranked / "manifest.json", lambda manifest: manifest["ranked"].update(change))
    assert re.search(words, lines(ranked))
