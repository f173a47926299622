"""Where bytes are: a local path or any fsspec URL (s3://, gs://, https://, memory://).

Local files are read with pread, so that one open file serves many threads; remote ones in large
ranges. fsspec is imported only for URLs.
"""

import contextlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from shards.errors import TicketSetError, first_line

REMOTE_BLOCK = 16 << 20  # bytes fetched at once from a remote file
REMOTE_BLOCKS_KEPT = 12  # a shard of ImageNet, so that its samples may be read in any order


def is_remote(url: str) -> bool:
    """Whether it is a URL rather than a local path; see `local`."""
    return "://" in url


def local(url: str) -> str:
    """`file://` URLs as plain paths."""
    return url.removeprefix("file://")


def join(url: str, *names: str) -> str:
    """A path below a folder, local or remote."""
    return "/".join((url.rstrip("/"), *names))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        TicketSetError: fsspec does not know the protocol, or lacks the package for it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise TicketSetError(f"{url}: {first_line(error)}") from None


def read_bytes(url: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError: it is not there.
    """
    url = local(url)
    if is_remote(url):
        fs, path = filesystem(url)
        return fs.cat_file(path)
    return Path(url).read_bytes()


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    url = local(url)
    if is_remote(url):
        fs, path = filesystem(url)
        return bool(fs.exists(path))
    return os.path.exists(url)


def size_of(url: str) -> int:
    """Bytes of a file.

    Raises:
        FileNotFoundError: it is not there.
    """
    url = local(url)
    if is_remote(url):
        fs, path = filesystem(url)
        return int(fs.size(path))
    return os.stat(url).st_size


class Ranges(Protocol):
    """Random access to one file; safe to share between threads; closes with its last reference."""

    def read(self, offset: int, size: int) -> bytes: ...


def open_ranges(url: str) -> Ranges:
    """Open a file for reading at offsets.

    Raises:
        FileNotFoundError: a local file that is not there.
    """
    url = local(url)
    return _RemoteRanges(url) if is_remote(url) else _LocalRanges(url)


class _LocalRanges:
    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, offset)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it never opened
            os.close(self._descriptor)


class _RemoteRanges:
    """Keeps the last blocks, so that reading roughly in order costs one request a block."""

    def __init__(self, url: str) -> None:
        self._fs, self._path = filesystem(url)
        self._fs.info(self._path)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        first = offset // REMOTE_BLOCK
        numbers = range(first, -(-(offset + size) // REMOTE_BLOCK))
        with self._lock:
            data = b"".join(self._block(number) for number in numbers)
        start = offset - first * REMOTE_BLOCK
        return data[start : start + size]

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            start = number * REMOTE_BLOCK
            self._blocks[number] = self._fs.cat_file(self._path, start=start, end=start + REMOTE_BLOCK)
            if len(self._blocks) > REMOTE_BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name whole or not at all: .tmp, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
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
        return sorted(p.rstrip("/").rpartition("/")[2] for p in fs.ls(path, detail=False)) if fs.exists(path) else []
    return sorted(os.listdir(url)) if os.path.isdir(url) else []
