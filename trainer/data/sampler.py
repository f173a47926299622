"""The order of an epoch: which view of which image stands where. Pure functions of (seed, epoch) on integers.

An image is a pair (shard, row). Shards are permuted, taken in windows of 16, and the images of a window are
permuted: classes mix, and a remote shard is read once. With R repeats (DeiT's repeated augmentation) an
epoch visits 1/R of the images with R views each, and R epochs, a cycle, visit every image once.
"""

import functools

import numpy as np

from shards.permutation import permutation

WINDOW = 16  # shards whose images are mixed


@functools.lru_cache(maxsize=2)
def cycle_images(seed: int, cycle: int, shard_sizes: tuple[int, ...]) -> np.ndarray:
    """Every image once: int64 [images, 2], (shard, row)."""
    shards = permutation(len(shard_sizes), "shards", seed, cycle)
    windows = []
    for start in range(0, len(shards), WINDOW):
        of_window = [
            np.stack([np.full(shard_sizes[s], s), np.arange(shard_sizes[s])], 1) for s in shards[start : start + WINDOW]
        ]
        images = np.concatenate(of_window)
        windows.append(images[permutation(len(images), "window", seed, cycle, start)])
    return np.concatenate(windows)


@functools.lru_cache(maxsize=2)
def epoch_samples(seed: int, epoch: int, shard_sizes: tuple[int, ...], repeats: int = 1) -> np.ndarray:
    """The samples of an epoch in order: int64 [about as many as images, 3], (shard, row, visit).

    `visit` counts an image's views since the first epoch: R a cycle. A sample and its neighbor (2i, 2i + 1)
    are of different images, so that they can be mixed; the R views of an image lie within 2 R**2 samples.
    """
    cycle, part = divmod(epoch, repeats)
    images = cycle_images(seed, cycle, shard_sizes)
    total = len(images)
    mine = images[part * total // repeats : (part + 1) * total // repeats]
    group = 2 * repeats
    rounds = [(i, repeats + (i + j) % repeats, j) for j in range(repeats) for i in range(repeats)]
    pattern = np.array([(image, j) for a, b, j in rounds for image in (a, b)])  # [2 R**2, 2]
    whole = len(mine) // group * group
    if repeats > 1 and len(mine) - whole == 1 and whole:
        whole -= group  # one image alone would be its own neighbor
    body = mine[:whole].reshape(-1, group, 2)[:, pattern[:, 0]]  # [groups, 2 R**2, 2]
    visits = np.broadcast_to(pattern[:, 1], body.shape[:2])
    rest = np.tile(mine[whole:], (repeats, 1))
    rest_visits = np.repeat(np.arange(repeats), len(mine) - whole)
    samples = np.concatenate([body.reshape(-1, 2), rest])
    replicate = np.concatenate([visits.reshape(-1), rest_visits])
    return np.column_stack([samples, cycle * repeats + replicate])


def batch_positions(step: int, micro: int, batch_size: int, global_batch: int, samples: int) -> np.ndarray:
    """Positions in the epoch of one micro-batch, [batch_size]; past the end they begin anew."""
    start = step * global_batch + micro * batch_size
    return np.arange(start, start + batch_size) % samples


@functools.lru_cache(maxsize=2)
def views_of_turn(seed: int, turn: int, shard_sizes: tuple[int, ...], views: int) -> np.ndarray:
    """The views that all images show in their `turn`-th V - 1 visits, as `view_of_visit` says: uint16 [images, V - 1]."""
    places = [(shard, row) for shard, count in enumerate(shard_sizes) for row in range(count)]
    orders = [permutation(views - 1, "views", seed, *place, turn) for place in places]
    return 1 + np.array(orders, np.uint16)


def views_of(seed: int, samples: np.ndarray, shard_sizes: tuple[int, ...], views: int) -> np.ndarray:
    """Of all samples of an epoch the view, by `view_of_visit`, and the image in stored order: int64 [2, n]."""
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    images = starts[samples[:, 0]] + samples[:, 1]
    if views == 1:
        return np.stack([np.zeros_like(images), images])
    turns, places = np.divmod(samples[:, 2], views - 1)
    shown = np.empty_like(images)
    for turn in np.unique(turns).tolist():
        mine = turns == turn
        shown[mine] = views_of_turn(seed, turn, shard_sizes, views)[images[mine], places[mine]]
    return np.stack([shown, images])


def view_of_visit(seed: int, shard: int, row: int, visit: int, views: int) -> int:
    """Which stored view an image shows at its visit: each of 1..V-1 once, in a new order, before any repeats.

    View 0 is kept for validation, and shown in training only where there is no other.
    """
    count = views - 1
    if count == 0:
        return 0
    turn, place = divmod(visit, count)
    return 1 + int(permutation(count, "views", seed, shard, row, turn)[place])
