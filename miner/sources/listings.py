"""What is in remote tars, listed by several workers together: to list a tar is to read it through."""

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from miner.sources.archive import Member
from shards import format as fmt
from shards.checks import parse_json
from shards.errors import TicketSetError
from shards.signals import in_threads
from shards.store import REQUESTS_AT_ONCE, Conflict, Store, open_store

MAX_BYTES = 1 << 30  # of one tar's listing


@dataclass
class Listing:
    """The images of one tar.

    Attributes:
        images: where they lie.
        labels: of each, a number, a name, or none.
        notes: what was left out or mended: kind -> (how often, first example).
    """

    images: list[Member] = field(default_factory=list)
    labels: list[int | str | None] = field(default_factory=list)
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Names may hold bytes that are no UTF-8, as surrogates: so all of it is ASCII."""
        images = [[image.name, image.offset, image.size, image.odd] for image in self.images]
        return json.dumps({"images": images, "labels": self.labels, "notes": self.notes}).encode()

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Listing":
        """
        Raises:
            TicketSetError: it is no listing.
        """
        said = parse_json(data, where)
        try:
            images = [Member(name, 0, offset, size, _pieces(odd)) for name, offset, size, odd in said["images"]]
            notes = {kind: (count, first) for kind, (count, first) in said["notes"].items()}
            if len(images) != len(said["labels"]):
                raise ValueError
            return cls(images, said["labels"], notes)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise TicketSetError(f"{where}: expected the listing of a tar; remove it, and it is made again") from None


def _pieces(odd: Any) -> Any:
    return [tuple(piece) for piece in odd] if isinstance(odd, list) else odd


class SharedListings:
    """Listings in the folder of a ticket set, one object a tar: a worker that comes later, or again, reads those.

    Args:
        store: the folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def of(self, urls: Sequence[str], list_tar: Callable[[str], Listing]) -> list[Listing]:
        """The listings of tars; `list_tar` makes those that nobody has made yet.

        Raises:
            TicketSetError: a tar is not there or not readable, or the store fails.
        """
        places = dict(zip(urls, in_threads(_place, urls, REQUESTS_AT_ONCE), strict=True))
        there = self._store.entries(fmt.LISTINGS)
        todo = [url for url, place in places.items() if place.rpartition("/")[2] not in there]
        random.shuffle(todo)  # so that workers that begin at once share the tars
        for url in todo:
            if self._store.tag(places[url]) is None:
                with contextlib.suppress(Conflict):
                    self._store.put(places[url], list_tar(url).to_json(), expected=None)
        found = self._store.read_all(places.values(), MAX_BYTES)
        # A set that was finished meanwhile has no listings any more.
        return [
            list_tar(url) if data is None else Listing.parse(data, self._store.at(place))
            for (url, place), data in zip(places.items(), found, strict=True)
        ]


def _place(url: str) -> str:
    """Of a tar's listing: by its URL and its present content."""
    folder, _, name = url.rpartition("/")
    tag = open_store(folder).tag(name)
    return f"{fmt.LISTINGS}/{hashlib.sha256(f'{url} {tag}'.encode()).hexdigest()[:32]}.json"
