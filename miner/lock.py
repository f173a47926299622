"""Who is at work in a folder of this machine: several miners of one plan may be, of two plans never."""

import contextlib
import os
from types import TracebackType

from shards.storage import is_remote
from shards.store import Store

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class FolderLock:
    """A hold on a folder while this process mines into it: first its own, then `share`d with miners of the same plan.

    The lock is on the folder itself, so it leaves no file that a reader would find strange, and it ends with its
    process, however that ends. Where there are no such locks (object stores, Windows, some network file systems)
    everyone takes himself to be alone; then the plan's id, looked at before every commit
    (`miner.plan.check_unchanged`), and in every shard's JSON, keeps two plans apart, after the work rather than before.

    Attributes:
        alone: nobody else is at work here, as far as locks can tell: the plan may be replaced.
        locked: the lock is real, not only supposed.
    """

    def __init__(self, store: Store) -> None:
        self._descriptor: int | None = None
        self.alone, self.locked = True, False
        if fcntl is None or is_remote(store.url):
            return
        os.makedirs(store.url, exist_ok=True)
        self._descriptor = os.open(store.url, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locked = True
        except BlockingIOError:
            self.alone = False
            self.share()  # waits while somebody settles the plan
        except OSError:  # no such locks here
            pass

    def share(self) -> None:
        """Let others in. The lock is free for a moment, so the plan is to be looked at again."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
                self.locked, self.alone = True, False

    def __enter__(self) -> "FolderLock":  # noqa: PYI034 - typing.Self is newer than Python 3.10
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
