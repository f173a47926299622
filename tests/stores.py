"""A store in memory for tests: each of its operations is one step, which a test may hold, and its clock is the test's."""

import hashlib
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

from shards import storage
from shards.store import ANY, Entry, Store


class MemoryStore(Store):
    """Keeps conditions as object stores do.

    Args:
        folder: for what is spooled.
        hashed: a tag is a hash of the content, as S3's; else each put has its own, as in all other stores.

    Attributes:
        time: of its clock, seconds.
        step: called before every operation, with its name and the object's.
    """

    def __init__(self, folder: Path, hashed: bool = False) -> None:
        super().__init__("memory://set")
        self._folder, self._hashed, self._tags = folder, hashed, itertools.count()
        self.objects: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.times: dict[str, float] = {}
        self.time = 1e9
        self.step: Callable[[str, str], None] = lambda what, name: None

    def read(self, name: str, limit: int = storage.SMALL_FILE) -> bytes:
        self.step("read", name)
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    def tag(self, name: str) -> str | None:
        self.step("tag", name)
        return self.tags.get(name)

    def entries(self, folder: str = "") -> dict[str, Entry]:
        self.step("entries", folder)
        found = {}
        for name, data in self.objects.items():
            parent, _, last = name.rpartition("/")
            if parent == folder:
                found[last] = Entry(len(data), self.times[name])
        return found

    def _put(self, name: str, data: bytes | Path, expected: str | None) -> bool:
        self.step("put", name)
        if expected is not ANY and self.tags.get(name) != expected:
            return False
        self.objects[name] = content = _bytes(data)
        self.tags[name] = hashlib.md5(content).hexdigest() if self._hashed else str(next(self._tags))
        self.times[name] = self.time
        return True

    def _holds(self, name: str, data: bytes | Path) -> bool:
        self.step("read", name)
        return self.objects.get(name) == _bytes(data)

    def remove(self, names: Iterable[str]) -> None:
        for name in list(names):
            self.step("remove", name)
            for kept in (self.objects, self.tags, self.times):
                kept.pop(name, None)

    def read_all(self, names: Iterable[str], limit: int = storage.SMALL_FILE) -> list[bytes | None]:
        return [self.objects.get(name) for name in names if self.step("read", name) is None]

    def spool(self, name: str):
        return storage.temporary_file(self._folder / name.replace("/", "-"))

    def clock(self) -> Callable[[], float]:
        return lambda: self.time


def _bytes(data: bytes | Path) -> bytes:
    return data if isinstance(data, bytes) else data.read_bytes()
