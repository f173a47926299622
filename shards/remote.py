"""Files of object stores and other servers, by fsspec: what is particular to its clients. `shards.storage` is what others use.

Whatever a client raises becomes one line with the URL. What may pass (a store that is too busy, a connection that breaks, a
body that is cut) is tried again here, after what a client tries by itself.
"""

import contextlib
import errno
import functools
import itertools
import random
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from shards.errors import TicketSetError, first_line

T = TypeVar("T")
BLOCK = 16 << 20  # bytes asked for at once
SMALL = 1 << 20  # bytes of a file that is asked for before its size: most JSON, and indices
BLOCKS_AT_ONCE = 4  # side by side, of a file that is read in order
BLOCKS_KEPT = 24  # two shards of ImageNet, so that their samples may be read in any order
WAITS = (0.2, 0.8)  # seconds before a second and a third try, give or take a half
# Listings are never kept, or what another process puts would not be there. Others may hand this on, as sftp does to ssh.
OBJECT_STORES = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"])
_PASSING_STATUS = frozenset([408, 429, 500, 502, 503, 504])
_PASSING_ERRNO = frozenset(
    [errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.EPIPE]  # the first two are s3fs's words for 503 and 500
    + [errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH]
)
_PASSING_CLASSES = frozenset(  # or bases: the clients' own, of which none is installed for sure, and Python's
    ["ConnectionError", "TimeoutError", "HTTPClientError", "IncompleteRead", "FlexibleChecksumError"]  # botocore
    + ["ClientConnectionError", "ClientPayloadError"]  # aiohttp
    + ["ChecksumError", "ServiceRequestError", "ServiceResponseError", "TransportError"]  # gcsfs, azure, httpx
)


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


def retry(url: str, call: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """What a call gives that may be made twice; made again where it fails by what may pass.

    Args:
        url: what it is about, for the error.

    Raises:
        FileNotFoundError: the file is not there.
        TicketSetError: anything else that a client raises.
    """
    with remote_errors(url):
        for wait in WAITS:
            try:
                return call(*arguments, **keywords)
            except Exception as error:
                if not _may_pass(error):
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))  # so that many clients do not come back at once
        return call(*arguments, **keywords)


def _may_pass(error: BaseException) -> bool:
    """Whether it is of the moment: not of a file that is not there, of rights, or of how something was asked."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # see `_is_hidden_refusal`
        error = error.__cause__
    status = next(
        (s for name in ("status", "status_code", "code") if isinstance(s := getattr(error, name, None), int)), None
    )
    if status is not None:
        return status in _PASSING_STATUS
    names = {kind.__name__ for kind in type(error).__mro__}
    return getattr(error, "errno", None) in _PASSING_ERRNO or not names.isdisjoint(_PASSING_CLASSES)


def is_object_store(url: str) -> bool:
    """Whether it is one of those that everybody means by it: any part of a file can be read, and listings cost."""
    return url.partition("://")[0] in OBJECT_STORES


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Its listings are fresh: a set may have been finished meanwhile.

    It is of this process and, unless its client is asynchronous, of this thread: ask again in another.

    Raises:
        TicketSetError: fsspec does not know the protocol, lacks the package for it, or cannot log in.
    """
    with remote_errors(url):
        import fsspec

        fs, path = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if is_object_store(url) else {}))
        fs.invalidate_cache()  # fsspec keeps its instances
        return fs, path


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store.

    Attributes:
        url: of it.
        size: bytes; None where its server does not say.
        ranged: parts of it can be read; else it comes as a whole. A small one was not tried: it is read at once.
    """

    url: str
    size: int | None
    ranged: bool


def find(url: str) -> RemoteFile:
    """Ask for a file.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: the store fails.
    """

    def look() -> RemoteFile:
        fs, path = filesystem(url)
        if is_object_store(url):
            return RemoteFile(url, _plain_size(url, fs.info(path)), True)
        with contextlib.closing(fs.open(path, "rb", block_size=BLOCK, cache_type="none")) as file:
            size = getattr(file, "size", None)
            if size is None:
                size = fs.info(path).get("size")
            return RemoteFile(url, size, size is not None and (size <= BLOCK or _has_ranges(file, size)))

    return retry(url, look)


def _plain_size(url: str, info: dict[str, Any]) -> int:
    if info.get("type") == "directory":
        raise TicketSetError(f"{url}: expected a plain file, got a folder")
    return int(info["size"])


def gives_ranges(found: RemoteFile) -> bool:
    """Whether parts of a file can be read, also where it is small."""
    if not found.ranged or not found.size or found.size > BLOCK or is_object_store(found.url):
        return found.ranged and bool(found.size)

    def look() -> bool:
        fs, path = filesystem(found.url)
        with contextlib.closing(fs.open(path, "rb", block_size=BLOCK, cache_type="none")) as file:
            return _has_ranges(file, int(found.size or 0))

    return retry(found.url, look)


def _has_ranges(file: Any, size: int) -> bool:
    """Whether a store gives the last byte alone; fsspec refuses the whole file instead without reading it."""
    try:
        file.seek(size - 1)
        return len(file.read(1)) == 1
    except (ValueError, NotImplementedError):
        return False


def read_ranges(places: list[tuple[str, int, int]]) -> list[bytes]:
    """Parts of files of one store, all asked for at once where its client can do that.

    Args:
        places: (URL, first byte, byte behind the last) of each part.
    Raises:
        TicketSetError: the store fails, a file is gone, or a part is of another length.
    """
    paths = {}
    for url in dict.fromkeys(url for url, _, _ in places):
        fs, paths[url] = filesystem(url)
    urls, starts, ends = zip(*places, strict=True)
    how = {} if fs.async_impl else {"cache_type": "none"}  # the others open a file for it, and would read ahead
    asked = [paths[url] for url in urls], list(starts), list(ends)
    found = retry(urls[0], fs.cat_ranges, *asked, on_error="return", **how)
    for number, (url, start, end) in enumerate(places):
        if isinstance(found[number], Exception) or len(found[number]) != end - start:
            # One after another, which is a rest for a store that was asked for too much.
            found[number] = _read_part(url, functools.partial(fs.cat_file, paths[url], **how), start, end)
    return list(found)


def _read_part(url: str, cat_file: Callable[..., bytes], start: int, end: int) -> bytes:
    data = b""
    try:
        while len(data) < end - start and (more := retry(url, cat_file, start=start + len(data), end=end)):
            data += more  # some servers send less than they are asked for
    except FileNotFoundError:
        raise TicketSetError(f"{url}: missing; it was there when it was opened") from None
    if len(data) != end - start:
        raise TicketSetError(f"{url}: expected {end - start} bytes at {start}, got {len(data)}")
    return data


def read_start(url: str, size: int) -> bytes:
    """The first bytes of a file of an object store, by one request; fewer where it has no more.

    Raises:
        FileNotFoundError: it is not there.
        TicketSetError: the store fails.
    """

    def ask() -> bytes:
        try:
            data: bytes = fs.cat_file(path, start=0, end=size)
        except Exception as error:
            # An empty file has no first byte, so that this is no range of it: 416, s3fs's EINVAL.
            if 416 not in (getattr(error, "status_code", None), getattr(error, "code", None)) and (
                not isinstance(error, OSError) or error.errno != errno.EINVAL
            ):
                raise
            return b"" if fs.size(path) == 0 else fs.cat_file(path)
        return data

    fs, path = filesystem(url)
    return retry(url, ask)


def blocks(found: RemoteFile) -> Iterator[bytes]:
    """A whole file from its beginning to its end, by parts where it has some: a few are on their way at any time.

    Raises:
        TicketSetError: the store fails, or the file is gone or of another length.
    """
    if not found.ranged or found.size is None:
        yield from _stream(found.url)
        return
    places = [(found.url, start, min(start + BLOCK, found.size)) for start in range(0, found.size, BLOCK)]
    if len(places) < 2 or not filesystem(found.url)[0].async_impl:  # the others log in anew in every thread
        for place in places:
            yield from read_ranges([place])
        return
    pool = ThreadPoolExecutor(BLOCKS_AT_ONCE, "blocks")
    try:
        waiting: deque[Future[list[bytes]]] = deque()
        for place in places:
            waiting.append(pool.submit(read_ranges, [place]))
            if len(waiting) == BLOCKS_AT_ONCE:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _stream(url: str) -> Iterator[bytes]:
    """A file as its server sends it. What was handed on cannot be asked for again, so it is not."""
    fs, path = filesystem(url)
    with contextlib.closing(retry(url, fs.open, path, "rb", block_size=0)) as file:  # 0: fsspec's word for it
        while True:
            with remote_errors(url):
                part = file.read(BLOCK)
            if not part:
                return
            yield part


class RemoteRanges:
    """A file by its offsets, for threads; see `storage.Ranges`.

    The last blocks of all files are kept, and several are asked for at once where a file is read in order.

    Args:
        found: the file.
        scattered: few parts of it will be read, far apart: they alone are fetched.
    """

    _numbers = itertools.count()
    _kept: ClassVar[OrderedDict[tuple[int, int], bytes]] = (
        OrderedDict()
    )  # by file and number; each use of it is one step

    def __init__(self, found: RemoteFile, scattered: bool = False) -> None:
        self._url, self.size, self._scattered = found.url, int(found.size or 0), scattered
        self._own = next(self._numbers)  # not the URL: another file may be there when it is opened again
        self._fetched: set[int] = set()
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """As `storage.Ranges`."""
        size = min(size, self.size - offset)
        if offset < 0 or size <= 0:
            return b""
        if self._scattered:
            return read_ranges([(self._url, offset, offset + size)])[0]
        first = offset // BLOCK
        numbers = range(first, -(-(offset + size) // BLOCK))
        with self._lock:  # or several threads would fetch the same
            data = b"".join(self._block(number) for number in numbers)
        start = offset - first * BLOCK
        return data[start : start + size]

    def _block(self, number: int) -> bytes:
        block = self._kept.get((self._own, number))
        if block is None:
            ahead = BLOCKS_AT_ONCE if (self._own, number - 1) in self._kept else 1
            end = min(number + ahead, -(-self.size // BLOCK))
            wanted = [each for each in range(number, end) if (self._own, each) not in self._kept]
            places = [(self._url, each * BLOCK, min((each + 1) * BLOCK, self.size)) for each in wanted]
            found = read_ranges(places)
            block = found[0]
            self._fetched.update(wanted)
            self._kept.update({(self._own, each): data for each, data in zip(wanted, found, strict=True)})
        with contextlib.suppress(KeyError):  # other files' threads
            self._kept.move_to_end((self._own, number))
            while len(self._kept) > BLOCKS_KEPT:
                self._kept.popitem(last=False)
        return block

    def __del__(self) -> None:
        for number in self._fetched:
            self._kept.pop((self._own, number), None)


def list_names(url: str) -> list[str]:
    """Names directly inside a folder, sorted; empty where there is none."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        found = (name.rstrip("/") for name in retry(url, fs.ls, path, detail=False))
        # Some tools put an empty object in place of a folder, which is then in its own listing.
        return sorted(name.rpartition("/")[2] for name in found if name != path.rstrip("/"))
    return []


def glob(url: str) -> list[str]:
    """The URLs that a pattern matches, sorted."""
    fs, path = filesystem(url)

    def look() -> list[str]:
        found = sorted(fs.glob(path))
        if not found:  # fsspec passes over what it cannot list; this says why
            fs.ls(re.split(r"[*[]", path)[0].rpartition("/")[0], detail=False)
        return [fs.unstrip_protocol(name) for name in found]

    with contextlib.suppress(FileNotFoundError):
        return retry(url, look)
    return []
