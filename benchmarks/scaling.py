"""Whether cost follows the number of images: CPU time an image, and peak memory, of mining, reading and training.

Each measurement is a fresh process. Images are small, so that what is counted is all that a count can cost; time counts
from when the libraries are imported, which takes longer than a thousand images.
"""

import itertools
import subprocess
import sys
from pathlib import Path

from benchmarks.pictures import make_small_pictures
from benchmarks.rounds import Part, Row
from benchmarks.setting import Setting, one_thread

COUNTS = (1000, 5000, 20000)
SIDE = 32
READ = """
import sys, time, torch
torch.set_num_threads(1)
from shards.reader import TicketSet
from shards.rows import Rows
from trainer.data.dataset import FeedOptions, TrainFeed, loader
import torchvision.transforms.v2
start = time.process_time()
feed = TrainFeed(Rows(TicketSet.open(sys.argv[1]), "train"), FeedOptions(arm="winning", tokens=3, img_size=32,
    patch_size=16, seed=0, batch_size=50, global_batch=50))
for batch in loader(feed, [(0, step, 0) for step in range(feed.steps())], 0, torch.device("cpu")):
    pass
print(time.process_time() - start)
"""
# A command, and what it takes once its libraries are there.
COMMAND = """
import importlib, sys, time, torch, timm
import torchvision.transforms.v2
torch.set_num_threads(1)
command, engine = (importlib.import_module(name) for name in sys.argv[1:3])
start = time.process_time()
try:
    command.main(sys.argv[3:], standalone_mode=False)
except SystemExit as done:
    assert not done.code, done.code
print(time.process_time() - start)
"""
# A process's peak memory begins with that of the process it was started from, so a small one starts it.
LAUNCH = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def measure(setting: Setting) -> Part:
    cost: dict[str, list[dict[int, tuple[float, float]]]] = {"mining": [], "reading": [], "training": []}
    folders = {count: make_small_pictures(setting.work / f"small{count}", count, SIDE) for count in COUNTS}
    sets = {count: Path(setting.work, f"set{count}") for count in COUNTS}
    sizes = ["--img-size", str(SIDE), "--views", "2", "--shard-size", "1000"]
    for number in range(setting.rounds):
        found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in cost}
        for count in COUNTS:
            mining = [
                "miner.cli",
                "miner.job",
                "--data",
                str(folders[count]),
                "--out",
                str(sets[count]),
                "--overwrite",
            ]
            found["mining"][count] = usage([COMMAND, *mining, "--method", "center", "--val-share", "0.01", *sizes])
            found["reading"][count] = usage([READ, str(sets[count])])
            if number == 0 and count != COUNTS[1]:  # memory alone
                found["training"][count] = usage(training(sets[count], setting.work / f"run{count}"))
        for name, figures in found.items():
            cost[name].append(figures)
    part = Part(notes=["training's memory: one round"])
    few, _, many = COUNTS
    for name in ("mining", "reading"):
        for fewer, more in itertools.pairwise(COUNTS):
            ratios = [(f[more][0] / more) / (f[fewer][0] / fewer) for f in cost[name]]
            what = f"{name}: CPU time an image at {more} images"
            part.rows.append(Row(what, f"at {fewer}", ratios, wanted=("<=", 1.15)))
    for name, rounds in cost.items():
        memory = [f[many][1] / f[few][1] for f in rounds if f]
        part.rows.append(Row(f"{name}: peak memory at {many} images", f"at {few}", memory, wanted=("<=", 1.1)))
    return part


def training(shards: Path, output: Path) -> list[str]:
    """datalth-train for one epoch of a very small model."""
    flags = {"--shards": shards, "--output": output, "--model": "test_vit", "--epochs": 1, "--warmup-epochs": 0}
    flags |= {"--repeats": 1, "--mixup": 0, "--cutmix": 0, "-b": 50, "-j": 0, "--device": "cpu"}
    return [COMMAND, "trainer.cli", "trainer.run", *(str(part) for flag in flags.items() for part in flag)]


def usage(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds once libraries are imported, and peak bytes, of one Python process: a script and its arguments.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-c", *arguments]
    done = subprocess.run(command, env=one_thread(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[1:])}: {done.stderr.strip()[-500:]}")
    *_, seconds, peak = done.stdout.split()
    return float(seconds), float(peak) * (1 if sys.platform == "darwin" else 1024)
