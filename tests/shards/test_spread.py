"""How a view's scores are spread: counted, as bytes, in the index of real sets."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import inspect, mine
from shards import spread
from shards.errors import TicketSetError
from shards.index import index_schema, read_index
from shards.reader import TicketSet


def naive(scores: np.ndarray) -> list[int]:
    """Patch by patch: how many of the best are needed for each share."""
    total, counts = sum(scores.tolist()), []
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98):
        held, count = 0.0, 0
        for score in sorted(scores.tolist(), reverse=True):
            if held >= share * total:
                break
            held, count = held + score, count + 1
        counts.append(count)
    return counts


def test_counts_are_those_of_adding_up_patch_by_patch() -> None:
    scores = np.random.default_rng(0).gamma(0.3, size=(20, 64)).astype(np.float32)
    found = spread.spread_of(scores)
    assert found.tolist() == [naive(row) for row in scores]
    assert found.tolist() != [naive(row) for row in scores**2]  # negative control: other scores
    assert len(set(found[:, 4].tolist())) > 5


def test_counts_of_hand_made_scores() -> None:
    one = [[0, 8, 0, 0]]
    assert spread.spread_of(np.array(one)).tolist() == [[1] * 7]
    ten = np.array([[1.0] * 10])
    assert spread.spread_of(ten).tolist() == [[5, 6, 7, 8, 9, 10, 10]]
    assert spread.spread_of(np.full((1, 256), 0.1, np.float32)).max() == 251  # of 256: fits a byte


@pytest.mark.parametrize("scores", [[-1.0, 2, 3], [0.0, 0, 0]])
def test_scores_that_are_no_distribution_have_none(scores: list[float]) -> None:
    found = spread.spread_of(np.array([scores, [1.0, 2, 3]]))
    assert not found[0].any() and found[1].all()
    assert spread.encode(found, 3) is None and spread.encode(found[1:], 3) == found[1].astype(np.uint8).tobytes()


@pytest.mark.parametrize("patches", [16, 300])
def test_an_image_s_bytes_come_back(patches: int) -> None:
    counts = np.sort(np.random.default_rng(1).integers(1, patches, (5, 3, 7)), axis=2)
    values = [spread.encode(one, patches) for one in counts] + [None]
    assert len(values[0]) == spread.size(3, patches)
    found = spread.decode(values, 3, patches)
    assert np.array_equal(found[:5], counts) and not found[5].any() and spread.is_sound(found, patches).all()


def test_a_set_says_it_of_every_view(tickets: Path, weights: Path) -> None:
    """By the selector's own scores, computed once more on the views that the set holds."""
    from miner.producers.rankings import build_rankings
    from miner.settings import Geometry, Machine, Selection

    opened = TicketSet.open(str(tickets))
    assert opened.manifest.format == (1, 3) and opened.says_spread
    rows = {row["key"]: row["spread"] for row in opened.shard_table("train-000000").to_pylist()}
    import torch

    selection = Selection(selector="test_vit", weights=str(weights), tokens=8)
    made = build_rankings(selection, Geometry(img_size=64), Machine(), torch.device("cpu"), 4)
    for sample in list(opened.stream("train"))[:3]:
        views = sample.render(range(4), made.size)
        pixels = (torch.from_numpy(views).float() / 255 - torch.tensor(made.identity.mean)) / torch.tensor(
            made.identity.std
        )
        _, scores = made._selector.rank_and_score(pixels.permute(0, 3, 1, 2), None)
        expected = np.array([naive(row) for row in scores.double().numpy()])
        found = np.frombuffer(rows[sample.key], np.uint8).reshape(4, 7)
        assert np.abs(found.astype(int) - expected).max() <= 1  # scores of another batch differ in their last bits
        assert (found == expected).mean() > 0.9


def test_json_shows_it_as_numbers(tickets: Path) -> None:
    opened = TicketSet.open(str(tickets))
    (row, *_) = opened.shard_table("train-000000").to_pylist()
    expected = np.frombuffer(row["spread"], np.uint8).reshape(4, 7).tolist()
    assert json.loads(inspect("show", tickets, row["key"], "--json").output)["spread"] == expected
    listed = [json.loads(line) for line in inspect("ls", tickets, "--json").output.splitlines()]
    assert next(one for one in listed if one["key"] == row["key"])["spread"] == expected


def test_center_says_nothing_and_an_image_that_failed_neither(center_set: Path, photos: Path, tmp_path: Path) -> None:
    assert set(TicketSet.open(str(center_set)).table("train")["spread"].to_pylist()) == {None}
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(data / "a/good.png")
    (data / "a/bad.jpg").write_bytes(b"\xff\xd8\xff no photo")
    mine("--data", data, "--out", tmp_path / "set", "--method", "random", "--max-failures", 1, "--val-share", 0)
    rows = TicketSet.open(str(tmp_path / "set")).table("train").to_pylist()
    assert {row["status"]: row["spread"] is None for row in rows} == {"ok": False, "failed": True}


def test_rankings_that_are_kept_keep_it(tickets: Path, tmp_path: Path) -> None:
    mine("--data", tickets, "--out", tmp_path / "ranked", "--images", "ranked")
    before, after = (
        {row["key"]: row["spread"] for row in TicketSet.open(str(each)).table("train").to_pylist()}
        for each in (tickets, tmp_path / "ranked")
    )
    assert before == after and None not in before.values()


def forged(**columns: pa.Array) -> bytes:
    import io

    given = {
        "key": pa.array(["a"]), "status": pa.array(["ok"]), "width": pa.array([4], pa.int32()),
        "height": pa.array([4], pa.int32()), "offset": pa.array([0]), "bytes": pa.array([512]), **columns,
    }  # fmt: skip
    table = pa.table({f.name: given.get(f.name, pa.nulls(1, f.type)) for f in index_schema(16, True)})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


GOOD = bytes([1, 2, 3, 4, 5, 6, 16] * 2)


@pytest.mark.parametrize(
    ("says", "column"),
    [
        ("column spread: expected 14 bytes, for 2 views, or none", pa.array([GOOD[:-1]])),
        ("column spread: expected binary", pa.array([GOOD], pa.binary(14))),
        ("column spread: expected binary", pa.array([7], pa.int32())),
        ("column spread: expected binary", pa.array(["a" * 14])),
        ("column spread: expected numbers of patches that rise from 1 to 16", pa.array([GOOD[::-1]])),
        ("column spread: expected numbers", pa.array([GOOD[:-1] + b"\x11"])),
        ("column spread: expected numbers", pa.array([b"\0" + GOOD[1:]])),
        ("expected columns of plain values", pa.array([[1]])),
    ],
)
def test_a_column_that_is_none_is_refused(says: str, column: pa.Array) -> None:
    for good in (pa.array([GOOD]), pa.array([None], pa.binary())):
        assert len(read_index(forged(spread=good), "here", 16, 3, 2)) == 1
    with pytest.raises(TicketSetError, match=says):
        read_index(forged(spread=column), "here", 16, 3, 2)


def as_format(source: Path, out: Path, version: list[int], column: pa.Array | None = None) -> Path:
    """A set as an older datalth wrote it, without the column, or with another one of that name."""
    import hashlib
    import shutil

    from shards import format as fmt

    shutil.copytree(source, out)
    shards = []
    for path in sorted((out / "index").iterdir()):
        table = pq.read_table(path)
        metadata = table.schema.metadata
        table = table.drop_columns("spread")
        if column is not None:
            table = table.append_column("spread", pa.array(column.to_pylist() * len(table), column.type))
        pq.write_table(table.replace_schema_metadata(metadata), path)
        stats = json.loads((out / f"{path.stem}.json").read_bytes())
        data = path.read_bytes()
        stats |= {"format": version, "parquet": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
        (out / f"{path.stem}.json").write_bytes(fmt.canonical_json(stats))
        shards.append(stats)
    from shards.schema import ShardStats
    from shards.writer import set_id

    manifest = json.loads((out / "manifest.json").read_bytes()) | {"format": version}
    manifest["set_id"] = set_id([ShardStats.parse(stats, "") for stats in shards])
    (out / "manifest.json").write_bytes(fmt.canonical_json(manifest | {"digest": fmt.manifest_digest(manifest)}))
    return out


def test_sets_of_before_are_read_without_it(tickets: Path, tmp_path: Path) -> None:
    for number, column in enumerate((None, pa.array(["anything"]))):  # an unknown column is left alone
        old = as_format(tickets, tmp_path / f"old{number}", [1, 2], column)
        opened = TicketSet.open(str(old))
        assert not opened.says_spread and "spread" not in opened.shard_table("train-000000").column_names
        assert "sound" in inspect("verify", old, "--deep").output
    new = as_format(tickets, tmp_path / "new", [1, 3])
    assert "no column spread" in inspect("verify", new, code=1).output


def test_verify_finds_counts_that_cannot_be(tickets: Path, tmp_path: Path) -> None:
    wrong = as_format(tickets, tmp_path / "wrong", [1, 3], pa.array([bytes(range(28, 0, -1))]))
    assert "column spread: expected numbers of patches" in inspect("verify", wrong, code=1).output
