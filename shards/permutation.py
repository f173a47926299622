"""Permutations that depend on nothing but their name: of inputs over shards, of an epoch's images, of random tickets."""

import hashlib

import numpy as np


def permutation(count: int, *name: object) -> np.ndarray:
    """int64 [count], a permutation of 0 .. count - 1.

    Raw Philox words are numpy's fixed stream, so that no version of numpy can change it; a stable sort leaves nothing to
    chance where two words are equal.

    Args:
        name: the parts of its name, joined by slashes.
    """
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(words, kind="stable")
