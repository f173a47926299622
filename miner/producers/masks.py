"""Rankings by true masks, the oracle of studies: what a selector would know that finds the object each time."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miner.producers.producer import Image, Item
from miner.producers.rankings import Rankings, counts_of, describe
from miner.selectors import create_selector
from miner.settings import Geometry, Machine, Selection
from miner.sources.folder import files_below
from miner.sources.source import Tally
from miner.sources.tree import LocalTree
from shards.errors import ImageError, TicketSetError
from shards.masks import mask_path, object_shares


class MaskRankings(Rankings):
    """Producer of rankings by the share of each patch that lies on the object; see `Producer`.

    Args:
        folder: of the masks.
        others: as `Rankings`.
    """

    def __init__(self, folder: str, *others: Any) -> None:
        super().__init__(*others)
        self._folder = folder

    def look(self, image: Image) -> np.ndarray:
        """The shares of an image that was read, float32 [V, N]: what `submit` wants as its inputs.

        Raises:
            ImageError: it has no mask, or one that is none of it.
        """
        source = image.row["source"]
        path = mask_path(self._folder, source)
        if path is None:
            raise ImageError(f"has no mask: expected a PNG of its name in {self._folder}")
        return object_shares(path, (image.stored.width, image.stored.height), image.views, self._selector.grid)

    def _shown(self, batch: list[Item]) -> Tensor:
        return torch.from_numpy(np.stack([image.inputs[self.name][number] for image, number in batch]))


def build_mask_rankings(
    selection: Selection, geometry: Geometry, machine: Machine, device: torch.device, batch_size: int
) -> MaskRankings:
    """A producer by the settings.

    Raises:
        TicketSetError: a folder without masks, or settings that do not fit.
    """
    assert selection.masks is not None
    state = listing_hash(selection.masks)
    selector = create_selector(selection.method, None, geometry.grid, counts_of(selection, geometry.grid))
    identity = describe(selector, selection, geometry, machine, state)
    return MaskRankings(selection.masks, selector, identity, batch_size, geometry.seed)


def listing_hash(folder: str) -> str:
    """sha256 of the names and sizes of a folder's PNGs: what the plan says of the masks, as it does of the images.

    Raises:
        TicketSetError: there is none, or it cannot be listed.
    """
    if not Path(folder).is_dir():
        raise TicketSetError(f"`masks` {folder}: no such folder")
    files = files_below(LocalTree(folder), "", "", Tally())
    found = sorted(f"{path} {item.size}\n" for path, item in files if path.endswith(".png"))
    if not found:
        raise TicketSetError(f"`masks` {folder}: expected PNGs, one an image, got none")
    sha = hashlib.sha256()
    for line in found:
        sha.update(line.encode("utf-8", "surrogateescape"))
    return sha.hexdigest()
