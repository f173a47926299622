"""Whose a run's folder is: two runs that are started at once never share one."""

import contextlib
import fcntl
import itertools
import os
from multiprocessing.util import register_after_fork
from pathlib import Path

from shards.errors import TicketSetError

TAKEN = "a run is there already; go on with `resume` latest, or name another `experiment`"


class Claim:
    """A run's folder belongs to one run, from when it is found or made to the end; held on rank 0."""

    def __init__(self) -> None:
        self.path: Path | None = None  # once it is held
        self._descriptor: int | None = None
        register_after_fork(self, Claim.close)  # a worker that outlives its run for a moment does not keep the folder

    def close(self) -> None:
        """Let go of the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def hold(self, folder: Path) -> None:
        """Take a folder that is there.

        Raises:
            TicketSetError: a living run has it.
        """
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _holder(descriptor)
            os.close(descriptor)
            raise TicketSetError(
                f"{folder}: a run that is under way{pid} has it; wait for its end, or stop it"
            ) from None
        except OSError:  # file systems that have no locks
            pass
        self.path, self._descriptor = folder, descriptor

    def make(self, folder: Path, named: bool) -> Path:
        """Make a new folder and take it; where its name was not given, the first of NAME, NAME-1, ... that is free.

        Raises:
            TicketSetError: another run has just made it.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        for name in itertools.chain([folder.name], (f"{folder.name}-{i}" for i in itertools.count(1))):
            try:
                folder.with_name(name).mkdir()
            except FileExistsError:
                if named:
                    raise TicketSetError(f"{folder}: {TAKEN}") from None
                continue
            break
        self.hold(folder.with_name(name))
        return folder.with_name(name)


def _holder(descriptor: int) -> str:
    """Which process has the lock, where the system says so."""
    with contextlib.suppress(OSError, IndexError):
        inode = os.fstat(descriptor).st_ino
        for fields in map(str.split, Path("/proc/locks").read_text(encoding="ascii").splitlines()):
            if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}"):
                return f" (process {fields[4]})"
    return ""
