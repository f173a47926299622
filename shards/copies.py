"""Local copies of remote tars: fetched whole, once, and checked on their way; of ranked views only what is asked for.

Processes share them. A copy that is open in any of them bears a lock, and nobody removes it; the others go, those first
that were not opened for longest, where the copies grow beyond their bytes.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import zlib
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from shards import remote_file, schema, storage
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.schema import FileDigest

BLOCK = 1024  # bytes of a tar that a partial copy has or lacks; the least that is fetched
_PAGE = 4096
# Names that nothing else has: `--cache` may be a folder where a user's own sets lie, too, and these are removed.
_OF_SETS = f"datalth-{'[0-9a-f]' * 16}"
_COPY = re.compile(r"[0-9a-f]{64}\.(tar|part)")


class TarCopies:
    """Opens tars, remote ones as copies in a folder.

    Args:
        folder: for the copies; by default one for each user, in the folder of temporary files.
        most: bytes that all copies in it may take on the disk, but for those that are open; by default half of what the
            disk has free beside them.
    """

    def __init__(self, folder: str | None = None, most: int | None = None) -> None:
        self._folder, self._most = folder or os.path.join(tempfile.gettempdir(), f"datalth-{os.getuid()}"), most
        self._tars: dict[tuple[str, str], FileDigest] = {}

    def open(self, url: str, opened: TicketSet) -> storage.Ranges:
        """The tar of one shard of a set.

        Raises:
            FileNotFoundError: there is no such tar.
            TicketSetError: it is not what its JSON says, or its store fails.
        """
        if not storage.is_remote(url):
            return storage.open_ranges(url)
        set_id = opened.manifest.set_id
        if (url, set_id) not in self._tars:
            self._tars[url, set_id] = tar_of(url)
        tar = self._tars[url, set_id]
        # A folder for each set: a part of a tar has no hash that tells which set it is of.
        cache = own_folder(Path(self._folder)) / f"datalth-{hashlib.sha256(set_id.encode()).hexdigest()[:16]}"
        size = storage.ranged_size(url) if opened.manifest.ranked else None
        if size is None:
            return fetch(url, cache, tar.bytes, tar.sha256, self._most)
        if size != tar.bytes:
            raise TicketSetError(f"{url}: expected {tar.bytes} bytes, as its JSON says, got {size}")
        make_room(cache.parent, self._most)
        return PartialCopy(url, own_folder(cache) / f"{tar.sha256}.part", size, opened.check_unchanged)


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
            " another as `cache`"
        )
    return folder


class WholeCopy:
    """A copy of a whole tar, open; see `storage.Ranges`.

    Attributes:
        path: of the file.
        size: bytes of the tar.
    """

    def __init__(self, path: Path) -> None:
        self._held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _hold(self._held)
        self._file = storage.open_ranges(str(path))
        self.path, self.size = path, self._file.size

    def read(self, offset: int, size: int) -> bytes:
        """As `storage.Ranges`."""
        return self._file.read(offset, size)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it may not have been opened
            os.close(self._held)


def fetch(url: str, cache: Path, size: int, sha256: str, most: int | None = None) -> WholeCopy:
    """A local copy of a remote tar, which is that of its hash.

    A copy is named by its hash and appears only after it was checked: what is there needs no trust in where it came from.

    Args:
        url: of the tar.
        cache: the folder for copies of its set; see `own_folder`.
        size: bytes that the tar has.
        sha256: that it has, 64 hex digits.
        most: bytes of the copies of all sets; see `TarCopies`.
    Raises:
        FileNotFoundError: there is no such tar.
        TicketSetError: it is another one, its store fails, or others can write in the folder.
    """
    path = own_folder(cache) / f"{sha256}.tar"
    with FileLock(f"{path}.lock"):  # one process fetches it, the others wait; and nobody removes it before it is open
        if path.is_file() and path.stat().st_size == size:
            os.utime(path)
        else:
            for left in cache.glob(f"{path.name}.*.tmp"):  # by a process that was killed: it had the lock
                left.unlink()
            make_room(cache.parent, most, size)
            _copy(url, path, size, sha256)
        return WholeCopy(path)


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


class PartialCopy:
    """What was asked for of a remote tar, in a file that processes share: a checksum of each block, then the blocks.

    A block is there when its checksum is, and is used only where the two agree. So no order of writing matters and no
    lock is needed: what a process that was killed, a lost page or two writers at once left behind is fetched again.
    The sha256 of the tar cannot be asked of a part of it.

    Args:
        url: of the tar.
        path: of the file, which is named by the tar's hash, in a folder that is its set's.
        size: bytes of the tar.
        check_unchanged: raises TicketSetError where the set at the URL is another by now.
    """

    def __init__(self, url: str, path: Path, size: int, check_unchanged: Callable[[], None]) -> None:
        self.url, self.size, self.check_unchanged, self._path = url, size, check_unchanged, str(path)
        self._data = -(-4 * -(-size // BLOCK) // _PAGE) * _PAGE  # where the blocks begin
        with FileLock(f"{path}.lock"):  # nobody removes it before it bears its own
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            _hold(self._descriptor)
        with self._named_errors():
            os.ftruncate(self._descriptor, self._data + size)  # a hole; what is there stays
            os.utime(path)
        self._file = storage.open_ranges(self._path)

    def read(self, offset: int, size: int) -> bytes:
        """As `storage.Ranges`; what is missing is fetched."""
        size = min(size, self.size - offset)
        if offset < 0 or size <= 0:
            return b""
        data, wrong = self._blocks(offset, size)
        if wrong:
            _fetch({self: wrong})
            data, wrong = self._blocks(offset, size)
        if wrong:
            raise TicketSetError(f"{self._path}: expected what was written to it a moment ago, got other bytes")
        start = offset % BLOCK
        return data[start : start + size]

    def _blocks(self, offset: int, size: int) -> tuple[bytes, list[int]]:
        """The blocks that hold a part, and the numbers of those that are missing or damaged."""
        first = offset // BLOCK
        size = min(-(-(offset + size) // BLOCK) * BLOCK, self.size) - first * BLOCK
        kept = self._checksums(first, size)  # before the blocks: another process that writes them writes these last
        data = self._read(self._data + first * BLOCK, size)
        pairs = enumerate(zip(kept, checksums(data), strict=True), first)
        return data, [number for number, (expected, found) in pairs if expected != found]

    def missing(self, offset: int, size: int) -> list[int]:
        """Numbers of the blocks of a part that were never fetched."""
        first = offset // BLOCK
        size = min(size, self.size - offset)
        kept = self._checksums(first, offset + size - first * BLOCK)
        return [number for number, checksum in enumerate(kept, first) if not checksum]

    def keep(self, first: int, data: bytes) -> None:
        """Write blocks that were fetched, from the block `first` on."""
        self._write(self._data + first * BLOCK, data)
        self._write(4 * first, checksums(data).tobytes())

    def _checksums(self, first: int, size: int) -> "array[int]":
        """Those kept of the blocks that so many bytes reach into, from the block `first` on."""
        return array("I", self._read(4 * first, 4 * -(-size // BLOCK)))

    def _read(self, offset: int, size: int) -> bytes:
        return self._file.read(offset, size).ljust(size, b"\0")  # somebody may have cut the file

    def _write(self, offset: int, data: bytes) -> None:
        with self._named_errors():
            while data:  # a disk that is almost full takes less at first
                done = os.pwrite(self._descriptor, data, offset)
                offset, data = offset + done, data[done:]

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk says no name
            error.filename = error.filename or self._path
            raise

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it may not have been opened
            os.close(self._descriptor)


def checksums(data: bytes) -> "array[int]":
    """CRC-32 of each block; never 0, which stands for a block that is not there."""
    view = memoryview(data)
    return array("I", [zlib.crc32(view[at : at + BLOCK]) or 1 for at in range(0, len(data), BLOCK)])


def fetch_missing(wanted: Iterable[tuple[storage.Ranges, int, int]]) -> None:
    """Fetch all at once what is missing of several parts: (file, first byte, bytes). Only partial copies lack any.

    Raises:
        TicketSetError: a store fails, or the set at the URL is another by now; nothing is kept then.
    """
    blocks: dict[PartialCopy, set[int]] = {}
    for file, offset, size in wanted:
        if isinstance(file, PartialCopy):
            blocks.setdefault(file, set()).update(file.missing(offset, size))
    _fetch(blocks)


def _fetch(blocks: Mapping[PartialCopy, Collection[int]]) -> None:
    """Fetch blocks of several copies by their numbers."""
    runs = [(copy, run) for copy, numbers in blocks.items() for run in _runs(sorted(numbers))]
    if not runs:
        return
    places = [(copy.url, run.start * BLOCK, min(run.stop * BLOCK, copy.size)) for copy, run in runs]
    parts = remote_file.read_ranges(places)
    for check_unchanged in {copy.check_unchanged for copy in blocks}:
        check_unchanged()  # after the bytes have come and before they are kept: they are of the set that was opened
    for (copy, run), part in zip(runs, parts, strict=True):
        copy.keep(run.start, part)


def _runs(numbers: list[int]) -> list[range]:
    """Neighboring numbers as one: they are asked for together."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs


def make_room(folder: Path, most: int | None, wanted: int = 0) -> None:
    """Remove copies of any set until `wanted` more bytes fit: those first that were not opened for longest.

    What is open anywhere stays, even if it is too much: it would fill the disk as well without a name, and be fetched anew.

    Args:
        folder: which holds a folder for each set.
        most, wanted: bytes; see `TarCopies`.
    """
    found = []
    for path in folder.glob(f"{_OF_SETS}/*"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            status = path.stat()
            # Bytes on the disk: a part of a tar is a file with holes.
            found.append((status.st_mtime, path, status.st_blocks * 512))
    held = sum(size for *_, size in found)
    most = (shutil.disk_usage(folder).free + held) // 2 if most is None else most
    for _, path, size in sorted(found):
        if held + wanted <= most:
            break
        if _COPY.fullmatch(path.name) and _removed(path):
            held -= size


def _removed(path: Path) -> bool:
    """Remove a copy that nobody has open, or is about to open."""
    try:
        with FileLock(f"{path}.lock", timeout=0), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return True
    except (OSError, Timeout):
        return False


def _hold(descriptor: int) -> None:
    """Keep a copy from being removed for as long as this is open, here or in a fork."""
    with contextlib.suppress(OSError):  # a file system without locks: it may go, but what is open can be read
        fcntl.flock(descriptor, fcntl.LOCK_SH)
