"""Rankings of the views by a selector: the members ranking.npy and views.npy."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from miner import models
from miner.drop import DEFAULT_KEEP_RATE, PAPER_STAGES, default_blocks, keep_counts, keep_counts_for
from miner.producers.producer import Image, Item, Normalize
from miner.selectors import BLIND, MODEL_FREE, Selector, create_selector, find_method, needs_model
from miner.settings import DEFAULT_SELECTOR, Geometry, Machine, Selection
from shards import format as fmt
from shards import spread
from shards.errors import TicketSetError
from shards.sample import Encoded, encode_tickets
from shards.schema import SelectorIdentity
from shards.views import view_seed


class Answer(NamedTuple):
    """Of one view: its ranking [N], how its scores are spread [7], and of view 0 the scores [N]."""

    ranking: np.ndarray
    spread: np.ndarray
    scores: np.ndarray | None


class Rankings:
    """Producer of rankings; see `Producer`.

    Args:
        selector: ranks.
        identity: of `describe`.
        batch_size: views.
        seed: of the set, for methods that draw.
    """

    name, whole = "selector", False

    def __init__(self, selector: Selector, identity: SelectorIdentity, batch_size: int, seed: int) -> None:
        self.identity, self.batch_size, self.size = identity, batch_size, identity.input_size
        self._selector, self._seed = selector, seed
        self._normalize = Normalize(identity.mean, identity.std, selector.device)

    def submit(self, batch: list[Item]) -> tuple[Tensor, ...]:
        """Rankings int32 [B, N] and scores float32 [B, N]."""
        seeds = [view_seed(self._seed, image.row["key"], number) for image, number in batch]
        rankings, scores = self._selector.rank_and_score(self._shown(batch), seeds)
        return rankings.to(torch.int32), scores.float()

    def _shown(self, batch: list[Item]) -> Tensor | None:
        """What the method looks at."""
        return None if self.size is None else self._normalize(self.name, batch)

    def collect(self, batch: list[Item], results: list[np.ndarray]) -> list[Answer]:
        """An `Answer` of every view.

        Raises:
            TicketSetError: a ranking that is no permutation, a score that is no number.
        """
        rankings, scores = results
        expected, method = (len(batch), self._selector.num_patches), self._selector.method
        count, n = expected
        if rankings.shape != expected or not (np.sort(rankings, axis=1) == np.arange(n)).all():
            raise TicketSetError(
                f"`method` {method}: expected a permutation of {n} patches for each of {count} views,"
                f" got rankings of shape {list(rankings.shape)} that are none"
            )
        if scores.shape != expected or not np.isfinite(scores).all():
            raise TicketSetError(
                f"`method` {method}: expected finite scores of shape [{count}, {n}], got {list(scores.shape)} with"
                f" {int((~np.isfinite(scores)).sum())} not finite; are the selector's weights sound?"
            )
        small = rankings.astype(fmt.ranking_dtype(n))
        return [
            Answer(ranking, counts, score.copy() if number == 0 else None)
            for (_, number), ranking, counts, score in zip(batch, small, spread.spread_of(scores), scores, strict=True)
        ]

    def encode(self, image: Image, answers: list[Answer]) -> Encoded:
        """All views' rankings and boxes; for the row view 0's ticket, and what scores say."""
        first, _, scores = answers[0]
        assert scores is not None
        rankings, k = image.rankings(), self._selector.k
        members, columns = encode_tickets(image.views, rankings, k)
        counts = spread.encode(np.stack([answer.spread for answer in answers]), rankings.shape[1])
        said = {"mean_score": float(scores[first[:k]].mean()), "entropy": entropy_bits(scores), "spread": counts}
        return members, columns | said


def entropy_bits(scores: np.ndarray) -> float | None:
    """Entropy of the scores as a distribution over patches; None where they are none (`center`)."""
    if scores.min() < 0 or scores.sum() == 0:
        return None
    share = scores[scores > 0] / scores.sum()
    return float(-(share * np.log2(share)).sum())


def build_rankings(
    selection: Selection, geometry: Geometry, machine: Machine, device: torch.device, batch_size: int
) -> Rankings:
    """A producer by the settings, its model loaded.

    Raises:
        TicketSetError: no such method or model, or they do not fit the settings.
    """
    grid, method = geometry.grid, selection.method
    name = selection.selector or DEFAULT_SELECTOR
    model = models.build_vit(name, grid, selection.weights) if uses_model(selection) else None
    state = models.state_hash(model) if model else None  # before it is on the device, where it costs more
    blocks = selection.drop_blocks
    if method == "evit" and model and blocks is None:
        blocks = default_blocks(len(model.blocks))
    stages = len(blocks) if method == "evit" and blocks else PAPER_STAGES
    counts = counts_of(selection, grid, stages)
    selector = create_selector(method, model, grid, counts, blocks, device, machine.amp, machine.torchcompile)
    identity = describe(selector, selection, geometry, machine, state)
    return Rankings(selector, identity, batch_size, geometry.seed)


def describe(
    selector: Selector, selection: Selection, geometry: Geometry, machine: Machine, state: str | None
) -> SelectorIdentity:
    """What the plan says of a selector and of what it looks at.

    Args:
        state: hash of its model's weights, or of what else it reads.
    """
    model, method, blind = selector.model, selector.method, selector.method in BLIND
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if model:
        (mean, std), size = models.mean_and_std(model), geometry.grid[0] * models.square_patch(model)
    elif blind:
        mean, std, size = (), (), None
    else:  # entropy, and a user's method without a model, see the view as the student does, in [0, 1]
        mean, std, size = (0.0,) * 3, (1.0,) * 3, geometry.img_size
    return SelectorIdentity(
        method=method,
        model=models.timm_name(selection.selector or DEFAULT_SELECTOR) if model else None,
        state=state,
        keep_rate=None if selection.tokens else _keep_rate(selection),
        counts=selector.counts,
        blocks=selector.blocks,
        input_size=size,
        mean=mean,
        std=std,
        dtype="bfloat16" if machine.amp and method not in MODEL_FREE else "float32",
        compiled=machine.torchcompile,
        # Another version of a user's own method is another plan.
        code=source_hash(find_method(method)) if ":" in method else None,
    )


def uses_model(selection: Selection) -> bool:
    """Whether the selector's model is to be loaded: the method needs one, or one was asked for that it may use.

    Raises:
        TicketSetError: there is no such method.
    """
    asked = (selection.selector or selection.weights) and selection.method not in MODEL_FREE
    return needs_model(selection.method) or bool(asked)


def source_hash(function: Callable[..., Any]) -> str:
    """sha256 of the file that a user's method is in.

    Raises:
        TicketSetError: it is in none.
    """
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (TypeError, OSError):
        raise TicketSetError(f"`method`: expected a function in a Python file, got {function!r}") from None


def _keep_rate(selection: Selection) -> float:
    return DEFAULT_KEEP_RATE if selection.keep_rate is None else selection.keep_rate


def counts_of(selection: Selection, grid: tuple[int, int], stages: int = PAPER_STAGES) -> tuple[int, ...]:
    """Patches left after each stage; the last is K.

    Raises:
        TicketSetError: no such number of patches, or no keep rate.
    """
    num_patches = grid[0] * grid[1]
    try:
        if selection.tokens:
            return keep_counts_for(num_patches, selection.tokens, stages)
        return keep_counts(num_patches, _keep_rate(selection), stages)
    except ValueError as error:
        raise TicketSetError(f"`{'tokens' if selection.tokens else 'keep_rate'}`: {error}") from None
