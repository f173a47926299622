"""Permutations that depend on nothing but their name: of inputs over shards, of an epoch's images, of random tickets."""

import hashlib
import threading

import numpy as np


class _Own(threading.local):
    """A generator of this thread's own."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)


_own = _Own()


def permutation(count: int, *name: object) -> np.ndarray:
    """int64 [count], a permutation of 0 .. count - 1: a stable sort leaves nothing to chance where two words are equal.

    Args:
        name: the parts of its name, joined by slashes.
    """
    return random_words(count, *name).argsort(kind="stable")


def random_words(count: int, *name: object) -> np.ndarray:
    """uint64 [count]: raw Philox words are numpy's fixed stream, so that no version of numpy can change it.

    Args:
        name: the parts of its name, joined by slashes.
    """
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
    # As np.random.Philox(key=digest as a number) would begin, in a third of the time that making one takes.
    _own.philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.zeros(4, np.uint64), "key": np.frombuffer(digest, "<u8")},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    words: np.ndarray = _own.philox.random_raw(count)
    return words
