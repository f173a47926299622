"""RANK and WORLD_SIZE: a process whose place is unclear stops in words."""

import pytest

from conftest import mine
from shards.errors import TicketSetError
from shards.ranks import rank_and_world


def place(monkeypatch, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("rank", "world", "expected"),
    [
        (None, None, (0, 1)),
        ("0", "1", (0, 1)),
        ("3", "4", (3, 4)),
        ("007", "08", (7, 8)),
        ("0", None, (0, 1)),
        (None, "1", (0, 1)),
    ],
)
def test_a_place(rank, world, expected, monkeypatch):
    place(monkeypatch, rank, world)
    assert rank_and_world() == expected


BAD = [
    ("0", "", "WORLD_SIZE: expected a whole number, got ''"),
    ("", "2", "RANK: expected a whole number, got ''"),
    ("0", "two", "WORLD_SIZE: expected a whole number, got 'two'"),
    ("-1", "2", "RANK: expected a whole number, got '-1'"),
    ("1.0", "2", "RANK: expected a whole number, got '1.0'"),
    ("²", "4", "RANK: expected a whole number, got '²'"),
    ("9" * 5000, "2", f"RANK: expected a whole number, got '{'9' * 40}'"),
    ("2", "2", "RANK: expected a number below WORLD_SIZE 2, got 2"),
    ("0", "0", "RANK: expected a number below WORLD_SIZE 0, got 0"),
    ("1", None, "RANK: expected a number below WORLD_SIZE 1, got 1"),
    (None, "2", "RANK: expected a number below WORLD_SIZE 2, it is not set"),
    (None, "", "WORLD_SIZE: expected a whole number, got ''"),
]


@pytest.mark.parametrize(("rank", "world", "reason"), BAD)
def test_a_place_that_is_none(rank, world, reason, monkeypatch):
    place(monkeypatch, rank, world)
    with pytest.raises(TicketSetError) as error:
        rank_and_world()
    assert str(error.value) == f"{reason}; start it with torchrun, or unset RANK and WORLD_SIZE"


@pytest.mark.parametrize(("rank", "world", "reason"), BAD)
def test_mining_says_so_and_writes_nothing(rank, world, reason, photos, tmp_path, monkeypatch):
    place(monkeypatch, rank, world)
    output = mine("--data", photos, "--out", tmp_path / "out", "--method", "center", code=1).output
    assert output.startswith(f"Error: {reason}") and output.count("\n") == 1
    assert not (tmp_path / "out").exists()
