"""The torture: hostile sets, odd files, dying processes, full disks, for a bounded time. `make torture`.

    python tests/torture --seconds 240 --seed 0

Every try is watched for the promise of docs/RELIABILITY.md: a right result or one line, below 1 GB and 10 s, nothing
opened that is no part of it. Prints how often each was tried; exits 1 where one broke it, with what repeats it.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]  # the project, tests/, and this folder

import torch
from dying import Full, mining, training
from forged import make_sets
from forged import run as forged_case
from odd import image_case, tar_case
from watch import Case, Watch

SHARES = {"forged sets": 0.5, "odd images": 0.08, "odd tars": 0.12, "dying": 0.2, "full disks": 0.1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="for all, divided among the campaigns")
    parser.add_argument("--seed", type=int, default=0, help="of the first try of each campaign; tries count up from it")
    parser.add_argument("--only", choices=SHARES, help="one campaign alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        return torture(root, options.seconds, options.seed, options.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def torture(root: Path, seconds: float, seed: int, only: str | None) -> int:
    watch, sets = Watch(), make_sets(root / "sets")
    copy, ranked = (mining(root / "sets/photos", root / images, images) for images in ("copy", "ranked"))
    trainer = training(sets["plain"], root / "training")
    disks = Full(copy, 120_000), Full(ranked, 200_000), Full(trainer, 900_000)
    full = [disk for disk in disks if disk.possible()]
    if not full:
        print("full disks: left out, this user may not mount one")

    def forged(rng: random.Random) -> Case:
        work = root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return forged_case(sets, work, watch, rng)

    campaigns: dict[str, Callable[[random.Random], Case]] = {
        "forged sets": forged,
        "odd images": lambda rng: image_case(watch, rng, root / "odd"),
        "odd tars": lambda rng: tar_case(watch, rng, root / "odd"),
        "dying": lambda rng: rng.choice([copy, ranked, trainer]).case(rng),
        "full disks": lambda rng: rng.choice(full).case(rng),
    }
    faults = 0
    for name, campaign in campaigns.items():
        if (only and name != only) or (name == "full disks" and not full):
            continue
        counts: collections.Counter[str] = collections.Counter()
        until = time.monotonic() + seconds * (1 if only else SHARES[name])
        number = seed
        while time.monotonic() < until:
            case = campaign(random.Random(f"{name} {number}"))
            counts[f"{case.use}: {case.outcome}" if name in ("dying", "full disks") else case.outcome] += 1
            if case.fault:
                faults += 1
                print(f"FAULT in {name} (--only '{name}' --seed {number}): {case.title}\n{case.fault}\n", flush=True)
            number += 1
        told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(counts.items()))
        print(f"{name}: {number - seed} tries; {told}", flush=True)
    print(f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
