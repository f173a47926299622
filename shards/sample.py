"""What a sample is on disk, its tar members and its row of the index: written and read here, and nowhere else.

    KEY.cls, KEY.jpg|png|webp   encode_image         label, width, height, source_*, orientation, transcoded
    KEY.ranking.npy, .views.npy encode_tickets       ticket
    KEY.labels.npy              encode_token_labels
    KEY.ranked.bin              encode_ranked

Each gives (members, columns of the row). A set may come from anywhere, so `decode` takes nothing on trust.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shards import format as fmt
from shards import images, ranked, token_labels
from shards.errors import ImageError, TicketSetError
from shards.images import StoredImage
from shards.ranked import Mosaic, Ranked, Statistics
from shards.schema import Manifest
from shards.tar import BLOCK

Encoded = tuple[dict[str, bytes], dict[str, Any]]  # members by name, columns of the row


class Row(NamedTuple):
    """What the index says of a sample: what its members are checked against, and where they are.

    Attributes:
        key: of the sample.
        label: class index; None where the image has none.
        height: of the image in the frame that boxes refer to, in pixels.
        width: as `height`.
        extents: offset and bytes in each tar that holds a part of it, as `TicketSet.joined` orders them.
    """

    key: str
    label: int | None
    height: int
    width: int
    extents: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its tickets.

    Attributes:
        key: of the sample.
        image: encoded, as stored; empty where there are ranked views instead.
        label: class index; None where the image has none.
        views: int32 [V, 5], columns top, left, height, width, flip.
        rankings: [V, N] patch indices, most informative first; [V, 0] where the set holds token labels alone.
        k: patches in a ticket.
        size: height and width of the image in the frame that boxes refer to.
        exif: "ignore" or "apply": which frame that is.
        token_labels: uint16 [2, T, G, G] as `shards.token_labels` says; None where neither set nor base has them.
        ranked: its views, patch by patch in the order of `rankings`, read when they are asked for; None where there is an
            image instead.
    """

    key: str
    image: bytes
    label: int | None
    views: np.ndarray
    rankings: np.ndarray
    k: int
    size: tuple[int, int]
    exif: str
    token_labels: np.ndarray | None = None
    ranked: Ranked | None = None

    @property
    def tickets(self) -> np.ndarray:
        """[V, K]: the first K of each ranking."""
        return self.rankings[:, : self.k]

    def pixels(self) -> np.ndarray:
        """The decoded image, uint8 [H, W, 3], in the frame that boxes refer to.

        Raises:
            ImageError: it cannot be decoded, or is not of the size that the index says.
            TicketSetError: the set holds ranked views, and no image.
        """
        if self.ranked is not None:
            raise TicketSetError(
                f"{self.key}: expected an image, got a sample of ranked views, which are all that is kept of it"
            )
        pixels = images.decode(self.image, self.exif)
        if pixels.shape[:2] != self.size:
            (height, width), found = self.size, pixels.shape
            raise ImageError(f"{self.key}: expected an image of {width}x{height} pixels, got {found[1]}x{found[0]}")
        return pixels

    def render(self, views: int | Sequence[int], size: int) -> np.ndarray:
        """The pixels of stored views, as the selector saw them and a student is fed them.

        Args:
            views: number of a view, or several numbers, which then share one decode.
            size: S, pixels of a side.
        Returns:
            uint8 [S, S, 3], or [n, S, S, 3] of n numbers.
        Raises:
            ImageError: as `pixels`.
            TicketSetError: a ranked view that is damaged, or of which only the best patches are stored.
        """
        numbers = np.atleast_1d(views)
        if self.ranked is None:
            rendered = images.render_pixels(self.pixels(), self.views[numbers], size)
        elif self.ranked.mosaic.tokens < self.rankings.shape[1]:
            raise TicketSetError(
                f"{self.key}: expected whole views, got the best {self.ranked.mosaic.tokens} of {self.rankings.shape[1]}"
                f" patches of each"
            )
        else:  # of another size than the set's they are resized a second time
            stored = np.stack([self.ranked.view(int(number), self.rankings[number]) for number in numbers])
            rendered = images.resize_views(stored, size)
        return rendered[0] if np.ndim(views) == 0 else rendered


def encode_image(label: int | None, stored: StoredImage, inside: bool) -> Encoded:
    """Label and image.

    Args:
        label: class index; None where the image has none.
        stored: what a set stores of the image.
        inside: whether the set holds images; a linked one leaves them to its base.
    """
    members = {} if label is None else {fmt.LABEL: _digits(label)}
    if inside:
        members[stored.member] = stored.data
    columns = ("width", "height", "source_width", "source_height", "orientation", "transcoded")
    return members, {"label": label} | {column: getattr(stored, column) for column in columns}


def encode_tickets(views: np.ndarray, rankings: np.ndarray, k: int) -> Encoded:
    """Views and their rankings; the row holds view 0's ticket.

    Args:
        views: int32 [V, 5].
        rankings: [V, N], most informative patch first.
        k: patches in a ticket.
    """
    n = rankings.shape[1]
    small = rankings.astype(fmt.ranking_dtype(n), copy=False)
    members = {fmt.RANKING: fmt.encode_npy(small), fmt.VIEWS: fmt.encode_npy(views)}
    return members, {"ticket": fmt.pack_ticket(rankings[0, :k], n)}


def encode_ranked(
    views: np.ndarray, rankings: np.ndarray, mosaic: Mosaic, quality: int, known: list[Statistics] | None = None
) -> Encoded:
    """Ranked views instead of an image; see `shards.ranked.encode`."""
    return {fmt.RANKED: ranked.encode(views, rankings, mosaic, quality, known)}, {}


def bytes_before_views(manifest: Manifest, split: str, labeled: bool) -> int:
    """Bytes of a sample of ranked views up to the first view: all but the views themselves."""
    count = manifest.splits[split].views
    sizes = [1] if labeled else []
    array = 128  # of a .npy header
    sizes += [array + count * manifest.num_patches * fmt.ranking_dtype(manifest.num_patches).itemsize]
    sizes += [array + count * 4 * len(fmt.VIEW_COLUMNS)]
    if manifest.token_labels:
        shape = token_labels.shape(len(manifest.classes), manifest.token_labels.grid[0])
        sizes += [array + 2 * math.prod(shape)]
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes) + BLOCK + count * Mosaic.of(manifest).entry.itemsize


def encode_token_labels(probabilities: np.ndarray, classes: np.ndarray) -> Encoded:
    """Token labels, from float and int [T, G, G], likeliest first."""
    return {fmt.TOKEN_LABELS: token_labels.encode(probabilities, classes)}, {}


def decode(
    row: Row,
    manifest: Manifest,
    split: str,
    members: dict[str, bytes],
    pictured: dict[str, bytes] | None,
    labels: np.ndarray | None,
    where: str,
    views_in_order: Ranked | None = None,
    numbers: Sequence[int] | None = None,
) -> Sample:
    """A sample from its members.

    Args:
        row: what the index says of it.
        manifest: of its set.
        split: of the set.
        members: of its own tar.
        pictured: of the tar that holds its image; None where a linked set was opened without images.
        labels: its token labels, by `decode_token_labels`.
        where: for errors.
        views_in_order: its ranked views, in a set of those.
        numbers: of the views whose boxes and rankings are checked; None: all.
    Raises:
        TicketSetError: a member is missing, or is not what manifest and index say: rankings that are no
            permutations, boxes outside the image, another label.
    """
    image = (
        b""
        if pictured is None or manifest.ranked
        else next((pictured[m] for m in fmt.IMAGE_MEMBERS if m in pictured), None)
    )
    # A set of token labels alone has no boxes of its own: those of its base are the same.
    boxes = (members if manifest.k or pictured is None else pictured).get(fmt.VIEWS)
    ranking = members.get(fmt.RANKING) if manifest.k else b""
    if image is None or boxes is None or ranking is None:
        found = sorted({*members, *(pictured or ())})
        raise TicketSetError(f"{where}: expected an image, a ranking and views, got {found}")
    expected = None if row.label is None else _digits(row.label)
    if (digits := members.get(fmt.LABEL)) != expected:
        raise TicketSetError(f"{where}: expected label {row.label} (index) in .cls, got {digits and digits[:20]!r}")
    count = manifest.splits[split].views
    views = fmt.decode_npy(boxes, where)
    _check_views(views, count, row, where, numbers)
    if ranking:
        rankings = fmt.decode_npy(ranking, where)
        _check_rankings(rankings, count, manifest.num_patches, where, numbers)
    else:
        rankings = np.empty((count, 0), np.uint8)
    size = (row.height, row.width)
    return Sample(row.key, image, row.label, views, rankings, manifest.k, size, manifest.exif, labels, views_in_order)


def decode_token_labels(manifest: Manifest, members: dict[str, bytes], where: str) -> np.ndarray:
    """uint16 [2, T, G, G] among the members of a sample.

    Args:
        manifest: of the set that holds them.
        members: of its tar.
        where: for errors.
    Raises:
        TicketSetError: the member is missing, or is not what the manifest says.
    """
    assert manifest.token_labels is not None
    if fmt.TOKEN_LABELS not in members:
        raise TicketSetError(f"{where}: expected token labels, got {sorted(members)}")
    num_classes = len(manifest.classes)
    shape = token_labels.shape(num_classes, manifest.token_labels.grid[0])
    return token_labels.decode(members[fmt.TOKEN_LABELS], shape, num_classes, where)


def _digits(label: int) -> bytes:
    return str(label).encode("ascii")


def _check_views(views: np.ndarray, count: int, row: Row, where: str, numbers: Sequence[int] | None) -> None:
    if views.dtype != np.int32 or views.shape != (count, len(fmt.VIEW_COLUMNS)):
        raise TicketSetError(
            f"{where}: expected int32 boxes of {count} views, got {views.dtype} of shape {list(views.shape)}"
        )
    for number in range(count) if numbers is None else numbers:  # faster than numpy on so few numbers
        top, left, height, width, flip = views[number].tolist()
        inside = 0 <= top <= row.height - height and 0 <= left <= row.width - width
        if not (inside and height > 0 and width > 0 and 0 <= flip <= 1):
            raise TicketSetError(f"{where}: view {number} is not inside the {row.width}x{row.height} image")


def _check_rankings(
    rankings: np.ndarray, count: int, num_patches: int, where: str, numbers: Sequence[int] | None
) -> None:
    expected = fmt.ranking_dtype(num_patches)
    if rankings.dtype != expected or rankings.shape != (count, num_patches):
        raise TicketSetError(
            f"{where}: expected {expected} rankings of {count} views and {num_patches} patches, got {rankings.dtype}"
            f" {list(rankings.shape)}"
        )
    if numbers is not None:
        rankings = rankings[list(numbers)]
    # "stable" is a radix sort here. Bytes are compared, which takes a fifth of what numpy takes to compare so few numbers.
    if np.sort(rankings, kind="stable").tobytes() != _sorted_rankings(len(rankings), num_patches):
        raise TicketSetError(f"{where}: expected rankings that are permutations of {num_patches} patches")


@functools.lru_cache(maxsize=8)
def _sorted_rankings(count: int, num_patches: int) -> bytes:
    return np.arange(num_patches, dtype=fmt.ranking_dtype(num_patches)).tobytes() * count
