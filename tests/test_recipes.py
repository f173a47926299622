"""The recipes: their command lines are taken, their workers hear the signals, their YAML holds what it is for."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from command_lines import check_taken

RECIPES = Path(__file__).parent.parent / "recipes"
SCRIPTS = sorted([*RECIPES.glob("*.sh"), *RECIPES.glob("*.sbatch")])
# Stands for every command that a recipe calls, and writes down how it was called.
CALLED = """#!/usr/bin/env bash
printf '%s\\n' "${CUDA_VISIBLE_DEVICES:-}" "${0##*/}" "$@" > "$CALLS/$$"
"""
STOPPED = CALLED + "trap 'touch \"$CALLS/$$.stopped\"; exit 143' TERM\nwhile true; do sleep 0.05; done\n"
SLURM = {"SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen]:
    """Starts a shell text in a folder where a stand-in answers for the commands."""

    def started(text: str, stand_in: str = CALLED, **environment: str) -> subprocess.Popen:
        for name in ("datalth-mine", "datalth-train", "torchrun", "srun", "ray", "scontrol"):
            (tmp_path / name).write_text(stand_in)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "calls").mkdir()
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        return subprocess.Popen(["bash", "-c", text], env={**os.environ, **path, **environment}, cwd=tmp_path)

    return started


def calls(folder: Path) -> list[list[str]]:
    """(CUDA_VISIBLE_DEVICES, command, flags...) of each that calls one of ours."""
    found = [path.read_text().splitlines() for path in (folder / "calls").iterdir() if path.name.isdigit()]
    return sorted(words for words in found if any(word.startswith("datalth-") for word in words[1:]))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_calls_is_taken_by_its_command(script, start, tmp_path):
    assert start(script.read_text(encoding="utf-8"), **SLURM).wait(30) == 0
    found = calls(tmp_path)
    assert found
    for words in found:
        check_taken(words)
    if script.name == "shells.sh":
        assert [words[0] for words in found] == [str(gpu) for gpu in range(8)]


@pytest.mark.parametrize(("name", "workers"), [("shells.sh", 8), ("slurm.sbatch", 1)])
def test_a_script_that_is_told_to_end_tells_its_workers(name, workers, start, tmp_path):
    script = start((RECIPES / name).read_text(encoding="utf-8"), STOPPED)
    until(lambda: len(calls(tmp_path)) == workers)
    time.sleep(0.1)  # from its call to its trap
    script.send_signal(signal.SIGTERM)
    assert script.wait(30) != 0
    assert len(list((tmp_path / "calls").glob("*.stopped"))) == workers


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_slurm_requeues_and_warns():
    for name, flag in (("slurm.sbatch", "--signal=B:TERM@120"), ("train.sbatch", "--signal=TERM@120")):
        lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
        head = [line.split()[1] for line in lines[: lines.index("set -euo pipefail")] if line.startswith("#SBATCH")]
        assert {"--requeue", flag} <= set(head)


def test_kubernetes_restarts_what_was_evicted_and_counts_what_failed():
    job = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text(encoding="utf-8"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    assert spec["backoffLimitPerIndex"] >= 1 and spec["maxFailedIndexes"] < spec["completions"]
    first, *_ = spec["podFailurePolicy"]["rules"]  # the first that fits decides
    assert first == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert pod["restartPolicy"] == "Never"  # a failure policy asks for it
    (worker,) = pod["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--elastic" in worker["command"]
    check_taken([*worker["command"], *worker["args"]])


def test_skypilot_starts_one_worker_on_a_spot_machine(start, tmp_path):
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["resources"]["use_spot"] is True and "num_nodes" not in task
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == 143
    assert start(task["run"], **task["envs"]).wait(30) == 0
    (words,) = calls(tmp_path)
    check_taken(words)
    assert "--elastic" in words and task["envs"]["DATA"] in words
