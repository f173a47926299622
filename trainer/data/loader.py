"""Batches made by worker processes, in order.

Not torch's DataLoader: it puts batches into /dev/shm and waits for ever where that is full, its workers share a queue whose
lock dies with its holder, and at the end it waits for workers that leave SIGTERM to the run. Measured beside it on batches of
19 MB: no slower.

Each worker has a socket of its own to the run, and no lock or queue is shared: one that is killed closes its socket, which is
seen at once, and takes nothing with it. A batch travels as memory without a name, so that the size of /dev/shm, 64 MB in a
container, is no matter.
"""

import errno
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.util import Finalize, register_after_fork
from typing import Any

import numpy as np
import torch

from shards.console import quiet_images
from shards.errors import ImageError, TicketSetError

Batch = dict[str, torch.Tensor]
AHEAD = 2  # batches that each worker is asked for before the first of them is used
MESSAGE = 1 << 16  # bytes of the longest: a place, the shapes of a batch, or an error
# They go to the whole process group, but the step under way needs its batches.
LEFT_TO_THE_RUN = (signal.SIGTERM, signal.SIGINT)
GRACE = 1.0  # seconds to end by oneself


class WorkerDied(TicketSetError):
    """A worker process ended before the run did."""


def batches(dataset: Any, places: Iterable[Any], workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """`dataset[place]` of every place, in order; close the generator to end the processes.

    Args:
        device: where they go; for a copy that nothing waits for they are put into page-locked memory.
    Raises:
        WorkerDied: one was killed, or crashed.
        TicketSetError, ImageError, OSError: the dataset's.
    """
    left = iter(places)
    waiting: deque[Future[Batch]] = deque()
    crew: list[_Worker] = []
    pin = device.type == "cuda"
    prepare: Any = (torch.cuda.set_device, (device,)) if pin else (None, ())  # a thread has its own
    receiver = ThreadPoolExecutor(1, "batches", *prepare)  # beside the step that is under way
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_THE_RUN)  # until a worker ignores them
        try:
            for _ in range(workers):
                crew.append(_Worker(dataset))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        turns = itertools.cycle(crew)

        def ask(count: int) -> None:
            for place in itertools.islice(left, count):
                worker = next(turns)
                worker.ask(place)
                waiting.append(receiver.submit(worker.receive, pin))

        ask(AHEAD * workers)
        while waiting:
            batch = waiting.popleft().result()
            ask(1)
            yield batch
    finally:
        for worker in crew:
            worker.hang_up()
        deadline = time.monotonic() + GRACE
        for worker in crew:
            worker.end(deadline)
        receiver.shutdown(cancel_futures=True)


def pinned(batch: Batch) -> Batch:
    """In page-locked memory."""
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


class _Worker:
    """One process, as the run sees it."""

    def __init__(self, dataset: Any) -> None:
        # Packets, so that a message comes whole or not at all.
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        register_after_fork(self._socket, socket.socket.close)  # or no worker would see the run's end
        with theirs:
            self._process = multiprocessing.Process(target=_work, args=(dataset, theirs), daemon=True)
            self._process.start()
        # Python waits for its processes at exit, and these ignore SIGTERM.
        self._kill = Finalize(self, self._process.kill, exitpriority=10)

    def ask(self, place: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it died; `receive` says so
            self._socket.sendall(pickle.dumps(place))

    def receive(self, pin: bool) -> Batch:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE, 1)
        except ConnectionResetError:
            message, descriptors = b"", []
        if not message:
            raise WorkerDied(f"worker process {self._process.pid} {self._fate()}")
        answer = pickle.loads(message)
        if isinstance(answer, Exception):
            raise answer
        if not descriptors:  # the kernel drops what has no room in this process's table
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        batch = _opened(answer, descriptors[0])
        return pinned(batch) if pin else batch

    def _fate(self) -> str:
        self._process.join(GRACE)
        code = self._process.exitcode
        if code is None or code >= 0:
            return "ended early" if code is None else f"ended with code {code}"
        name = signal.Signals(-code).name
        hint = "; out of memory? Try fewer `workers`, or a smaller `batch_size`" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"

    def hang_up(self) -> None:
        """An idle worker ends by itself."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self, deadline: float) -> None:
        self._process.join(max(0.0, deadline - time.monotonic()))
        self._kill()
        self._process.join(GRACE)
        self._socket.close()


def _work(dataset: Any, run: socket.socket) -> None:
    """What a worker does until the run hangs up, or is no more."""
    for number in LEFT_TO_THE_RUN:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    quiet_images()
    with suppress(BrokenPipeError, ConnectionResetError):
        while message := run.recv(MESSAGE):
            try:
                _hand_over(dataset[pickle.loads(message)], run)
            except (BrokenPipeError, ConnectionResetError):
                return
            except (TicketSetError, ImageError, OSError) as error:
                run.sendall(pickle.dumps(error))
            except MemoryError:
                run.sendall(pickle.dumps(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
            except Exception:
                run.sendall(
                    pickle.dumps(RuntimeError("in a worker process:\n" + traceback.format_exc()[-MESSAGE // 2 :]))
                )


def _hand_over(batch: Batch, run: socket.socket) -> None:
    """Send a batch: its layout as a message, the bytes as an open file without a name."""
    layout, end = [], 0
    with open(os.memfd_create("batch"), "wb") as file:
        for name, tensor in batch.items():
            array = np.ascontiguousarray(tensor.numpy())
            layout.append((name, array.dtype.str, array.shape, end))
            file.seek(end)
            file.write(array.reshape(-1).view(np.uint8).data)
            end += -(-array.nbytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        file.truncate(max(end, 1))  # nothing cannot be mapped
        socket.send_fds(run, [pickle.dumps(layout)], [file.fileno()])


def _opened(layout: list[tuple[str, str, tuple[int, ...], int]], descriptor: int) -> Batch:
    """The tensors of a batch that was handed over; they share its memory."""
    try:
        memory = mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
    return {name: torch.from_numpy(np.ndarray(shape, dtype, memory, start)) for name, dtype, shape, start in layout}
