"""datalth-mine --elastic: workers that come and go take shards, as long as there are any.

A worker is any process that runs the command: in a shell, under torchrun, in a Slurm array or a Kubernetes job. None
knows of the others but by the claims in the folder, and whoever sees that all shards are done finalizes the set.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence

import click
import torch

from miner.claims import Claims, State, Stolen
from miner.done import count_images, finish
from miner.folder import remove_claims
from miner.job import Job, mine_shards
from miner.producers import Producer
from miner.progress import ProgressBar, show_plan, show_summary
from miner.reading import Shard
from miner.settings import Fleet
from shards import format as fmt
from shards.console import printable
from shards.errors import TicketSetError, first_line, is_machine_error
from shards.ranks import rank_and_world
from shards.schema import Plan
from shards.store import Conflict

SICK = 3  # shards that fail in a row: it is this worker, not the shards
MANIFEST = fmt.MANIFEST.removesuffix(".json")


class Worker:
    """One of the processes that mine a set together.

    Args:
        job: what they mine; shared.
        mined: the splits of it that this command is about.
        fleet: how long claims hold, and how often a shard may fail.
    Raises:
        TicketSetError: the store does not keep conditional writes.
    """

    def __init__(self, job: Job, mined: Plan, fleet: Fleet) -> None:
        self._job, self._fleet, self._max_failures = job, fleet, job.output.max_failures
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._shards = {fmt.shard_name(*shard): shard for shard in mined.shards()}
        self._sizes = {name: count_images(job.plan, job.source, [shard]) for name, shard in self._shards.items()}
        self._claims = Claims(job.store, self._name, self._shards, fleet.claim_seconds, fleet.attempts)
        self._own: set[str] = set()  # shards that were committed here

    def work(self, producers: Sequence[Producer], shown: bool) -> ProgressBar:
        """Mine shards until all are done or given up, here or elsewhere.

        Returns:
            What was counted here.
        Raises:
            TicketSetError: shards were given up by all; or everything fails here.
            OSError: it is this machine: its disk is full.
        """
        state = self._claims.look()
        self._before = self._images(state.done)
        if shown and state.done:
            click.echo(f"resuming: {len(state.done)} of {len(self._shards)} shards are done")
        total = sum(self._sizes.values())
        progress = _Progress(self._claims, total - self._before, self._max_failures * total, shown)
        sick = 0
        with contextlib.closing(progress):
            while state.free or state.working:
                if not state.free:
                    time.sleep(state.pause)
                own, error = len(self._own), self._mine_free(producers, progress)
                sick = 0 if error is None or len(self._own) > own else sick + 1
                if sick == SICK and error is not None:
                    raise error
                state = self._claims.look()
        if state.poisoned:
            raise self._given_up(state)
        return progress

    def _images(self, names: set[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _mine_free(self, producers: Sequence[Producer], progress: ProgressBar) -> Exception | None:
        """Mine what is free until nothing is; gives the error of a shard that failed."""

        def claimed() -> Iterator[Shard]:
            while (name := self._claims.take()) is not None:
                state = self._claims.state
                progress.others(self._images(state.done - self._own) - self._before, len(state.working) + 1)
                yield self._shards[name]

        def committed(shard: Shard) -> None:
            name = fmt.shard_name(*shard)
            self._claims.forget(name)
            self._own.add(name)

        try:
            mine_shards(self._job, claimed(), producers, progress, committed)
        except (Stolen, Conflict):  # this worker was taken for dead, and another is at its shard
            return None
        except Exception as error:
            if is_machine_error(error) or isinstance(error, torch.OutOfMemoryError):
                raise
            self._blame(progress.shard, error)
            return error
        finally:
            self._claims.drop()
        return None

    def _blame(self, shard: Shard | None, error: Exception) -> None:
        name = "" if shard is None else fmt.shard_name(*shard)
        if name not in self._claims.held:
            raise error  # of no shard of ours: the store's
        click.echo(printable(f"{name}: this attempt failed: {first_line(error)}"), err=True)
        self._claims.fail(name, first_line(error))

    def _given_up(self, state: State) -> TicketSetError:
        first = [f"{name}: {self._claims.reason(name, last)}" for name, last in sorted(state.poisoned.items())[:3]]
        return TicketSetError(
            f"{self._job.store}: {len(state.poisoned)} of {len(self._shards)} shards failed `attempts`"
            f" {self._fleet.attempts} times ({'; '.join(first)}); all others are done. Mend the cause and raise `attempts`"
        )

    def finalize(self) -> bool:
        """Have the manifest written by one worker, and wait for it.

        Returns:
            Whether the set is complete: a split that another command mines may not be.
        Raises:
            TicketSetError: too many images failed, of all together.
        """
        store, plan = self._job.store, self._job.plan
        claims = Claims(store, self._name, [MANIFEST], self._fleet.claim_seconds, self._fleet.attempts)
        while not (state := claims.look()).done:
            if claims.take() is None:
                time.sleep(state.pause)
                continue
            try:
                if not finish(store, plan, self._job.source, self._max_failures):
                    return False
                claims.forget(MANIFEST)
                remove_claims(store)
            finally:
                claims.drop()
        return True


class _Progress(ProgressBar):
    """Renews claims as the work goes on: a worker that hangs is one that is lost."""

    def __init__(self, claims: Claims, total: int, max_failures: float, shown: bool) -> None:
        super().__init__(total, max_failures, shown)
        self._claims = claims

    def changed(self) -> None:
        super().changed()
        self._claims.renew()


def mine_elastic(job: Job, mined: Plan, producers: Sequence[Producer], fleet: Fleet, device: torch.device) -> None:
    """Mine as one of several workers, of which none need be told of the others.

    Raises:
        TicketSetError: see `Worker`.
    """
    shown = rank_and_world()[0] == 0
    if shown:
        show_plan(job.plan, job.source, job.store, str(device), list(mined.splits))
    worker = Worker(job, mined, fleet)
    started = time.monotonic()
    progress = worker.work(producers, shown)
    seconds = time.monotonic() - started
    if worker.finalize():
        show_summary(job.store, seconds, progress, "mined here")
    else:
        click.echo("not complete yet: another split is not mined; run the command that mines it again")
