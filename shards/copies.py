"""Local copies of remote tars: each is fetched whole, once, and checked on its way."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from filelock import FileLock

from shards import schema, storage
from shards.errors import TicketSetError
from shards.schema import FileDigest

CACHED_TARS = 40  # more than two windows of an epoch's order


class TarCopies:
    """Opens tars, remote ones as copies in a folder.

    Args:
        folder: for the copies; by default one for each user, in the folder of temporary files.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or os.path.join(tempfile.gettempdir(), f"datalth-{os.getuid()}")
        self._tars: dict[tuple[str, str], FileDigest] = {}

    def open(self, url: str, set_id: str) -> storage.Ranges:
        """The tar of one shard of the set that is `set_id`.

        Raises:
            FileNotFoundError: there is no such tar.
            TicketSetError: it is not what its JSON says, or its store fails.
        """
        if not storage.is_remote(url):
            return storage.open_ranges(url)
        if (url, set_id) not in self._tars:
            self._tars[url, set_id] = tar_of(url)
        # A folder for each set, so that sets do not drive out each other's tars.
        folder = f"datalth-{hashlib.sha256(set_id.encode()).hexdigest()[:16]}"
        tar = self._tars[url, set_id]
        return storage.open_ranges(fetch(url, own_folder(Path(self._folder)) / folder, tar.bytes, tar.sha256))


def tar_of(url: str) -> FileDigest:
    """Bytes and sha256 of a shard's tar, as the JSON beside it says.

    Raises:
        TicketSetError: the JSON is missing, or damaged.
    """
    where = f"{url.removesuffix('.tar')}.json"
    try:
        return schema.parse_shard(storage.read_bytes(where, schema.MAX_JSON_BYTES), where).tar
    except FileNotFoundError:
        raise TicketSetError(f"{where}: missing; expected the JSON of a shard") from None


def own_folder(folder: Path) -> Path:
    """A folder in which nobody else can put a file; made where it is missing.

    Raises:
        TicketSetError: it is a link, or others can write in it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise TicketSetError(
            f"{folder}: expected a folder of yours that nobody else can write, for copies of tars; remove it, or name"
            " another place in TMPDIR"
        )
    return folder


def fetch(url: str, cache: Path, size: int, sha256: str) -> str:
    """A local copy of a remote tar, which is that of its hash; processes share it, and those not opened for longest go.

    A copy is named by its hash and appears only after it was checked: what is there needs no trust in where it came from.

    Args:
        url: of the tar.
        cache: the folder for copies; see `own_folder`.
        size: bytes that the tar has.
        sha256: that it has, 64 hex digits.
    Raises:
        FileNotFoundError: there is no such tar.
        TicketSetError: it is another one, its store fails, or others can write in the folder.
    """
    path = own_folder(cache) / f"{sha256}.tar"
    with FileLock(f"{path}.lock"):  # one process fetches it, the others wait
        if path.is_file() and path.stat().st_size == size:
            os.utime(path)
            return str(path)
        for left in cache.glob(f"{path.name}.*.tmp"):  # by a process that was killed: it had the lock
            left.unlink()
        _copy(url, path, size, sha256)
    for old in sorted(cache.glob(f"{'[0-9a-f]' * 64}.tar"), key=_opened)[:-CACHED_TARS]:
        old.unlink(missing_ok=True)  # a process that reads it keeps its open file
    return str(path)


def _copy(url: str, path: Path, size: int, sha256: str) -> None:
    found, count = hashlib.sha256(), 0
    try:
        with storage.atomic_file(path) as file:
            for part in storage.blocks(url, size):
                file.write(part)
                found.update(part)
                count += len(part)
            if (count, found.hexdigest()) != (size, sha256):
                raise TicketSetError(
                    f"{url}: expected {size} bytes of sha256 {sha256[:12]}, as its JSON says, got {count} of"
                    f" {found.hexdigest()[:12]}"
                )
    except FileNotFoundError:
        raise
    except OSError as error:  # a full disk says no name
        error.filename = error.filename or str(path)
        raise


def _opened(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has removed it
        return 0.0
