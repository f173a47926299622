"""Folders of images as a source sees them: on a disk, or in an object store, which has names with slashes alone.

Names are what the bytes on the disk spell in UTF-8, whatever the locale would make of them. Paths are below the root.
"""

import functools
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from miner.sources.source import MAX_IMAGE_BYTES, Tally, check_size, open_plain, spelled
from shards import remote, remote_file, storage
from shards.errors import TicketSetError, first_line

NAMELESS = "{count} objects are left out: a folder in their names is called nothing, // (first: {first})"


class Item(Protocol):
    """What is in a folder.

    Attributes:
        is_folder: or leads to one.
        is_link: leads to a file or folder elsewhere.
        size: bytes of a file; -1 for a dangling link or a FIFO: it becomes a failed row when it is read.
    """

    @property
    def is_folder(self) -> bool: ...
    @property
    def is_link(self) -> bool: ...
    @property
    def size(self) -> int: ...


class Tree(Protocol):
    """A folder and all below it.

    Attributes:
        root: its path or URL.
        read: (path of an image, bytes that it had when it was listed) -> its bytes. It can be pickled, without the tree.
    """

    root: str
    read: Callable[[str, int], bytes]

    def scan(self, path: str = "") -> Iterator[tuple[str, Item]]:
        """(name, item) of all that is in a folder, in no order.

        Raises:
            TicketSetError: it cannot be listed, or a link in it that may be a folder's leads nowhere: nobody knows how
                many images are missing then.
        """

    def number(self, path: str) -> object:
        """What tells one folder from another, under whatever name.

        Raises:
            TicketSetError: it is not there any more, or closed to us.
        """

    def leads_up(self, path: str, inside: str) -> bool:
        """Whether a path is a link to a folder that it is in itself, or that `inside` is in, which would go on for ever."""


def join(folder: str, name: str) -> str:
    """A path below the root; either may be empty."""
    return f"{folder}/{name}" if folder and name else folder or name


class LocalTree:
    """See `Tree`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.read: Callable[[str, int], bytes] = functools.partial(_read_local, root)
        self._above = functools.cache(self._folders_above)

    def scan(self, path: str = "") -> Iterator[tuple[str, Item]]:
        """See `Tree`; in the file system's order."""
        try:
            with os.scandir(_on_disk(self.root, path)) as entries:
                for entry in entries:
                    name = entry.name.decode("utf-8", "surrogateescape")
                    if entry.is_symlink() and "." not in name and not os.path.exists(entry.path):
                        place = spelled(os.path.join(self.root, path, name))
                        raise TicketSetError(
                            f"{place}: a link that leads nowhere, maybe to a folder; mend it, or remove it"
                        )
                    yield name, _LocalItem(entry)
        except OSError as error:
            raise self._closed(path, error) from None

    def number(self, path: str) -> object:
        """See `Tree`."""
        try:
            status = os.stat(_on_disk(self.root, path))
        except OSError as error:
            raise self._closed(path, error) from None
        return status.st_dev, status.st_ino

    def leads_up(self, path: str, inside: str) -> bool:
        """See `Tree`."""
        place = _on_disk(self.root, path)
        if not os.path.islink(place):
            return False
        target, folder = os.path.realpath(place), os.path.realpath(os.path.dirname(place))
        return target in self._above(inside) or os.path.commonpath([target, folder]) == target

    def _folders_above(self, inside: str) -> set[bytes]:
        """Real paths of the root, of `inside`, and of all that they are in."""
        above = set()
        for path in {os.path.realpath(_on_disk(self.root, path)) for path in ("", inside)}:
            while path not in above:
                above.add(path)
                path = os.path.dirname(path)
        return above

    def _closed(self, path: str, error: OSError) -> TicketSetError:
        place = spelled(os.path.join(self.root, path))
        return TicketSetError(f"{place}: cannot be listed: {error.strerror}; mend it, or move it away")


class _LocalItem:
    __slots__ = ("_entry",)

    def __init__(self, entry: "os.DirEntry[bytes]") -> None:
        self._entry = entry

    @property
    def is_folder(self) -> bool:
        try:
            return self._entry.is_dir()
        except OSError:  # a link that leads to itself, or to where we may not look
            return False

    @property
    def is_link(self) -> bool:
        return self._entry.is_symlink()

    @property
    def size(self) -> int:
        try:
            status = self._entry.stat()
        except OSError:
            return -1
        return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _on_disk(root: str, path: str) -> bytes:
    return os.path.join(os.fsencode(root), path.encode("utf-8", "surrogateescape"))


def _read_local(root: str, path: str, size: int) -> bytes:
    with open_plain(_on_disk(root, path), image=True) as file:
        return file.read()


class RemoteTree:
    """See `Tree`. All of it is listed at once, since a store lists by thousands of names whatever their folders.

    Raises:
        TicketSetError: it cannot be listed.
    """

    def __init__(self, url: str, tally: Tally) -> None:
        self.root = url
        self.read: Callable[[str, int], bytes] = functools.partial(_read_remote, url)
        self._folders: dict[str, dict[str, Item]] = {"": {}}
        fs, top = remote.filesystem(url)
        try:
            found = remote.retry(url, fs.find, top, detail=True)
        except FileNotFoundError as error:  # not even its bucket is there
            raise TicketSetError(f"{url}: cannot be listed: {first_line(error)}") from None
        for name, info in found.items():
            path = name.removeprefix(top.rstrip("/")).removeprefix("/")
            folder, _, own = path.rpartition("/")
            if folder and "" in folder.split("/"):
                tally.add(NAMELESS, spelled(path))
            elif own:
                size = info.get("size")
                # Where a folder has the same name, the folder counts.
                self._folder(folder).setdefault(own, _RemoteItem(size=-1 if size is None else size))
            else:
                self._folder(folder)  # some tools put an empty object in place of a folder

    def scan(self, path: str = "") -> Iterator[tuple[str, Item]]:
        """See `Tree`."""
        yield from self._folders[path].items()

    def number(self, path: str) -> object:
        """See `Tree`."""
        return path

    def leads_up(self, path: str, inside: str) -> bool:
        """See `Tree`: a store has no links."""
        return False

    def _folder(self, path: str) -> dict[str, Item]:
        if path not in self._folders:
            above, _, name = path.rpartition("/")
            self._folder(above)[name] = _RemoteItem(is_folder=True)
            self._folders[path] = {}
        return self._folders[path]


class _RemoteItem(NamedTuple):
    size: int = -1
    is_folder: bool = False
    is_link: bool = False


def _read_remote(url: str, path: str, size: int) -> bytes:
    check_size(size)
    where = storage.join(url, path)
    if size > 0 and remote.is_object_store(where):
        data = remote_file.read_start(where, size + 1)
        if len(data) == size:  # else it has changed
            return data
    return storage.read_bytes(where, MAX_IMAGE_BYTES)
