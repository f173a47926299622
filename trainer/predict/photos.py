"""Photos as a person names them, files and folders -> paths in order, and what of the folders is left out."""

import os
from collections import Counter
from collections.abc import Sequence

from miner.sources.folder import ending, files_below, other_files
from miner.sources.source import Tally, is_image, open_plain, spelled
from miner.sources.tree import LocalTree
from shards.errors import TicketSetError
from shards.keys import natural_sorted


def list_photos(places: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of photos, and notes on what is left out. Folders are walked by the rules of mining.

    Args:
        places: files, of whatever ending, and folders.
    Returns:
        In the order of `places`, those of a folder in natural order, each once; bytes that are no UTF-8 are surrogates.
    Raises:
        TicketSetError: nothing is there, a folder cannot be listed, or holds no image.
    """
    tally, notes, photos = Tally(), list[str](), list[str]()
    for place in places:
        path = os.fsencode(place).decode("utf-8", "surrogateescape")
        if os.path.isdir(place):
            photos += _photos_in(path, tally, notes)
        elif os.path.exists(place):
            photos.append(path)
        else:
            raise TicketSetError(f"{spelled(path)}: expected a photo or a folder of photos, found none")
    return list(dict.fromkeys(photos)), [*notes, *tally.notes()]


def read_photo(path: str) -> bytes:
    """The bytes of one of `list_photos`.

    Raises:
        OSError: it cannot be read, or is a FIFO, a socket or a device.
        ImageError: it has more bytes than any photo.
    """
    with open_plain(path.encode("utf-8", "surrogateescape"), image=True) as file:
        return file.read()


def _photos_in(folder: str, tally: Tally, notes: list[str]) -> list[str]:
    found: list[str] = []
    others: Counter[str] = Counter()
    for path, _ in files_below(LocalTree(os.fspath(folder)), "", "", tally):
        if is_image(path):
            found.append(os.path.join(folder, path))
        else:
            others[ending(path)] += 1
    if others:
        notes.append(other_files(spelled(folder), others))
    if not found:
        why = "; ".join([*notes, *tally.notes()])
        raise TicketSetError(f"{spelled(folder)}: expected photos, found none{why and f' ({why})'}")
    return natural_sorted(found)
