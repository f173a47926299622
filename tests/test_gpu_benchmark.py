"""The acceptance of a GPU, tried without one: every part runs at toy size on a CPU, and a part that ends badly is said."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from benchmarks.gpu import command, speed
from benchmarks.gpu.bench import SIZES, WANTED, Bench, row
from benchmarks.rounds import Row

TIMED = ("steps", "rivals", "mining", "feed", "masks", "compile")  # says nothing at this size, on a busy machine


@pytest.mark.long
def test_every_part_runs_on_a_cpu_at_toy_size(tmp_path):
    flags = ["--device", "cpu", "--size", "toy", "--seconds", "1000", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "benchmarks", "gpu", *flags], env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    content = json.loads((tmp_path / "gpu.json").read_text())
    lines = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert lines == list(command.PARTS), done.stdout + done.stderr
    assert "failed" not in done.stdout and "stopped" not in done.stdout, done.stdout
    parts = {entry["what"].partition(":")[0] for entry in content["rows"]}
    assert parts == set(command.PARTS)
    short = [entry["what"] for entry in content["rows"] if entry.get("reached") is False]
    assert not [what for what in short if not what.startswith(TIMED)]
    assert done.returncode == bool(short)
    graphs = [entry["median"] for entry in content["rows"] if entry["what"].endswith("graphs compiled")]
    assert graphs == [1, 1, 0]  # another K is compiled once more, for every K
    judged = {entry["what"].rpartition(": ")[2] for entry in content["rows"] if "wanted" in entry}
    of_a_gpu = {"memory a view over K = 196, beyond the share of tokens", "waits of the host in a step",
                "waits of the host in a batch of validation"}  # fmt: skip
    assert judged == WANTED.keys() - of_a_gpu


def run(monkeypatch: pytest.MonkeyPatch, out: Path, **parts: object) -> tuple[Result, dict]:
    monkeypatch.setattr(command, "PARTS", {name: (1e-1, part) for name, part in parts.items()})
    done = CliRunner().invoke(command.main, ["--device", "cpu", "--size", "full", "--out", str(out)])
    return done, json.loads((out / "gpu.json").read_text())


def good(bench: Bench, notes: list[str]) -> Iterator[Row]:
    yield row("rows that are no permutation", 0)


def short(bench: Bench, notes: list[str]) -> Iterator[Row]:
    yield row("deit_tiny, K = 98: against timm's patch_drop_rate", 0.5)


def broken(bench: Bench, notes: list[str]) -> Iterator[Row]:
    yield row("found before", 1)
    raise RuntimeError("no such kernel\nand more")


def endless(bench: Bench, notes: list[str]) -> Iterator[Row]:
    yield row("found before", 1)
    while True:
        time.sleep(0.01)


def test_a_missed_threshold_is_said_and_is_the_exit_code(monkeypatch, tmp_path):
    done, content = run(monkeypatch, tmp_path, short=short, good=good)
    assert done.exit_code == 1
    first, second = done.output.splitlines()
    assert "MISSED short: deit_tiny, K = 98: against timm's patch_drop_rate 0.5 (>= 0.97)" in first
    assert second == "good: 0 s, 1 rows"
    assert [entry["reached"] for entry in content["rows"]] == [False, True]
    assert run(monkeypatch, tmp_path, good=good)[0].exit_code == 0


def test_a_part_that_fails_keeps_its_rows_and_the_others_go_on(monkeypatch, tmp_path):
    done, content = run(monkeypatch, tmp_path, broken=broken, good=good)
    assert done.exit_code == 1
    assert done.output.splitlines()[0] == "broken: 0 s, 1 rows, failed: RuntimeError: no such kernel"
    assert [entry["what"] for entry in content["rows"]] == [
        "broken: found before", "good: rows that are no permutation"
    ]  # fmt: skip


def test_a_part_is_stopped_when_its_time_is_up(monkeypatch, tmp_path):
    done, content = run(monkeypatch, tmp_path, endless=endless, good=good)
    assert done.exit_code == 1 and len(content["rows"]) == 2  # not accepted, since not measured
    assert content["notes"] == ["endless: stopped after 0 s"]


def test_memory_is_counted_by_what_a_view_adds(monkeypatch):
    """Torch's counters are those of a GPU: stand in for them, with 100 bytes a step and 7 a view."""

    class Model:
        batch = 8

        def ours(self, tokens: int, views: int) -> object:
            return lambda: used.append(100 + 7 * views)

    used = [0]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50 + used[-1])
    bench = Bench(torch.device("cuda", 0), SIZES["toy"], Path())
    assert speed.memory_a_view(bench, Model(), 98) == 7
