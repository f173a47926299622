"""Runs of datalth-train at toy size, and predictions of them, for the tests of training."""

import csv
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from trainer.cli import main
from trainer.predict.cli import main as predict_main

SMALL = ["--model-kwargs", "embed_dim=32", "--model-kwargs", "depth=2", "--model-kwargs", "num_heads=2"]
QUICK = [*SMALL, "--epochs", "2", "-b", "4", "--warmup-epochs", "1", "-j", "0", "--repeats", "2", "--log-interval", "1"]


def arguments(tickets: Path, output: Path, name: str, *more: object, plain: bool = False) -> list[str]:
    """Of a quick run; `plain` leaves the small ViT out, for a --model of another family."""
    quick = QUICK[len(SMALL) :] if plain else QUICK
    return ["--shards", str(tickets), *quick, "--output", str(output), "--experiment", name, *map(str, more)]


def train(tickets: Path, output: Path, name: str, *more: object, code: int = 0, plain: bool = False) -> Result:
    result = CliRunner().invoke(main, arguments(tickets, output, name, *more, plain=plain))
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def predict(*flags: object, code: int = 0) -> Result:
    """datalth-predict in this process; assert its exit code."""
    result = CliRunner().invoke(predict_main, ["--device", "cpu", "-j", "2", *map(str, flags)])
    assert result.exit_code == code, result.output + "".join(map(str, result.exc_info or ()))
    return result


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "last.pth.tar", weights_only=True)["state_dict"]


def summary_of(run: Path) -> list[dict[str, str]]:
    """Rows of summary.csv without `seconds`, which no two runs share."""
    with open(run / "summary.csv", encoding="utf-8", newline="") as file:
        return [{name: cell for name, cell in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stopped_at(update: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGTERM) -> None:
    """A signal before the given update."""
    from trainer import engine

    calls = []
    apply = engine.apply_update

    def counted(*args: object) -> None:
        calls.append(1)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        apply(*args)

    monkeypatch.setattr(engine, "apply_update", counted)


def two_ranks(*flags: str, program: str | None = None, module: str = "trainer.cli") -> list[subprocess.Popen]:
    """datalth-train, or a script in its place, as two gloo ranks."""
    start = [program] if program else ["-m", module]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, *start, *flags],
            env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
