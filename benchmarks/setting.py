"""What every part is given: images, a ticket set mined from them, rounds, a folder to work in."""

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pictures import make_pictures


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        work: an empty folder, removed at the end.
        rounds: counted ones.
        given: --data, a folder of class folders; None makes JPEGs.
        images: how many are made.
        peers: the Python of a virtual environment that holds litdata and mosaicml-streaming.
    """

    work: Path
    rounds: int
    given: Path | None
    images: int
    peers: str | None

    @functools.cached_property  # writes past the frozen __setattr__
    def pictures(self) -> Path:
        return self.given or make_pictures(self.work / "pictures", self.images)

    @functools.cached_property
    def shards(self) -> Path:
        """The pictures' ticket set: 16 views of r = .9; nothing here depends on which patches are in a ticket."""
        return mine(self.pictures, self.work / "shards")

    @functools.cached_property
    def ranked(self) -> Path:
        """The same tickets, with ranked views in place of the pictures."""
        return rank(self.shards, self.work / "ranked")


def mine(data: Path, out: Path, *flags: str) -> Path:
    """datalth-mine with the model-free method."""
    run("miner.cli", "--data", str(data), "--out", str(out), "--method", "center", "--val-share", "0", *flags)
    return out


def rank(tickets: Path, out: Path, *flags: str) -> Path:
    """A ticket set's views, stored by the rankings that it has."""
    run("miner.cli", "--data", str(tickets), "--out", str(out), "--images", "ranked", *flags)
    return out


def run(module: str, *arguments: str) -> None:
    """One of the product's commands, in one thread, quiet unless it fails.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def script(name: str) -> str:
    """The path of an installed console script of this environment.

    Raises:
        RuntimeError: it is not installed.
    """
    path = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name}: not installed; pip install -e .")
    return path
