"""A file of an object store or another server: its size, parts of it, and all of it. `shards.storage` is what others use."""

import contextlib
import errno
import functools
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from shards.errors import TicketSetError
from shards.remote import filesystem, is_object_store, remote_errors, retry
from shards.signals import Signals

BLOCK = 16 << 20  # bytes asked for at once
SMALL = 1 << 20  # bytes of a file that is asked for before its size: most JSON, and indices
BLOCKS_AT_ONCE = 4  # side by side, of a file that is read in order
BLOCKS_KEPT = 24  # two shards of ImageNet, so that their samples may be read in any order


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

    fs, path = filesystem(url)

    def ask() -> Any:
        try:
            return fs.cat_file(path, start=0, end=size)
        except Exception as error:
            said = [getattr(error, name, None) for name in ("errno", "code", "status_code")]
            # An empty file has no first byte: 416, of which s3fs makes EINVAL.
            if (errno.EINVAL not in said and 416 not in said) or fs.size(path):
                raise
            return b""

    data: bytes = retry(url, ask)
    return data


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
        asked, waiting = iter(places), deque[Future[list[bytes]]]()
        for _ in places:
            with Signals().untorn():
                for place in itertools.islice(asked, BLOCKS_AT_ONCE - len(waiting)):
                    waiting.append(pool.submit(read_ranges, [place]))
                part = waiting.popleft().result()
            yield from part
    finally:
        pool.shutdown(cancel_futures=True)


def _stream(url: str) -> Iterator[bytes]:
    """A file as its server sends it. What was handed on cannot be asked for again, so it is not."""
    fs, path = filesystem(url)
    with contextlib.closing(retry(url, fs.open, path, "rb", block_size=0)) as file:  # 0: fsspec's word for it
        while True:
            with remote_errors(url), Signals().untorn():
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
    # By file and number. Each use of it is one step, so that it needs no lock, which a fork could leave closed.
    _kept: ClassVar[OrderedDict[tuple[int, int], bytes]] = OrderedDict()

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
        for number in getattr(self, "_fetched", ()):  # an interrupt may have come before
            self._kept.pop((self._own, number), None)
