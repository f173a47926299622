"""Legs that take turns (A B A B ...), ratios of each round, and the JSON file they end in.

A ratio is taken within a round, so that a machine that slows down slows both sides. Medians and spread are of the
rounds' ratios; wall time and CPU time are kept beside each other, since a shared machine lies about the first.
"""

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg", "webdataset", "pyarrow")


@dataclass(frozen=True)
class Lap:
    """One leg of one round."""

    units: float
    wall: float
    cpu: float


@dataclass
class Row:
    """One line of the table.

    Attributes:
        what: was measured.
        against: what it is compared with.
        values: one a round; a ratio, or a figure in `unit`.
        cpu: the same of CPU time, where that says more.
        wanted: (">=" or "<=", number); None where a row only informs.
        unit: "x" for a ratio.
        note: what the numbers do not say.
    """

    what: str
    against: str
    values: list[float]
    cpu: list[float] = field(default_factory=list)
    wanted: tuple[str, float] | None = None
    unit: str = "x"
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        median = statistics.median(self.values)
        entry: dict[str, Any] = {"what": self.what, "against": self.against, "unit": self.unit}
        entry |= {"median": round(median, 4), "low": round(min(self.values), 4), "high": round(max(self.values), 4)}
        if self.cpu:
            entry["cpu_median"] = round(statistics.median(self.cpu), 4)
        if self.wanted:
            sign, limit = self.wanted
            reached = median >= limit if sign == ">=" else median <= limit
            entry |= {"wanted": f"{sign} {limit:g}", "reached": reached}
        return entry | ({"note": self.note} if self.note else {})


@dataclass
class Part:
    """What one part measured: rows for the table, and every lap of every leg."""

    rows: list[Row] = field(default_factory=list)
    laps: dict[str, list[Lap]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip(self, what: str, why: str) -> None:
        print(f"skipped: {what}: {why}", flush=True)
        self.notes.append(f"skipped: {what}: {why}")


Leg = Callable[[], float | Lap]  # does its work; says how many units it did, or times itself


def turns(legs: dict[str, Leg], rounds: int) -> dict[str, list[Lap]]:
    """Every leg once a round, in order; a first round warms up and is not counted."""
    laps: dict[str, list[Lap]] = {name: [] for name in legs}
    for number in range(rounds + 1):
        for name, leg in legs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            done = leg()
            lap = done if isinstance(done, Lap) else None
            if lap is None:
                lap = Lap(float(done), time.perf_counter() - wall, time.process_time() - cpu)  # type: ignore[arg-type]
            if number:
                laps[name].append(lap)
    return laps


def speedup(ours: list[Lap], theirs: list[Lap]) -> tuple[list[float], list[float]]:
    """How many times the units a second of theirs, by wall and by CPU time, one a round."""
    pairs = list(zip(ours, theirs, strict=True))
    wall = [(a.units / a.wall) / (b.units / b.wall) for a, b in pairs]
    cpu = [(a.units / a.cpu) / (b.units / b.cpu) for a, b in pairs if a.cpu and b.cpu]
    return wall, cpu


def save(name: str, part: Part, command: str, folder: Path = RESULTS) -> Path:
    """Write FOLDER/NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "part": name,
        "command": command,
        "rounds": max((len(row.values) for row in part.rows), default=0),
        "machine": machine(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))} | {"python": platform.python_version()},
        "rows": [row.as_json() for row in part.rows],
        "rates": {
            leg: {
                "units_per_second": round(statistics.median(lap.units / lap.wall for lap in laps), 3),
                "wall": [round(lap.wall, 4) for lap in laps],
                "cpu": [round(lap.cpu, 4) for lap in laps],
            }
            for leg, laps in part.laps.items()
        },
        "notes": part.notes,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """CPU and cores; nothing that names the machine itself."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "load": round(os.getloadavg()[0], 1)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
