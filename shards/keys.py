"""Keys: the name of a sample, safe as a tar member and equal on every machine.

A key is the input's relative path without its extension, with every byte outside [A-Za-z0-9_/-]
written %XX: WebDataset cuts a member's name at the first dot of its basename, so `img.1` and
`img.2` would silently become one sample.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# <key>.ranking.npy then has at most 100 bytes, what a plain tar header holds. Longer names would
# cost two more blocks each.
MAX_KEY_BYTES = 88
KEY_PATTERN = r"^[A-Za-z0-9_/%-]{1,88}$"  # what `unique_keys` makes; keys that are read must match it

_UNSAFE = re.compile(rb"[^A-Za-z0-9_/-]")
_DIGITS = re.compile(r"(\d+)")


def key_of(path: str) -> str:
    """The key of one relative path, before equal keys are told apart by `unique_keys`."""
    folder, _, name = path.removeprefix("./").strip("/").rpartition("/")
    stem = name.rsplit(".", 1)[0] or name
    return _shorten(_quote(f"{folder}/{stem}" if folder else stem))


def natural_order(text: str) -> list[tuple[int, str, str]]:
    """Sort key under which img2 comes before img10."""
    parts = _DIGITS.split(text)
    return [(*_magnitude(part), part) if i % 2 else (0, "", part) for i, part in enumerate(parts)]


def _magnitude(digits: str) -> tuple[int, str]:
    """What orders digits as their numbers do, without int(), which refuses more than 4300 of them."""
    if not digits.isascii():
        digits = "".join(str(unicodedata.decimal(c)) for c in digits)
    digits = digits.lstrip("0")
    return len(digits), digits


def unique_keys(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Keys for paths given in natural order.

    Returns:
        One key a path, and the paths whose key was taken and got -1, -2, ... at its end.
    """
    taken: set[str] = set()
    keys, renamed = [], []
    counts: dict[str, int] = {}
    plain = {key_of(path) for path in paths}
    for path in paths:
        first = key = key_of(path)
        while key in taken or (key != first and key in plain):
            counts[first] = counts.get(first, 0) + 1
            key = _shorten(f"{first}-{counts[first]}")
        if key != first:
            renamed.append(path)
        taken.add(key)
        keys.append(key)
    return keys, renamed


def natural_sorted(paths: Iterable[str]) -> list[str]:
    """Paths in natural order; equal ones by their plain spelling."""
    return sorted(paths, key=lambda path: (natural_order(path), path))


def _quote(path: str) -> str:
    return _UNSAFE.sub(lambda m: b"%%%02X" % m.group()[0], path.encode("utf-8", "surrogateescape")).decode("ascii")


def _shorten(key: str) -> str:
    """Keys over the limit keep their head and end in a hash of the whole."""
    if len(key) <= MAX_KEY_BYTES:
        return key
    tail = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return re.sub(r"%[0-9A-F]?$", "", key[: MAX_KEY_BYTES - 17]) + "-" + tail
