"""Mining into an object store against a folder, and one worker against two, on this machine; requests that it takes.

The store is that of `stores`. Rates are of mining alone, as commands print them: the libraries are imported and the models
built before. A shard is some 40 photos, so that a commit is paid twenty times as often as with the default.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.rounds import Lap, Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting, one_thread, run
from benchmarks.stores import BUCKET, store
from tests.servers import FaultServer, s3_environment

SHARD = 40
# Name: method and its flags, images. deit_tiny is the bottleneck of the first, decoding that of the second.
METHODS = {
    "evit, deit_tiny": (["--selector", "deit_tiny", "--views", "2"], 160),
    "center": (["--method", "center", "--views", "4"], 400),
}
_MINED = re.compile(r"mined(?: here)? ([0-9]+) images.*: ([0-9.]+) images/s")


def measure(setting: Setting) -> Part:
    part = Part(notes=[f"shards of {SHARD} photos"])
    weights = random_weights(setting.work / "deit_tiny.safetensors")
    with store(setting.work) as (name, address), FaultServer(address).running() as counting:
        part.notes.append(name)
        os.environ.update(s3_environment(f"http://{address[0]}:{address[1]}"))
        for method, (flags, images) in METHODS.items():
            if "--selector" in flags:
                flags = [*flags, "--weights", str(weights)]
            flags = ["--data", str(setting.pictures), *flags, "--limit", str(images), "--val-share", "0"]
            laps = turns(legs(setting.work, method.split(",")[0], flags), setting.rounds)
            part.laps |= {f"{method}, {leg}": found for leg, found in laps.items()}
            rate, _ = speedup(laps["store"], laps["folder"])
            part.rows.append(Row(f"mining into a store, {method}, images/s", "a folder", rate, wanted=(">=", 0.95)))
            rate, _ = speedup(laps["one worker"], laps["folder"])
            part.rows.append(Row(f"--elastic, one worker, {method}, images/s", "without", rate))
            rate, _ = speedup(laps["two workers"], laps["one worker"])
            part.rows.append(Row(f"--elastic, two workers of one thread each, {method}, images/s", "one", rate))
        os.environ.update(s3_environment(counting.url))
        counts(setting, part, counting)
    return part


def counts(setting: Setting, part: Part, counting: FaultServer) -> None:
    """Requests and bytes of mining into a store, by one process."""
    flags = ["--data", str(setting.pictures), "--method", "center", "--limit", "400", "--val-share", "0"]
    shards = 400 // SHARD
    for name, more in (("plain", []), ("--elastic", ["--elastic"])):
        counting.clear()
        run("miner.cli", *flags, *more, "--shard-size", str(SHARD), "--out", f"s3://{BUCKET}/counted{len(more)}")
        kinds = {kind: counting.count(kind) for kind in ("PUT", "LIST", "HEAD", "GET", "DELETE")}
        said = " + ".join(f"{number} {kind}" for kind, number in kinds.items())
        total = [sum(kinds.values())]
        part.rows.append(
            Row(f"mining {shards} shards into a store, {name}: requests", "", total, unit="requests", note=said)
        )
        part.rows.append(
            Row(f"mining {shards} shards into a store, {name}: bytes", "", [counting.bytes("PUT") / 1e6], unit="MB")
        )


def random_weights(path: Path) -> Path:
    """Of deit_tiny; they cost the same."""
    import timm
    from safetensors.torch import save_file

    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=10).state_dict(), path)
    return path


def legs(work: Path, method: str, flags: list[str]) -> dict[str, Leg]:
    numbers = iter(range(10**6))

    def leg(workers: int, remote: bool, *more: str) -> Leg:
        def mine() -> Lap:
            name = f"{method}-{next(numbers)}"
            out = f"s3://{BUCKET}/{name}" if remote else str(work / name)
            command = [
                sys.executable,
                "-m",
                "miner.cli",
                *flags,
                "--out",
                out,
                "--shard-size",
                str(SHARD),
                "-j",
                "1",
                *more,
            ]
            started = [
                subprocess.Popen(command, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for _ in range(workers)
            ]
            said = [process.communicate() for process in started]
            failed = [errors for process, (_, errors) in zip(started, said, strict=True) if process.returncode]
            if failed:
                raise RuntimeError(f"{' '.join(command)}: {failed[0].strip()[-500:]}")
            lap = together([output for output, _ in said])
            shutil.rmtree(work / name, ignore_errors=True)
            return lap

        return mine

    return {
        "folder": leg(1, False),
        "store": leg(1, True),
        "one worker": leg(1, False, "--elastic"),
        "two workers": leg(2, False, "--elastic", "--claim-seconds", "10"),
    }


def together(said: list[str]) -> Lap:
    """The images of all, and the seconds of the slowest."""
    found = [(int(match[1]), float(match[2])) for match in map(_MINED.search, said) if match]
    return Lap(sum(images for images, _ in found), max(images / rate for images, rate in found), 0.0)
