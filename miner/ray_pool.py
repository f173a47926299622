"""datalth-mine --ray: the driver of a pool of workers on a Ray cluster.

driver:  shards to mine -> one a worker -> what its JSON says is counted     waits for any of them
worker:  an actor, its models loaded once; mines a shard a call              dies for good, another takes its place

The JSON of a shard in the set's folder is what counts. Nothing lives in Ray: whatever is killed, the driver too, the
same command goes on. What Ray promises of a call whose worker died is "at most once, or not known", so the driver looks.
"""

import collections
import contextlib
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import torch

from miner import models
from miner.done import committed
from miner.job import Job, Progress, TooManyFailures, mine_shards
from miner.progress import ProgressBar
from miner.reading import Shard
from miner.settings import Fleet, Machine
from shards import format as fmt
from shards.errors import ImageError, TicketSetError, first_line
from shards.schema import ShardStats
from shards.writer import read_plan

ROUND_SECONDS = 5  # between looks at the cluster, for nodes that came
PATIENCE_SECONDS = 60  # until it is said that no worker is ready
MOST_THREADS = 16
LOOKED_AT = 8  # images that a new worker tries to read, until one can be

Node = dict[str, Any]  # what Ray says of one


class Worker:
    """The actor."""

    def ready(self, job: Job, folder: str) -> str:
        """Get ready for a job; gives the id of Ray for the node.

        Args:
            folder: that the driver works in: relative paths and a method of the user's own are from there.
        Raises:
            TicketSetError: this node lacks what the job needs.
        """
        logging.getLogger("timm").setLevel(logging.ERROR)
        if os.path.isdir(folder):
            os.chdir(folder)
        self._job = job
        try:
            if read_plan(job.store) is None:
                raise TicketSetError(f"{job.store} is not the driver's; expected a folder that all nodes share")
            _check_readable(job)
            self._producers = job.producers()
        except TicketSetError as error:
            raise TicketSetError(f"{error} (on node {socket.gethostname()})") from None
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def mine(self, split: str, number: int, max_failures: float) -> tuple[ShardStats, list[str]]:
        """Mine a shard; gives what its JSON says, and why its first images failed.

        Raises:
            TicketSetError: see `mine_shards`.
        """
        progress = Progress(max_failures)
        with models.compiling():
            (stats,) = mine_shards(self._job, [(split, number)], self._producers, progress)
        return stats, progress.reasons


def _check_readable(job: Job) -> None:
    """A node that lacks the data would mine nothing but failures, faster than any other."""
    table, reason = next(iter(job.source.splits.values())), ""
    for row in table.slice(0, LOOKED_AT).to_pylist():
        try:
            job.source.read(row)
            return
        except (ImageError, OSError) as error:
            reason = reason or f"{row['source']}: {first_line(error)}"
    if reason:
        raise TicketSetError(f"`data` {job.source.spec}: cannot be read ({reason}); expected one that all nodes see")


@dataclass(frozen=True)
class Need:
    """What a worker takes of a node.

    Attributes:
        gpus: 1 or 0.
        cpus: as many threads read, and as many encode.
    """

    gpus: int
    cpus: int

    @classmethod
    def of(cls, nodes: Sequence[Node], machine: Machine, blind: bool) -> "Need":
        """A GPU where a model is to run and there are any; the smallest node's CPUs, or a GPU's share of them.

        Args:
            nodes: of the cluster.
            blind: no model is to run.
        """
        kinds = [node["Resources"] for node in nodes]
        asked = machine.device == "cuda" or (machine.device is None and any(kind.get("GPU") for kind in kinds))
        gpus = int(asked and not blind)
        shares = [
            kind.get("CPU", 0) // (kind["GPU"] if gpus else 1) for kind in kinds if kind.get("GPU" if gpus else "CPU")
        ]
        cpus = machine.workers or min(MOST_THREADS, int(min(shares, default=1)))
        return cls(gpus, cpus)

    def room(self, nodes: Sequence[Node]) -> int:
        """Workers that the nodes hold, if nobody else is there."""
        asked = {name: count for name, count in (("GPU", self.gpus), ("CPU", self.cpus)) if count}
        return sum(int(min(n["Resources"].get(name, 0) // count for name, count in asked.items())) for n in nodes)

    def __str__(self) -> str:
        return f"{'1 GPU and ' if self.gpus else ''}{self.cpus} CPU{'s' if self.cpus != 1 else ''}"


@dataclass
class _Hired:
    """A worker as the driver knows it; without a shard it waits for a place on the cluster, or gets ready."""

    actor: Any
    node: str | None = None
    shard: Shard | None = None


class RayPool:
    """Workers on a Ray cluster, for one job. Connects when it is made; `close` gives everything back.

    Args:
        blind: no model is to run.

    Attributes:
        need: of a worker.
        device: that workers compute on.

    Raises:
        TicketSetError: Ray is not installed, there is no such cluster, or such a device cannot be asked for.
    """

    def __init__(self, fleet: Fleet, machine: Machine, blind: bool) -> None:
        assert fleet.ray is not None
        if machine.device not in (None, "cuda", "cpu"):
            raise TicketSetError(f"`device` {machine.device}: Ray gives each worker its GPU; expected cuda or cpu")
        self._ray, self._own = _connect(fleet.ray)
        self.need = Need.of(self._nodes(), machine, blind)
        self.device = torch.device("cuda" if self.need.gpus else "cpu")
        self._attempts = fleet.attempts
        self._calls: dict[Any, _Hired] = {}  # one under way for each worker, by what Ray will answer
        self._failures: collections.Counter[Shard] = collections.Counter()
        self._poison: dict[Shard, str] = {}
        self._broken, self._reason = 0, ""  # workers that could not be set up, since one last could

    def close(self) -> None:
        """Stop all workers, and the cluster if it was started for them."""
        with _silent():
            for hired in self._calls.values():
                self._ray.kill(hired.actor)
            self._calls.clear()
            if self._own:
                self._ray.shutdown()

    def mine(self, job: Job, todo: Sequence[Shard], progress: ProgressBar) -> None:
        """Mine shards, each once, and again where that failed.

        Raises:
            TicketSetError: no worker can be set up; or, when all others are done, some shards failed `attempts` times.
            TooManyFailures: too many images failed.
        """
        self._progress, self._queue = progress, collections.deque(todo)
        device = job.machine.device if self.need.gpus else "cpu"
        self._job = replace(job, machine=replace(job.machine, workers=max(1, self.need.cpus), device=device))
        began, told = time.monotonic(), False
        try:
            with _silent():
                self._sent = self._ray.put(self._job)  # once; a listing may be of millions
                while self._queue or self._busy():
                    self._hire()
                    for call in self._ray.wait(list(self._calls), timeout=ROUND_SECONDS)[0]:
                        self._answered(call)
                    progress.workers = self._busy()
                    progress.changed()
                    if (
                        not (told or progress.images or progress.workers)
                        and time.monotonic() - began > PATIENCE_SECONDS
                    ):
                        told = True
                        click.echo(f"no worker is ready yet; a node must have {self.need} free", err=True)
        except self._ray.exceptions.RayError as error:
            raise TicketSetError(
                f"`ray`: {first_line(error)}; finished shards are safe, and the same command goes on from there"
            ) from None
        finally:
            self.close()
        if self._poison:
            first = [f"{fmt.shard_name(*shard)}: {why}" for shard, why in sorted(self._poison.items())[:3]]
            raise TicketSetError(
                f"{job.store}: {len(self._poison)} of {len(todo)} shards failed `attempts` {self._attempts} times"
                f" ({'; '.join(first)}); all others are done. Mend the cause and run the same command again"
            )

    def _busy(self) -> int:
        return sum(hired.shard is not None for hired in self._calls.values())

    def _nodes(self) -> list[Node]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _hire(self) -> None:
        """Have twice the workers that there is room for: those without a place are what makes an autoscaler add nodes."""
        busy, left = self._busy(), len(self._queue)
        waiting = [call for call, hired in self._calls.items() if hired.shard is None]
        for call in waiting[left:]:
            self._ray.kill(self._calls.pop(call).actor)
        room = max(1, min(self.need.room(self._nodes()), busy + left))
        # Where a node cannot set workers up, each takes its room and fails at once: so many fewer are hired.
        for _ in range(min(left, 2 * room - self._broken - busy) - len(waiting)):
            # Without restarts Ray says that a worker died; a restarting one is "unavailable" until its node is back.
            actor = self._ray.remote(Worker).options(
                num_cpus=self.need.cpus,
                num_gpus=self.need.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            ).remote()  # fmt: skip
            self._calls[actor.ready.remote(self._sent, os.getcwd())] = _Hired(actor)
        if not self._calls:
            raise TicketSetError(f"`ray`: no worker can be set up: {self._reason}")

    def _answered(self, call: Any) -> None:
        """Take in what a worker answers, and give it the next shard."""
        hired = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._ray.kill(hired.actor)  # after any error: CUDA may be unusable, and one cut off may still be at work
            self._failed(hired, error)
            return
        if hired.shard is None:
            hired.node, self._broken = answer, 0
        else:
            self._count(hired.shard, *answer)
        if not self._queue:
            self._ray.kill(hired.actor)
            return
        hired.shard = self._queue.popleft()
        most = self._progress.max_failures - self._progress.failures
        self._calls[hired.actor.mine.remote(*hired.shard, most)] = hired

    def _failed(self, hired: _Hired, error: Any) -> None:
        """A worker is gone: is its shard done all the same, to be mined again, or given up?"""
        if isinstance(cause := getattr(error, "cause", None), TooManyFailures):
            raise cause from None
        shard, blamed = hired.shard, self._blamed(hired, error)
        if shard is None:
            self._broken += blamed
            self._reason = _reason(error)
            return
        if done := committed(self._job.store, self._job.plan, [shard]):
            self._count(shard, done[shard])
            return
        self._failures[shard] += blamed
        if self._failures[shard] < self._attempts:
            self._queue.append(shard)
        else:
            self._poison[shard] = _reason(error)

    def _blamed(self, hired: _Hired, error: Any) -> bool:
        """Whether it is held against the shard: not where the node went, too, or cannot be reached."""
        exceptions = self._ray.exceptions
        if isinstance(error, exceptions.RayTaskError):
            return True
        if isinstance(error, exceptions.ActorUnavailableError) or getattr(error, "preempted", False):
            return False
        return hired.node is None or any(node["NodeID"] == hired.node for node in self._nodes())

    def _count(self, shard: Shard, stats: ShardStats, reasons: Sequence[str] = ()) -> None:
        views = self._job.plan.splits[shard[0]].views if self._job.plan.common.k else 0
        self._progress.add(stats, views, reasons)


def _reason(error: Any) -> str:
    """Why a worker failed, in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TicketSetError):
        return str(cause)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {first_line(cause)}"
    if getattr(error, "actor_init_failed", False):  # such as a node where datalth is not installed
        return str(error).strip().splitlines()[-1]
    return "the worker died at it; was there too little memory?"


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, connected; and whether it is for us to let go of it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # of 40 s each, where nobody answers; Ray tries 20 times
    try:
        import ray
    except ImportError:
        raise TicketSetError("`ray`: Ray is not installed; pip install 'datalth[ray]'") from None
    if ray.is_initialized():
        return ray, False
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # No address: the cluster of RAY_ADDRESS or of this machine, else a new one.
            ray.init(None if address == "auto" else address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # ConnectionError, ValueError, RuntimeError, ImportError, those of grpc
        raise TicketSetError(f"`ray` {address}: cannot connect: {first_line(error)}") from None
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray has set its own
    return ray, True


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Ray prints a paragraph for every worker that dies, from a thread of its own, on standard output."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
