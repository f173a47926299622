"""Worker processes: they die, memory and descriptors run short, signals come; never a hang."""

import os
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch

from conftest import long
from shards.errors import ImageError, TicketSetError
from trainer.data.dataset import loader
from training import arguments

pytestmark = pytest.mark.slow  # starts and kills processes

CPU = torch.device("cpu")


class Numbers:
    """Batches of a megabyte; what is odd is done by place."""

    def __init__(self, faults=None):
        self.faults = faults or {}

    def __getitem__(self, place):
        fault = self.faults.get(place)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            os.kill(os.getpid(), fault)
            time.sleep(30)
        values = np.full((1, 1 << 20), place, np.uint8)
        return {"values": torch.from_numpy(values), "place": torch.tensor([place]), "none": torch.zeros(0, 3)}


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_batches_come_in_order_and_whole_and_leave_no_process():
    before = children()
    batches = list(loader(Numbers(), range(20), 3, CPU))
    assert [int(batch["place"]) for batch in batches] == list(range(20))
    assert all((batch["values"] == i).all() and batch["none"].shape == (0, 3) for i, batch in enumerate(batches))
    assert children() == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 0)])
def test_each_tensor_for_a_gpu_is_pinned_once_and_handed_on(device, workers, monkeypatch):
    """Of training and validation alike: both are fed by `loader`."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.clone()) or pinned[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    batches = list(loader(Numbers(), range(5), workers, device))
    given = [tensor for batch in batches for tensor in batch.values()]
    if device == CPU:
        assert not pinned
    else:
        assert len(pinned) == len(given) == 15 and all(a is b for a, b in zip(pinned, given, strict=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_worker_that_is_killed_is_an_error_with_its_signal(number):
    before = children()
    batches = loader(Numbers({5: number}), range(20), 2, CPU)
    start = time.monotonic()
    with pytest.raises(TicketSetError, match=f"worker process [0-9]+ was killed by {signal.Signals(number).name}"):
        for i, batch in enumerate(batches):
            assert int(batch["place"]) == i < 5
    assert time.monotonic() - start < 20  # it sleeps for 30 s
    assert children() == before


def test_workers_outlive_signals_to_the_whole_group_and_end_with_the_run():
    before = children()
    batches = loader(Numbers(), range(100), 2, CPU)
    next(batches)
    pids = set(children()) - set(before)
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert [int(next(batches)["place"]) for _ in range(10)] == list(range(1, 11))
    batches.close()
    assert not any(map(alive, pids))


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (TicketSetError("not what the index says"), TicketSetError, "not what the index says"),
        (ImageError("bee_0: no image"), ImageError, "bee_0: no image"),
        (OSError(5, "Input/output error", "train.tar"), OSError, "Input/output error: 'train.tar'"),
        (MemoryError(), OSError, "Cannot allocate memory"),
        (KeyError("a bug"), RuntimeError, "KeyError: 'a bug'"),
    ],
)
def test_errors_of_the_feed_come_over(fault, kind, said):
    with pytest.raises(kind, match=said):
        list(loader(Numbers({3: fault}), range(20), 2, CPU))


def run_alone(code, *before, timeout=60):
    """Python code with Numbers and loader at hand, in a process of its own."""
    start = f"import sys; sys.path[:0] = {sys.path!r}\nfrom test_loader import *\n"
    command = [*before, sys.executable, "-c", start + code]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)


@pytest.mark.long
def test_a_small_dev_shm_is_no_matter():
    """As in a container: torch's own workers would wait for ever."""
    inside = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no name spaces of one's own here")
    result = run_alone("print(sum(int(b['place']) for b in loader(Numbers(), range(20), 2, CPU)))", *inside)
    assert result.stdout == "190\n", result.stderr


@pytest.mark.long
def test_an_exit_in_the_middle_waits_for_no_worker():
    result = run_alone("batches = loader(Numbers(), range(100), 2, CPU); next(batches); print(children()); sys.exit(3)")
    assert result.returncode == 3 and not result.stderr
    assert not any(alive(int(pid)) for pid in result.stdout.strip("[]\n").split(","))


def test_workers_end_where_the_run_is_killed():
    result = run_alone(
        "b = loader(Numbers(), range(100), 2, CPU); next(b); print(children(), flush=True); os.kill(os.getpid(), 9)"
    )
    pids = [int(pid) for pid in result.stdout.strip("[]\n").split(",")]
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


@pytest.mark.parametrize(("soft", "hard", "code"), [long(24, 4096, 0), (24, 24, 1)])
def test_few_open_files_are_raised_to_what_is_allowed_or_a_line(tickets, tmp_path, soft, hard, code):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("no more are allowed here")
    flags = arguments(tickets, tmp_path, "run", "-j", "8", "--epochs", "1")
    result = subprocess.run(
        [sys.executable, "-m", "trainer.cli", *flags],
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    if code:
        assert "Error: Too many open files" in result.stderr.splitlines()[-1]


def test_a_second_ctrl_c_ends_at_once_and_one_that_was_handed_on_does_not():
    code = """
from shards import signals
signals.AGAIN = 0.5
heard = signals.Signals()
with heard.heard():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print(heard.number, flush=True)
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGTERM)
    print(heard.number, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    result = run_alone(code)
    assert (result.returncode, result.stdout) == (-signal.SIGINT, "2\n2\n")


def test_what_pillow_says_of_exif_stays_off_the_screen():
    from shards.console import quiet_images

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_images()
        warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
        warnings.warn_explicit("of ours", UserWarning, "feed.py", 1, "trainer.data.dataset")
    assert [str(each.message) for each in said] == ["of ours"]
