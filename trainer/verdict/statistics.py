"""95 % intervals: over seeds with a pooled standard deviation, or over images where there is one seed; the decision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.95
DRAWS = 10_000
Outcome = Literal["holds", "fails", "open"]


@dataclass(frozen=True)
class Estimate:
    """A figure in points and its interval; no bounds where nothing tells how far it can be trusted."""

    value: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Spread:
    """Standard deviation of one run, in points, and its degrees of freedom; df 0: unknown."""

    sd: float
    df: int

    def half(self, *counts: int, level: float = LEVEL) -> float | None:
        """Half the interval of a mean of n runs, or of sums and differences of means of n1, n2, ..."""
        if not self.df:
            return None
        return t_quantile(self.df, level) * self.sd * float(sum(1 / n for n in counts)) ** 0.5


def pooled(samples: Sequence[np.ndarray]) -> Spread:
    """One standard deviation for all groups: squared distances from each group's own mean over sum(n_i - 1)."""
    df = sum(len(sample) - 1 for sample in samples)
    squares = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in samples)
    return Spread((squares / df) ** 0.5 if df else float("nan"), df)


def t_quantile(df: int, level: float = LEVEL) -> float:
    """What Student's t stays below in absolute value with probability `level`."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf is the same function behind 0.5 s more of imports

    return float(stdtrit(df, (1 + level) / 2))


def mean(sample: np.ndarray, spread: Spread) -> Estimate:
    """The mean over seeds: [n] -> points."""
    return _around(float(sample.mean()), spread.half(len(sample)))


def difference(first: np.ndarray, second: np.ndarray, spread: Spread) -> Estimate:
    """Mean of the first minus mean of the second: [n1], [n2] -> points."""
    return contrast([first], [second], spread)


def contrast(plus: Sequence[np.ndarray], minus: Sequence[np.ndarray], spread: Spread, level: float = LEVEL) -> Estimate:
    """The means of some minus those of others, all of them independent: [n1], [n2], ... -> points."""
    value = sum(float(one.mean()) for one in plus) - sum(float(one.mean()) for one in minus)
    return _around(value, spread.half(*(len(one) for one in (*plus, *minus)), level=level))


def _around(value: float, half: float | None) -> Estimate:
    return Estimate(value, None, None) if half is None else Estimate(value, value - half, value + half)


def bootstrap(scores: np.ndarray, seed: int = 0, level: float = LEVEL) -> Estimate:
    """The mean of per-image scores, images resampled.

    A draw of n images with replacement is told by how often it holds each score, and those counts are multinomial;
    drawing them is the bootstrap itself, at a cost that does not grow with the images.

    Args:
        scores: [images]; hits (0, 1) of one run, or sums and differences of several runs' hits.
    Returns:
        In points, with the percentile interval of DRAWS draws.
    """
    values, counts = np.unique(scores.astype(np.int64), return_counts=True)
    n = len(scores)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, DRAWS) @ values * (100 / n)
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return Estimate(float(100 * (values @ counts) / n), float(low), float(high))


def decide(asked: Sequence[tuple[Estimate, float]]) -> Outcome:
    """Whether a claim holds that asks several figures each to be above its bound; a ~ c > b is one.

    Args:
        asked: (figure, bound).
    Returns:
        holds: each is surely above its bound; fails: one is surely below; open: these runs do not tell.
    """
    if any(figure.high is not None and figure.high < bound for figure, bound in asked):
        return "fails"
    return "holds" if all(figure.low is not None and figure.low > bound for figure, bound in asked) else "open"
