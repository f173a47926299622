"""A folder that several processes may write: a local one, or a place in an object store.

Whole objects alone are put, each at once or not at all. A put may ask for what is there now, so that of several writers
one wins and the others are told:

    store.put("plan.json", data, expected=None)        # only where there is none
    store.put("plan.json", data, expected=store.tag("plan.json"))  # only where nobody has changed it since

No store has a rename, and only some have locks, so these two conditions are all that agreement is built on.
"""

import abc
import contextlib
import errno
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote

from filelock import FileLock

from shards import remote, storage
from shards.errors import TicketSetError, first_line
from shards.format import CLAIMS
from shards.signals import in_threads

T = TypeVar("T")
ANY = "whatever is there"  # as what a put expects
REQUESTS_AT_ONCE = 16
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # exFAT, some CIFS and FUSE
_LARGEST_PUT = 5 << 30  # bytes of one request; only a put that expects a tag is bound to one


class Conflict(TicketSetError):
    """A put found something else than it expected; nothing was changed."""


@dataclass(frozen=True)
class Entry:
    """An object in a listing.

    Attributes:
        size: bytes.
        modified: when it was put, in seconds by the store's own clock.
    """

    size: int
    modified: float


class Store(abc.ABC):
    """A folder, local or remote; made by `open_store`. It is only its URL, so it can be pickled.

    Attributes:
        url: of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        """The URL of an object in it, for `shards.storage`."""
        return storage.join(self.url, name)

    def read(self, name: str, limit: int = storage.SMALL_FILE) -> bytes:
        """A whole object.

        Raises:
            FileNotFoundError: it is not there.
            TicketSetError: it has more than `limit` bytes, or the store fails.
        """
        return storage.read_bytes(self.at(name), limit)

    @abc.abstractmethod
    def tag(self, name: str) -> str | None:
        """What stands for an object's present content, None where there is none: another put, another tag.

        In S3 a tag is a hash of the content, so that the same bytes put again have the same one.
        """

    @abc.abstractmethod
    def entries(self, folder: str = "") -> dict[str, Entry]:
        """Objects directly inside a folder by name, as one listing; empty where there is no such folder."""

    def put(self, name: str, data: bytes | Path, expected: str | None = ANY) -> None:
        """Put an object, whole or not at all.

        An answer may be lost on its way, and a second try then finds what the first has put. So bytes that are there
        already are no conflict: they are ours, or a twin's.

        Args:
            name: of the object.
            data: bytes, or a file of `spool`, which is then gone.
            expected: ANY; None: nothing is there; or its `tag`.
        Raises:
            Conflict: something else is there; nothing was changed.
            TicketSetError: the store fails, or knows no such condition.
        """
        if not self._put(name, data, expected) and not self._holds(name, data):
            raise Conflict(f"{self.at(name)}: another process has written it meanwhile")

    @abc.abstractmethod
    def _put(self, name: str, data: bytes | Path, expected: str | None) -> bool:
        """Whether what was expected was there, and is now replaced."""

    def _holds(self, name: str, data: bytes | Path) -> bool:
        """Whether an object has these bytes."""
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        try:
            if storage.size_of(self.at(name)) != size:
                return False
            if isinstance(data, bytes):
                return self.read(name, size) == data
            with open(data, "rb") as file:
                return all(file.read(len(part)) == part for part in storage.blocks(self.at(name), size))
        except FileNotFoundError:
            return False

    @abc.abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; what is not there is passed over."""

    @abc.abstractmethod
    def spool(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """A temporary local file (`Path(file.name)`) for what will be put under a name; in the folder where that is local."""

    def read_all(self, names: Iterable[str], limit: int = storage.SMALL_FILE) -> list[bytes | None]:
        """Several objects, asked for side by side; None for those that are not there."""

        def read(name: str) -> bytes | None:
            try:
                return self.read(name, limit)
            except FileNotFoundError:
                return None

        return in_threads(read, names, REQUESTS_AT_ONCE)

    def clock(self) -> Callable[[], float]:
        """The store's own clock, in seconds: what `Entry.modified` can be held against, whatever this machine's says.

        It is set by an object that is put for it, and that also tells whether the store keeps conditions at all: some
        servers ignore them without a word, and every writer would then win.

        Raises:
            TicketSetError: the store does not keep them.
        """
        for _ in range(5):  # an answer may be lost; or somebody finalized the set meanwhile, and removed all claims
            name = f"clock-{secrets.token_hex(8)}"
            place = f"{CLAIMS}/{name}"
            try:
                self.put(place, b"one", expected=None)
                kept, tag = not self._put(place, b"two", expected=None), self.tag(place)
                started = time.monotonic()
                kept = kept and self._put(place, b"three", tag) and not self._put(place, b"four", tag)
                entry = self.entries(CLAIMS).get(name)
            finally:
                self.remove([place])
            if kept and entry is not None:
                return lambda: entry.modified + (time.monotonic() - started)
        raise TicketSetError(
            f"{self.url}: its store ignores conditional writes (`If-None-Match`, `If-Match`), so that several workers would undo"
            f" each other's shards; expected one that keeps them, see docs/SCALE.md; a single datalth-mine can write it"
        )


def open_store(url: str | Path) -> Store:
    """The folder at a path or a URL; it need not be there yet."""
    url = storage.local(str(url)).rstrip("/") or "/"
    return RemoteStore(url) if storage.is_remote(url) else LocalStore(url)


class LocalStore(Store):
    """A folder of this machine or of a network file system. Creating is a hard link, which one of several gets."""

    def tag(self, name: str) -> str | None:
        with contextlib.suppress(FileNotFoundError), open(self.at(name), "rb") as file:
            found = os.fstat(file.fileno())  # of an open file: os.stat of a network file system may be seconds old
            return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
        return None

    def entries(self, folder: str = "") -> dict[str, Entry]:
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.at(folder) if folder else self.url) as files:
            for file in files:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if file.is_file():
                        found[file.name] = Entry(file.stat().st_size, file.stat().st_mtime)
        return found

    def _put(self, name: str, data: bytes | Path, expected: str | None) -> bool:
        while isinstance(data, bytes):
            with self.spool(name) as file:
                file.write(data)
                file.flush()
                try:
                    return self._put(name, Path(file.name), expected)
                except FileNotFoundError:  # it was swept: somebody took this process for dead, as after a long stop
                    if os.path.exists(file.name):
                        raise
        path = Path(self.at(name))
        with open(data, "rb") as file:
            os.fsync(file.fileno())
        if expected is ANY:
            os.replace(data, path)
        elif expected is None:
            try:
                os.link(data, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                raise TicketSetError(
                    f"{path.parent}: its file system has no hard links ({error.strerror}), which several workers need;"
                    f" expected a folder that has, or an object store; see docs/SCALE.md"
                ) from None
        else:
            with self._lock():  # no system replaces a file on a condition
                if self.tag(name) != expected:
                    return False
                os.replace(data, path)
        storage.sync_folder(path.parent)
        return True

    def remove(self, names: Iterable[str]) -> None:
        paths = [Path(self.at(name)) for name in names]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths} - {Path(self.url)}:  # object stores know no empty folders
            with contextlib.suppress(OSError):
                folder.rmdir()

    def spool(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        path = Path(self.at(name))
        return _in_folder(path.parent, lambda: storage.temporary_file(path))

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        return _in_folder(Path(self.at(CLAIMS)), lambda: FileLock(self.at(f"{CLAIMS}/lock")))


@contextlib.contextmanager
def _in_folder(folder: Path, make: Callable[[], contextlib.AbstractContextManager[T]]) -> Iterator[T]:
    """A file in a folder that others may remove whenever it is empty."""
    with contextlib.ExitStack() as stack:
        while True:
            with contextlib.suppress(
                FileExistsError
            ):  # it was there, and gone when mkdir looked whether it is a folder
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                file = stack.enter_context(make())
                break
        yield file


class RemoteStore(Store):
    """A folder of an object store, by fsspec. Its put is one request or one multipart upload, which is atomic in all."""

    def tag(self, name: str) -> str | None:
        fs, path = remote.filesystem(self.at(name))
        try:
            found = remote.retry(self.at(name), fs.info, path)
        except FileNotFoundError:
            return None
        said = [str(found[key]) for key in ("generation", "ETag", "etag") if found.get(key)]
        return said[0] if said else f"{_modified(found)}-{found.get('size')}"  # sftp, some of http

    def entries(self, folder: str = "") -> dict[str, Entry]:
        url = self.at(folder) if folder else self.url
        fs, path = remote.filesystem(url)
        try:
            found = remote.retry(url, fs.ls, path, detail=True)
        except FileNotFoundError:
            return {}
        files = (info for info in found if info["type"] == "file")
        return {info["name"].rpartition("/")[2]: Entry(info["size"] or 0, _modified(info)) for info in files}

    def _put(self, name: str, data: bytes | Path, expected: str | None) -> bool:
        url = self.at(name)
        fs, path = remote.filesystem(url)

        def put() -> bool:
            try:
                if expected not in (ANY, None):
                    _swap(fs, path, data.read_bytes() if isinstance(data, Path) else data, str(expected))
                    return True
                how = {} if expected is ANY else {"mode": "create"}
                if isinstance(data, bytes):
                    fs.pipe_file(path, data, **how)
                else:
                    fs.put_file(str(data), path, **how)
            except FileNotFoundError as error:
                if expected in (ANY, None):  # no bucket
                    raise TicketSetError(f"{url}: cannot be written: {first_line(error)}") from None
                return False  # nothing is there to swap
            except Exception as error:
                if expected is ANY or not _is_refusal(error):
                    raise
                return False
            return True

        return remote.retry(url, put)

    def remove(self, names: Iterable[str]) -> None:
        def remove(name: str) -> None:
            fs, path = remote.filesystem(self.at(name))
            with contextlib.suppress(FileNotFoundError):
                remote.retry(self.at(name), fs.rm_file, path)

        in_threads(remove, names, REQUESTS_AT_ONCE)

    def spool(self, name: str) -> contextlib.AbstractContextManager[BinaryIO]:
        # Nobody else may read it, or put a link in its place: the folder is mostly one that all users share.
        file = tempfile.NamedTemporaryFile(prefix=f"datalth-{name.replace('/', '-')}.", suffix=".tmp")  # noqa: SIM115
        return cast(contextlib.AbstractContextManager[BinaryIO], file)


def _modified(info: dict[str, Any]) -> float:
    """When an object was put; each client has a name of its own for it."""
    keys = ("LastModified", "last_modified", "updated", "mtime", "created")
    found = next((info[key] for key in keys if info.get(key)), 0.0)
    when = datetime.fromisoformat(found.replace("Z", "+00:00")) if isinstance(found, str) else found
    return when.timestamp() if isinstance(when, datetime) else float(when)


def _is_refusal(error: Exception) -> bool:
    """Whether a client's error is the store's answer that a condition does not hold."""
    if isinstance(error, FileExistsError):
        return True
    status = getattr(error, "code", getattr(error, "status_code", None))
    # EINVAL is s3fs's word for 412, unless the server says by which condition, which not all do.
    return getattr(error, "errno", None) == errno.EINVAL or str(status) in ("404", "412")


def _swap(fs: Any, path: str, data: bytes, tag: str) -> None:
    """Put an object where the one with a tag is; fsspec has no word for it, so each client is asked by its own."""
    kinds = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    swap = next((function for kind, function in _SWAPS.items() if kind in kinds), None)
    if swap is None or len(data) > _LARGEST_PUT:
        raise TicketSetError(f"{kinds[0]}: a file of {len(data)} bytes cannot be replaced on a condition there")
    swap(fs, path, data, tag)


def _swap_s3(fs: Any, path: str, data: bytes, tag: str) -> None:
    bucket, key, _ = fs.split_path(path)
    fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=tag)


def _swap_gcs(fs: Any, path: str, data: bytes, tag: str) -> None:
    bucket, key, _ = fs.split_path(path)
    where = f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o"
    parts = ("application/json", json.dumps({"name": key}).encode()), ("application/octet-stream", data)
    body = b"".join(b"--datalth\nContent-Type: %s\n\n%s\n" % (kind.encode(), part) for kind, part in parts)
    headers = {"Content-Type": "multipart/related; boundary=datalth"}
    fs.call("POST", where, uploadType="multipart", ifGenerationMatch=tag, headers=headers, data=body + b"--datalth--")


def _swap_azure(fs: Any, path: str, data: bytes, tag: str) -> None:
    from azure.core import MatchConditions
    from fsspec.asyn import sync

    container, blob, _ = fs.split_path(path)

    async def upload() -> None:
        async with fs.service_client.get_blob_client(container=container, blob=blob) as client:
            await client.upload_blob(data, overwrite=True, etag=tag, match_condition=MatchConditions.IfNotModified)

    sync(fs.loop, upload)


_SWAPS = {"s3": _swap_s3, "gs": _swap_gcs, "abfs": _swap_azure}
