"""datalth-mine --ray: whatever dies, the bytes are those of one process. A cluster of two nodes, each with a GPU that is none."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from conftest import SELECTOR, contents, mine
from miner.cli import main
from miner.job import Job
from miner.progress import ProgressBar
from miner.ray_pool import Need, RayPool, Worker
from miner.settings import Fleet, Machine
from shards.errors import TicketSetError
from shards.store import open_store

# A method of the user's own, beside where the command is typed. It waits where it is told to, and says who it is.
METHOD = """
import os, time
from pathlib import Path
import torch

HERE = Path(__file__).parent

def edges(selector, images, seeds):
    if (images.amax((1, 2, 3)) == 0).any():
        raise ValueError("too dark")
    (HERE / f"{os.getpid()}.pid").touch()
    while (HERE / "hold").exists():
        time.sleep(0.05)
    steps = (images[..., 1:] - images[..., :-1]).abs().mean(1, keepdim=True)
    scores = torch.nn.functional.adaptive_avg_pool2d(steps, selector.grid).flatten(1)
    return scores.argsort(dim=1, descending=True, stable=True), scores
"""


def nodes(*resources: tuple[int, int]) -> list[dict[str, Any]]:
    """Of (CPUs, GPUs) each, as Ray shows them: what there is none of is not named."""
    named = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in resources]
    return [{"Resources": {name: count for name, count in each.items() if count}} for each in named]


@pytest.mark.parametrize(
    ("there", "machine", "blind", "need", "room"),
    [
        (nodes((0, 0), (64, 8), (32, 8)), Machine(), False, Need(1, 4), 16),
        (nodes((2, 0), (96, 2)), Machine(), False, Need(1, 16), 2),
        (nodes((1, 4)), Machine(), False, Need(1, 0), 4),
        (nodes((64, 8)), Machine(workers=16), False, Need(1, 16), 4),
        (nodes((8, 1), (4, 0)), Machine(device="cpu"), False, Need(0, 4), 3),
        (nodes((8, 1), (4, 0)), Machine(), True, Need(0, 4), 3),
        (nodes((0, 0), (64, 0)), Machine(), False, Need(0, 16), 4),
        (nodes((8, 0)), Machine(device="cuda", workers=2), False, Need(1, 2), 0),
        (nodes(), Machine(), False, Need(0, 1), 0),
    ],
)
def test_a_worker_takes_a_gpu_and_its_share_of_cpus(there, machine, blind, need, room) -> None:
    assert Need.of(there, machine, blind) == need and need.room(there) == room


def test_a_worker_cannot_be_given_one_gpu_by_number() -> None:
    with pytest.raises(TicketSetError, match="`device` cuda:1: Ray gives each worker its GPU; expected cuda or cpu"):
        Need.of([], Machine(device="cuda:1"), False)


def test_without_ray_it_is_said_in_one_line(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]  # so it cannot be imported
    said = mine("--data", photos, "--out", tmp_path / "set", "--method", "center", "--ray", code=1).stderr
    assert said == "Error: --ray: Ray is not installed; pip install 'datalth[ray]'\n"


def test_ray_under_torchrun_is_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--ray under torchrun: " in mine("--data", photos, "--out", tmp_path, "--ray", code=2).stderr


@pytest.fixture
def job(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """That of a command which has not begun to mine; its images are those of tmp_path/photos."""
    jobs: list[Job] = []
    monkeypatch.setattr("miner.run.mine_shards", lambda job, *rest: jobs.append(job))
    (tmp_path / "photos").symlink_to(photos)
    mine("--data", tmp_path / "photos", "--out", tmp_path / "set", "--method", "center")
    return jobs[0]


@pytest.mark.slow
def test_a_node_that_lacks_the_data_mines_no_failures(job: Job, tmp_path: Path) -> None:
    (tmp_path / "photos").unlink()
    with pytest.raises(TicketSetError, match="`data` .*: cannot be read .*all nodes see .on node "):
        Worker().ready(job, str(tmp_path))
    (tmp_path / "set").rename(tmp_path / "moved")
    with pytest.raises(TicketSetError, match="set is not the driver's; expected a folder that all nodes share"):
        Worker().ready(job, str(tmp_path))


@pytest.mark.long
def test_one_is_started_here_where_there_is_none_and_ended_with_the_command(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    line = [
        "--img-size",
        64,
        "--data",
        photos,
        "--selector",
        SELECTOR,
        "--weights",
        weights,
        "-b",
        4,
        "-j",
        1,
        "--views",
        2,
    ]
    mine(*line, "--out", tmp_path / "alone")
    command = [sys.executable, "-m", "miner.cli", *map(str, line), "--ray", "local", "--out", str(tmp_path / "set")]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert mined(tmp_path / "set") == mined(tmp_path / "alone")
    assert json.loads((tmp_path / "set" / "plan.json").read_text())["common"]["batch_size"] == 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head and two nodes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_timeout_ms": 1000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {**quick, "health_check_failure_threshold": 3}}
    # Else a node that comes later sets a handler of signals, which only the main thread can.
    ray = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    for _ in range(2):
        ray.add_node(num_cpus=1, num_gpus=1)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def words(photos: Path) -> list[str]:
    """Train in shards of 6, 6, 6 and 3 images, val in one of 6."""
    return f"--img-size 64 --data {photos} --method held:edges --views 3 --shard-size 6 -b 4 --tokens 6".split()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands are typed."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "held.py").write_text(METHOD)
    return folder


@pytest.fixture(scope="module")
def reference(words: list[str], desk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process mines."""
    out = tmp_path_factory.mktemp("reference") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        result = CliRunner().invoke(main, [*words, "--device", "cpu", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return mined(out)


def mined(folder: Path) -> dict[str, bytes]:
    """The shards of a set that is whole. Its plan notes the device, and its manifest a hash of that."""
    assert (folder / "manifest.json").exists()
    return {name: data for name, data in contents(folder).items() if "-0" in name}


def events(desk: Path, *actions: Callable[[set[int]], Any], workers: int = 2) -> Any:
    """While its body runs, workers wait. As soon as two are at work, the actions are done, given their pids, and when so
    many have been at work, these go on."""

    @contextlib.contextmanager
    def context() -> Iterator[SimpleNamespace]:
        seen = SimpleNamespace(pids=set(), error=None)
        for path in desk.glob("*.pid"):
            path.unlink()
        (desk / "hold").touch()

        def come(count: int) -> None:
            deadline = time.monotonic() + 60
            while len(seen.pids) < count:
                assert time.monotonic() < deadline, f"of {count} workers only {seen.pids} came"
                time.sleep(0.05)
                seen.pids = {int(path.stem) for path in desk.glob("*.pid")}

        def act() -> None:
            try:
                come(2)
                for action in actions:
                    action(seen.pids)
                come(workers)
            except BaseException as error:
                seen.error = error
            finally:
                (desk / "hold").unlink()

        thread = threading.Thread(target=act)
        thread.start()
        try:
            yield seen
        finally:
            thread.join()
        assert seen.error is None, seen.error

    return context()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


@pytest.mark.long
@pytest.mark.parametrize("what", ["nothing", "a worker", "a node"])
def test_whatever_dies_the_bytes_are_those_of_one_process(
    what: str,
    cluster: Any,
    words: list[str],
    desk: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The method is found in the working folder, the folder of the set by a relative path."""

    def kill_a_worker(pids: set[int]) -> None:
        if what == "a worker":
            os.kill(min(pids), signal.SIGKILL)

    def swap_a_node(pids: set[int]) -> None:
        if what == "a node":
            cluster.remove_node(max(cluster.worker_nodes, key=id), allow_graceful=False)
            cluster.add_node(num_cpus=1, num_gpus=1)

    monkeypatch.chdir(desk)
    before, out = signal.getsignal(signal.SIGTERM), os.path.relpath(tmp_path / "set", desk)
    with events(desk, kill_a_worker, swap_a_node, workers=2 if what == "nothing" else 3):
        result = CliRunner().invoke(main, [*words, "--ray", cluster.address, "--out", out])
    assert result.exit_code == 0, result.output
    assert mined(tmp_path / "set") == reference
    assert "cuda: workers of Ray, 1 GPU and 1 CPU each" in result.stdout and "mined 27 images" in result.stdout
    assert all(line.startswith("mining ") for line in result.stderr.splitlines())  # nothing of Ray's on the screen
    assert "raylet" not in result.stdout
    assert signal.getsignal(signal.SIGTERM) == before  # nor its handler


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_driver_may_be_stopped_and_started_again(
    number: signal.Signals, cluster: Any, words: list[str], desk: Path, reference: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(desk)
    line = [*words, "--ray", cluster.address, "--out", str(tmp_path / "set")]
    with events(desk, lambda pids: driver.send_signal(number), lambda pids: driver.wait(60)) as seen:
        driver = subprocess.Popen([sys.executable, "-m", "miner.cli", *line], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, text=True)  # fmt: skip
    if number == signal.SIGTERM:
        assert (
            driver.communicate()[1].startswith("SIGTERM: stopped; finished shards are safe")
            and driver.returncode == 143
        )
    assert not (tmp_path / "set" / "manifest.json").exists()
    deadline = time.monotonic() + 30
    while any(map(alive, seen.pids)):  # of a driver that is gone, no worker stays
        assert time.monotonic() < deadline
        time.sleep(0.1)
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 0, result.output
    assert mined(tmp_path / "set") == reference


@pytest.mark.long
def test_a_shard_that_always_fails_is_reported_and_stops_no_other(
    cluster: Any, photos: Path, words: list[str], desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    data, out = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "set"
    Image.new("RGB", (80, 60)).save(data / "train" / "bee" / "dark.png")
    line = [*words, "--ray", cluster.address, "--out", str(out), "--data", str(data), "--attempts", "2"]
    result = CliRunner().invoke(main, line)
    assert result.exit_code == 1
    said, poison = result.stderr.splitlines()[-2:]
    assert said == "Error: 1 of 5 shards failed; the others are done"
    name, reason = poison.strip().split(": ", 1)
    assert name.startswith("train-") and reason == "ValueError: too dark"
    assert {p.stem for p in out.glob("*-0*.json")} == {p.stem for p in (out / "index").glob("*")} != set()
    assert len(list(out.glob("*-0*.json"))) == 4 and not (out / f"{name}.json").exists()
    (data / "train" / "bee" / "dark.png").write_bytes(b"no picture")
    line[line.index("--out") + 1] = str(tmp_path / "strict")
    result = CliRunner().invoke(main, [*line, "--max-failures", "0"])
    assert result.exit_code == 1 and "1 images failed, --max-failures allows 0 of this run (" in result.stderr
    assert "dark.png" in result.stderr


@pytest.mark.long
def test_where_no_worker_can_be_set_up_it_is_said(cluster: Any, job: Job, tmp_path: Path) -> None:
    pool = RayPool(Fleet(ray=cluster.address), Machine(), blind=True)
    with (
        contextlib.closing(pool),
        pytest.raises(TicketSetError, match="`ray`: no worker can be set up: .*elsewhere is not"),
    ):
        pool.mine(
            dataclasses.replace(job, store=open_store(str(tmp_path / "elsewhere"))),
            job.plan.shards(),
            ProgressBar(0, 0),
        )
