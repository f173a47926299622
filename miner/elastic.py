"""datalth-mine --elastic: workers that come and go take shards, as long as there are any.

A worker is any process that runs the command: in a shell, under torchrun, in a Slurm array or a Kubernetes job. None
knows of the others but by the claims in the folder, and whoever sees that all shards are done finalizes the set.
"""

import contextlib
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator, Sequence

import click
import torch

from miner.claims import Claims, State, Stolen, Unreachable
from miner.done import finish, shard_sizes
from miner.folder import remove_claims, remove_temporary
from miner.job import Job, TooManyFailures, mine_shards
from miner.plan import PlanChanged
from miner.producers import Producer
from miner.producers.producer import Image
from miner.progress import ProgressBar, show_plan, show_summary
from miner.reading import Shard
from miner.settings import Fleet
from shards import format as fmt
from shards.console import printable
from shards.errors import StoreFailed, TicketSetError, first_line, is_machine_error
from shards.ranks import rank_and_world
from shards.schema import Plan
from shards.store import Conflict

STORE_WAIT = 10.0  # seconds, where a store fails at a shard
SICK = 3  # shards that failed here since one was committed: it is this worker, not the shards
ANY_NUMBER = 10**6  # of attempts to write the manifest: it is no shard that could be left out
MANIFEST = fmt.MANIFEST.removesuffix(".json")


class Worker:
    """One of the processes that mine a set together.

    Args:
        job: what they mine; shared.
        mined: the splits of it that this command is about.
        fleet: how long claims hold, and how often a shard may fail.
    Attributes:
        finalized: the manifest was written here.
    Raises:
        TicketSetError: the store does not keep conditional writes.
    """

    def __init__(self, job: Job, mined: Plan, fleet: Fleet) -> None:
        self._job, self._fleet, self._max_failures = job, fleet, job.output.max_failures
        self.finalized = False
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._shards = {fmt.shard_name(*shard): shard for shard in mined.shards()}
        sizes = shard_sizes(job.plan, job.source)
        self._sizes = {name: sizes[shard] for name, shard in self._shards.items()}
        self._claims = Claims(job.store, self._name, self._shards, fleet.claim_seconds, fleet.attempts)
        self._own: set[str] = set()  # shards that were committed here
        self._failed: set[str] = set()  # that failed here since one was
        self._refused = 0  # how often the store failed here since then

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
        with contextlib.closing(progress):
            while state.free or state.working:
                if not self._mine_free(producers, progress):
                    self._claims.look()
                state = self._claims.state
                if not state.free and state.working.keys() - self._own:  # what was seen at work may be done here by now
                    time.sleep(self._claims.pause)
        if state.poisoned:
            raise self._given_up(state)
        return progress

    def _images(self, names: set[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _mine_free(self, producers: Sequence[Producer], progress: ProgressBar) -> bool:
        """Mine what is free until nothing is, or a shard fails; says whether nothing is."""

        def claimed() -> Iterator[Shard]:
            while (name := self._claims.take()) is not None:
                state = self._claims.state
                elsewhere = state.working.keys() - set(self._claims.held)
                progress.others(self._images(state.done - self._own) - self._before, len(elsewhere))
                yield self._shards[name]

        def committed(shard: Shard) -> None:
            name = fmt.shard_name(*shard)
            self._claims.forget(name)
            self._own.add(name)
            self._failed.clear()
            self._refused = 0

        try:
            with progress.stoppable():
                mine_shards(self._job, claimed(), producers, progress, committed)
            return True
        except (Stolen, Conflict):  # this worker was taken for dead, and another is at its shard
            pass
        except (Unreachable, PlanChanged, TooManyFailures, torch.OutOfMemoryError):
            raise
        except StoreFailed as error:  # no shard's fault, but of one object it may be for ever
            self._refused += 1
            if self._refused == SICK:
                raise
            self._claims.drop()
            click.echo(printable(f"{error}; trying again"), err=True)
            time.sleep(STORE_WAIT * random.uniform(0.5, 1.5))
        except Exception as error:
            if is_machine_error(error):
                raise
            self._blame(progress.shard, error)
        finally:
            self._claims.drop()
        return False

    def _blame(self, shard: Shard | None, error: Exception) -> None:
        name = "" if shard is None else fmt.shard_name(*shard)
        if name in self._claims.look().done:  # by another, who swept away what this one was writing
            return
        if name not in self._claims.held:
            raise error  # of no shard of ours
        click.echo(printable(f"{name}: this attempt failed: {first_line(error)}"), err=True)
        self._claims.fail(name, first_line(error))
        self._failed.add(name)
        if len(self._failed) == SICK:
            raise error

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
        seconds = max(self._fleet.claim_seconds, len(plan.shards()) / 100)  # all their JSON is read meanwhile
        claims = Claims(store, self._name, [MANIFEST], seconds, ANY_NUMBER)
        while not claims.look().done:
            if claims.take() is None:
                time.sleep(claims.pause)
                continue
            try:
                if not finish(store, plan, self._job.source, self._max_failures):
                    return False
                self.finalized = True
                claims.forget(MANIFEST)
            finally:
                claims.drop()
        # By each worker: one that was taken for dead may put claims after all others have ended. And what a killed one was
        # writing is older than half of what claims hold, for somebody has mined its shard since it was free.
        remove_claims(store)
        remove_temporary(store, before=claims.now() - self._fleet.claim_seconds / 2)
        return True


class _Progress(ProgressBar):
    """Renews claims as the work goes on: a worker that hangs is one that is lost."""

    def __init__(self, claims: Claims, total: int, max_failures: float, shown: bool) -> None:
        super().__init__(total, max_failures, shown)
        self._claims = claims

    def changed(self) -> None:
        super().changed()
        self._claims.renew()

    def done(self, image: Image, viewed: bool) -> None:
        super().done(image, viewed)
        self._claims.renew()  # rankings that are kept come in no batches, after which it would change


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
        advice = worker.finalized  # one of a thousand reads all indices
        show_summary(job.store, seconds, progress, "mined here", advice)
    else:
        click.echo("not complete yet: another split is not mined; run the command that mines it again")
