"""Where bytes are: a local path or any fsspec URL (s3://, gs://, https://, memory://).

Local files are read with pread, so that one open file serves many threads; remote ones in large
ranges, by `shards.remote`. fsspec is imported only for URLs.
Nothing but plain files is opened: a FIFO would wait for ever, a device may do anything.
"""

import contextlib
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shards import remote, remote_file
from shards.errors import TicketSetError, first_line

SMALL_FILE = 256 << 20  # bytes of the largest file that is read whole: JSON, or the index of a shard
LARGE_FILE = 16 << 30  # bytes of the largest that is copied from a server that does not say a size
_KINDS = {
    stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip


def is_remote(url: str) -> bool:
    """Whether it is a URL rather than a local path; see `local`."""
    return "://" in url


def local(url: str) -> str:
    """`file://` URLs as plain paths."""
    return url.removeprefix("file://")


def join(url: str, *names: str) -> str:
    """A path below a folder, local or remote."""
    return "/".join((url.rstrip("/"), *names))


def read_bytes(url: str, limit: int = SMALL_FILE) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it has more than `limit` bytes, which are then not read, or is no plain file.
    """
    if remote.is_object_store(url):
        start = remote_file.read_start(url, remote_file.SMALL)
        if len(start) < remote_file.SMALL:
            _check_size(url, len(start), limit)
            return start
    return b"".join(blocks(url, limit))


def blocks(url: str, limit: int) -> Iterator[bytes]:
    """A whole file from its beginning to its end, at most `remote_file.BLOCK` bytes at a time.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it has more than `limit` bytes, ends before its size, or is no plain file.
    """
    url = local(url)
    if not is_remote(url):
        ranges = _LocalRanges(_open_plain(url), url)
        _check_size(url, ranges.size, limit)
        for offset in range(0, ranges.size, remote_file.BLOCK):
            yield ranges.read(offset, remote_file.BLOCK)
        return
    found = remote_file.find(url)
    _check_size(url, found.size, limit)
    done = 0
    for part in remote_file.blocks(found):
        done += len(part)
        _check_size(url, done, limit)
        yield part
    if found.size not in (None, done):
        raise TicketSetError(f"{url}: expected {found.size} bytes, got {done}")


def _check_size(url: str, size: int | None, limit: int) -> None:
    if size is not None and size > limit:
        raise TicketSetError(f"{url}: expected at most {limit} bytes, got {size} or more")


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    url = local(url)
    if is_remote(url):
        fs, path = remote.filesystem(url)
        return bool(remote.retry(url, fs.exists, path))
    return os.path.exists(url)


def size_of(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it is no plain file.
    """
    url = local(url)
    if is_remote(url):
        fs, path = remote.filesystem(url)
        size = remote.retry(url, fs.size, path)
        return open_ranges(url).size if size is None else int(size)
    return _plain_size(url)


def ranged_size(url: str) -> int | None:
    """Bytes of a remote file of which parts can be read; None where its store sends whole files alone.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: the store fails.
    """
    found = remote_file.find(url)
    return found.size if remote_file.gives_ranges(found) else None


class Ranges(Protocol):
    """Random access to one file; safe to share between threads; closes with its last reference.

    Attributes:
        size: bytes of the file when it was opened.
    """

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from an offset on: those that the file has, so fewer at its end and none outside it."""


def open_ranges(url: str, scattered: bool = False) -> Ranges:
    """Open a file for reading at offsets.

    A server that can only send whole files is read once, into a temporary file without a name.

    Args:
        url: of the file.
        scattered: few parts of it will be read, far apart; of a remote file they alone are then fetched.
    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it is no plain file.
    """
    url = local(url)
    if not is_remote(url):
        return _LocalRanges(_open_plain(url), url)
    found = remote_file.find(url)
    if found.ranged:
        return remote_file.RemoteRanges(found, scattered)
    with tempfile.TemporaryFile() as copy:
        for part in blocks(url, LARGE_FILE if found.size is None else found.size):
            copy.write(part)
        copy.flush()
        return _LocalRanges(os.dup(copy.fileno()), url)


def open_file(url: str) -> BinaryIO:
    """Open a file for reading and seeking, as `tarfile` wants it.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it is no plain file.
    """
    url = local(url)
    if is_remote(url):
        return io.BufferedReader(_RangesFile(open_ranges(url)))
    return os.fdopen(_open_plain(url), "rb")


def _open_plain(path: str) -> int:
    """A descriptor of a plain file. What it is, is asked before it is opened, and again after: it may be exchanged."""
    _plain_size(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _plain_size(path, descriptor)
    except TicketSetError:
        os.close(descriptor)
        raise
    return descriptor


def _plain_size(path: str, descriptor: int | None = None) -> int:
    """Bytes of a plain file; anything else is refused."""
    try:
        found = os.stat(path if descriptor is None else descriptor)
    except ValueError as error:  # a NUL, or a surrogate that no name can have
        raise TicketSetError(f"{path!r}: expected a path: {first_line(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "special file")
        raise TicketSetError(f"{path}: expected a plain file, got a {kind}")
    return found.st_size


class _LocalRanges:
    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self.size = os.fstat(descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)  # what an index says may be beyond any memory
        if offset < 0 or size <= 0:
            return b""
        try:
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more  # a signal, a network file system, more than 2 GB: less than asked is not the end
        except OSError as error:
            error.filename = self._name
            raise
        return data

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # it may not have been opened
            os.close(self._descriptor)


class _RangesFile(io.RawIOBase):
    """Ranges as a file with a position."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges, self._position = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._ranges.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._ranges.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside the name that it may be given, opened for writing; what is left of it is removed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name whole or not at all: .tmp, fsync, rename, fsync of the folder."""
    with temporary_file(path) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable; not every platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """`atomic_file` for bytes at hand."""
    with atomic_file(path) as file:
        file.write(data)


def list_names(url: str) -> list[str]:
    """Names directly inside a folder; empty where there is none."""
    url = local(url)
    if is_remote(url):
        return remote.list_names(url)
    return sorted(os.listdir(url)) if os.path.isdir(url) else []
