"""Where bytes are: a local path or any fsspec URL (s3://, gs://, https://, memory://).

Local files are read with pread, so that one open file serves many threads; remote ones in large
ranges. fsspec is imported only for URLs, and whatever its clients raise becomes one line with the URL.
Nothing but plain files is opened: a FIFO would wait for ever, a device may do anything.
"""

import contextlib
import io
import os
import re
import secrets
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shards.errors import TicketSetError, first_line

REMOTE_BLOCK = 16 << 20  # bytes fetched at once from a remote file
REMOTE_BLOCKS_KEPT = 12  # a shard of ImageNet, so that its samples may be read in any order
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


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Whatever a store's client raises, as one line with the URL; a file that is not there stays FileNotFoundError."""
    try:
        yield
    except (TicketSetError, MemoryError):
        raise
    except ImportError as error:
        raise TicketSetError(f"{url}: {_missing_package(error)}") from None
    except Exception as error:  # each client has classes of its own, and none of them is installed for sure
        missing = isinstance(error, FileNotFoundError)
        if missing and not _is_hidden_refusal(url, error.__cause__):
            raise
        reason = error.__cause__ if missing and error.__cause__ else error
        raise TicketSetError(f"{url}: {first_line(reason)}") from None


def _missing_package(error: ImportError) -> str:
    said, package = first_line(error), getattr(error.__cause__, "name", None)
    # The module that is missing is mostly, but not always, called as its package.
    return f"needs {package}: pip install {package}" if package and package in said else said


def _is_hidden_refusal(url: str, cause: BaseException | None) -> bool:
    """fsspec's HTTP says "not found" of a server that is down or forbids, too: the cause tells them apart."""
    if cause is None or isinstance(cause, FileNotFoundError) or not url.startswith(("http://", "https://")):
        return False
    return getattr(cause, "status", None) not in (404, 410)


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Its listings are fresh: a set may have been finished meanwhile.

    Raises:
        TicketSetError: fsspec does not know the protocol, lacks the package for it, or cannot log in.
    """
    with remote_errors(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
        # Instances are kept for the whole process. use_listings_cache=False is not for all: sftp hands it on to ssh.
        fs.invalidate_cache()
        return fs, path


def read_bytes(url: str, limit: int = SMALL_FILE) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it has more than `limit` bytes, which are then not read, or is no plain file.
    """
    return b"".join(blocks(url, limit))


def blocks(url: str, limit: int) -> Iterator[bytes]:
    """A whole file from its beginning to its end, at most REMOTE_BLOCK bytes at a time.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it has more than `limit` bytes, ends before its size, or is no plain file.
    """
    url = local(url)
    if not is_remote(url):
        ranges = _LocalRanges(_open_plain(url), url)
        _check_size(url, ranges.size, limit)
        for offset in range(0, ranges.size, REMOTE_BLOCK):
            yield ranges.read(offset, REMOTE_BLOCK)
        return
    file, size, _ = _open_remote(url)
    done = 0
    with contextlib.closing(file):
        _check_size(url, size, limit)
        while part := _read_remote(url, file, min(REMOTE_BLOCK, limit + 1 - done)):
            done += len(part)
            _check_size(url, done, limit)
            yield part
    if size not in (None, done):
        raise TicketSetError(f"{url}: expected {size} bytes, got {done}")


def _check_size(url: str, size: int | None, limit: int) -> None:
    if size is not None and size > limit:
        raise TicketSetError(f"{url}: expected at most {limit} bytes, got {size} or more")


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    url = local(url)
    if is_remote(url):
        fs, path = filesystem(url)
        with remote_errors(url):
            return bool(fs.exists(path))
    return os.path.exists(url)


def size_of(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it is no plain file.
    """
    url = local(url)
    if is_remote(url):
        fs, path = filesystem(url)
        with remote_errors(url):
            size = fs.size(path)
        return open_ranges(url).size if size is None else int(size)
    return _plain_size(url)


def ranged_size(url: str) -> int | None:
    """Bytes of a remote file of which parts can be read; None where its store sends whole files alone.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: the store fails.
    """
    file, size, ranged = _open_remote(url)
    with contextlib.closing(file), remote_errors(url):
        # What is small was not tried: read at once it needs no ranges.
        return size if size and ranged and (size > REMOTE_BLOCK or _has_ranges(file, size)) else None


def read_ranges(places: list[tuple[str, int, int]]) -> list[bytes]:
    """Parts of remote files of one store, all asked for at once where its client can do that.

    Args:
        places: (URL, first byte, byte behind the last) of each part.
    Raises:
        TicketSetError: the store fails, a file is gone, or a part is of another length.
    """
    paths = {}
    for url in dict.fromkeys(url for url, _, _ in places):
        fs, paths[url] = filesystem(url)
    urls, starts, ends = zip(*places, strict=True)
    with remote_errors(urls[0]):
        found = fs.cat_ranges([paths[url] for url in urls], list(starts), list(ends), on_error="return")
    for (url, start, end), part in zip(places, found, strict=True):
        try:
            with remote_errors(url):
                if isinstance(part, Exception):
                    raise part
        except FileNotFoundError:
            raise TicketSetError(f"{url}: missing; it was there when it was opened") from None
        if len(part) != end - start:
            raise TicketSetError(f"{url}: expected {end - start} bytes at {start}, got {len(part)}")
    return found


class Ranges(Protocol):
    """Random access to one file; safe to share between threads; closes with its last reference.

    Attributes:
        size: bytes of the file when it was opened.
    """

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from an offset on: those that the file has, so fewer at its end and none outside it."""


def open_ranges(url: str) -> Ranges:
    """Open a file for reading at offsets.

    A server that can only send whole files is read once, into a temporary file without a name.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: it is no plain file.
    """
    url = local(url)
    if not is_remote(url):
        return _LocalRanges(_open_plain(url), url)
    file, size, ranged = _open_remote(url)
    if ranged and size is not None:
        return _RemoteRanges(url, file, size)
    file.close()
    with tempfile.TemporaryFile() as copy:
        for part in blocks(url, LARGE_FILE if size is None else size):
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
        with contextlib.suppress(OSError):
            os.close(self._descriptor)


def _open_remote(url: str) -> tuple[Any, int | None, bool]:
    """fsspec's file, at its beginning; its size, where the store says it; whether it can be read at offsets."""
    fs, path = filesystem(url)
    with remote_errors(url):
        file = fs.open(path, "rb", block_size=REMOTE_BLOCK, cache_type="none")
        size = getattr(file, "size", None)
        if size is None:
            size = fs.info(path).get("size")
        if size is not None and (size <= REMOTE_BLOCK or _has_ranges(file, size)):
            return file, size, True
        file.close()
        return fs.open(path, "rb", block_size=0), size, False  # 0: fsspec's word for a stream


def _has_ranges(file: Any, size: int) -> bool:
    """Whether a store gives the last byte alone; fsspec refuses the whole file instead without reading it."""
    try:
        file.seek(size - 1)
        found = file.read(1)
        file.seek(0)
    except (ValueError, NotImplementedError):
        return False
    return len(found) == 1


def _read_remote(url: str, file: Any, size: int) -> bytes:
    """The next `size` bytes; fewer only at the end."""
    parts = []
    with remote_errors(url):
        while size > 0 and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


class _RemoteRanges:
    """Keeps the last blocks, so that reading roughly in order costs one request a block.

    fsspec's own cache of blocks is not for threads, and keeps a block that came short as if it were whole.
    """

    def __init__(self, url: str, file: Any, size: int) -> None:
        self._url, self._file, self.size = url, file, size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        size = min(size, self.size - offset)
        if offset < 0 or size <= 0:
            return b""
        first = offset // REMOTE_BLOCK
        numbers = range(first, -(-(offset + size) // REMOTE_BLOCK))
        with self._lock:
            data = b"".join(self._block(number) for number in numbers)
        start = offset - first * REMOTE_BLOCK
        return data[start : start + size]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * REMOTE_BLOCK
            expected = min(REMOTE_BLOCK, self.size - start)
            with remote_errors(self._url):
                self._file.seek(start)
            block = _read_remote(self._url, self._file, expected)
            if len(block) != expected:
                raise TicketSetError(f"{self._url}: expected {expected} bytes at {start}, got {len(block)}")
            self._blocks[number] = block
            if len(self._blocks) > REMOTE_BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


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
        fs, path = filesystem(url)
        with remote_errors(url):
            found = fs.ls(path, detail=False) if fs.exists(path) else []
        return sorted(p.rstrip("/").rpartition("/")[2] for p in found)
    return sorted(os.listdir(url)) if os.path.isdir(url) else []


def glob_remote(url: str) -> list[str]:
    """The URLs that a pattern matches, sorted."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError), remote_errors(url):
        found = sorted(fs.glob(path))
        if not found:  # fsspec passes over what it cannot list; this says why
            fs.ls(re.split(r"[*[]", path)[0].rpartition("/")[0], detail=False)
        return [fs.unstrip_protocol(name) for name in found]
    return []
