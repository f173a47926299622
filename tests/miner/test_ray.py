"""datalth-mine --ray: whatever dies, the bytes are those of one process. A cluster of two nodes, each with a GPU that is none."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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

pytestmark = pytest.mark.xdist_group("ray")  # one cluster at a time

# A method of the user's own, beside where the command is typed. It says who is at work, and, where it is told to, waits in
# each worker's second shard: the first has five batches, or three and then two.
METHOD = """
import os, time
from pathlib import Path
import torch

HERE = Path(__file__).parent

def edges(selector, images, seeds):
    if (images.amax((1, 2, 3)) == 0).any():
        raise ValueError("too dark")
    if (images.amin((1, 2, 3)) == 1).any():
        os.kill(os.getpid(), 9)  # as a machine does that is short of memory
    (HERE / f"{os.getpid()}.came").touch()
    edges.calls = getattr(edges, "calls", 0) + 1
    while edges.calls > 6 and (HERE / "hold").exists():
        (HERE / f"{os.getpid()}.waits").touch()
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
        RayPool(Fleet(ray="auto"), Machine(device="cuda:1"), False)


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
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("mining ") for line in done.stderr.splitlines()), done.stderr  # nothing of Ray's
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


@contextlib.contextmanager
def events(desk: Path, act: Callable[[set[int]], Any], workers: int = 2) -> Iterator[None]:
    """Beside its body: when two workers wait, something happens to them, given their pids; when as many as `workers` have
    come, they go on."""
    for path in [*desk.glob("*.came"), *desk.glob("*.waits")]:
        path.unlink()
    (desk / "hold").touch()

    def wait_for(count: int, what: str) -> set[int]:
        deadline = time.monotonic() + 120
        while len(found := {int(path.stem) for path in desk.glob(f"*.{what}")}) < count:
            assert time.monotonic() < deadline, f"{found}: expected {count}"
            time.sleep(0.05)
        return found

    def happen() -> None:
        try:
            act(wait_for(2, "waits"))
            wait_for(workers, "came")
        finally:
            (desk / "hold").unlink()

    with ThreadPoolExecutor(1) as thread:
        happened = thread.submit(happen)
        yield
    happened.result()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def mine_on(cluster: Any, *line: str) -> Any:
    """Run the command in this process, on GPUs, were they any; gives its result. Nothing of Ray's is seen on the screen."""
    result = CliRunner().invoke(main, [*line, "--ray", cluster.address])
    assert "raylet" not in result.output, result.output
    return result


@pytest.mark.long
@pytest.mark.parametrize("what", ["a worker", "a node"])
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

    def lose(pids: set[int]) -> None:
        if what == "a worker":
            os.kill(min(pids), signal.SIGKILL)
        else:
            cluster.remove_node(max(cluster.worker_nodes, key=id), allow_graceful=False)
            cluster.add_node(num_cpus=1, num_gpus=1)

    monkeypatch.chdir(desk)
    handler = signal.getsignal(signal.SIGTERM)
    with events(desk, lose, workers=3):
        result = mine_on(cluster, *words, "--out", os.path.relpath(tmp_path / "set", desk))
    assert result.exit_code == 0, result.output
    assert mined(tmp_path / "set") == reference
    assert not list((tmp_path / "set").rglob("*.tmp"))  # what the dead had begun
    assert "cuda: workers of Ray, 1 GPU and 1 CPU each" in result.stdout and "mined 27 images" in result.stdout
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_leaves_no_worker_and_goes_on(
    number: signal.Signals,
    cluster: Any,
    words: list[str],
    desk: Path,
    reference: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(desk)
    line, out, workers = [*words, "--out", str(tmp_path / "set")], tmp_path / "set", set[int]()

    def stop(pids: set[int]) -> None:
        workers.update(pids)
        driver.send_signal(number)
        driver.wait(60)

    command = [sys.executable, "-m", "miner.cli", *line, "--ray", cluster.address]
    with events(desk, stop):
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = driver.communicate()[1]
    if number == signal.SIGTERM:
        assert driver.returncode == 143 and "SIGTERM: stopped; finished shards are safe" in said
    deadline = time.monotonic() + 60
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(list(out.glob("*-0*.json"))) == 2 and not (out / "manifest.json").exists()
    result = mine_on(cluster, *line)
    assert result.exit_code == 0, result.output
    assert "resuming: 2 of 5 shards are done" in result.stdout and mined(out) == reference


@pytest.mark.long
def test_a_shard_that_always_fails_is_reported_and_stops_no_other(
    cluster: Any, photos: Path, words: list[str], desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    data, out = Path(shutil.copytree(photos, tmp_path / "photos")), tmp_path / "set"
    Image.new("RGB", (80, 60)).save(data / "train" / "bee" / "dark.png")
    Image.new("RGB", (80, 60), "white").save(data / "val" / "bee" / "white.png")
    line = [*words, "--data", str(data), "--attempts", "2", "--out"]
    result = mine_on(cluster, *line, str(out))
    assert result.exit_code == 1
    assert re.fullmatch(
        r"Error: .*set: 2 of 6 shards failed --attempts 2 times \(train-[0-9]{6}: ValueError: too dark; val-[0-9]{6}: the"
        r" worker died at it; was there too little memory\?\); all others are done\. Mend the cause and run the same command"
        r" again",
        result.stderr.splitlines()[-1],
    )
    assert {p.stem for p in out.glob("*-0*.json")} == {p.stem for p in (out / "index").glob("*")} != set()
    assert len(list(out.glob("*-0*.json"))) == 4
    (data / "train" / "bee" / "dark.png").write_bytes(b"no picture")
    (data / "val" / "bee" / "white.png").unlink()
    result = mine_on(cluster, *line, str(tmp_path / "strict"), "--max-failures", "0")
    assert result.exit_code == 1 and "1 images failed, --max-failures allows 0 of this run (" in result.stderr
    assert "dark.png" in result.stderr


@pytest.mark.long
def test_where_no_worker_can_be_set_up_it_is_said(cluster: Any, job: Job, tmp_path: Path) -> None:
    pool, elsewhere = (
        RayPool(Fleet(ray=cluster.address), Machine(), blind=True),
        open_store(str(tmp_path / "elsewhere")),
    )
    with (
        contextlib.closing(pool),
        pytest.raises(TicketSetError, match="`ray`: no worker can be set up: .*elsewhere is not"),
    ):
        pool.mine(dataclasses.replace(job, store=elsewhere), job.plan.shards(), ProgressBar(27, 0))
