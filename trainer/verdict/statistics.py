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

    def half(self, *counts: int) -> float | None:
        """Half the interval of a mean of n runs, or of the difference of two means of n1 and n2."""
        if not self.df:
            return None
        return t_quantile(self.df) * self.sd * float(sum(1 / n for n in counts)) ** 0.5


def pooled(samples: Sequence[np.ndarray]) -> Spread:
    """One standard deviation for all groups: squared distances from each group's own mean over sum(n_i - 1)."""
    df = sum(len(sample) - 1 for sample in samples)
    squares = sum(float(((sample - sample.mean()) ** 2).sum()) for sample in samples)
    return Spread((squares / df) ** 0.5 if df else float("nan"), df)


def t_quantile(df: int) -> float:
    """What Student's t stays below in absolute value with probability LEVEL."""
    from scipy.special import stdtrit  # scipy.stats.t.ppf is the same function behind 0.5 s more of imports

    return float(stdtrit(df, (1 + LEVEL) / 2))


def mean(sample: np.ndarray, spread: Spread) -> Estimate:
    """The mean over seeds: [n] -> points."""
    return _around(float(sample.mean()), spread.half(len(sample)))


def difference(first: np.ndarray, second: np.ndarray, spread: Spread) -> Estimate:
    """Mean of the first minus mean of the second: [n1], [n2] -> points."""
    return _around(float(first.mean() - second.mean()), spread.half(len(first), len(second)))


def _around(value: float, half: float | None) -> Estimate:
    return Estimate(value, None, None) if half is None else Estimate(value, value - half, value + half)


def bootstrap(scores: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of per-image scores, images resampled.

    A draw of n images with replacement is told by how often it holds each score, and those counts are multinomial;
    drawing them is the bootstrap itself, at a cost that does not grow with the images.

    Args:
        scores: [images]; hits (0, 1) of one run, or hits of one minus hits of another (-1, 0, 1).
    Returns:
        In points, with the percentile interval of DRAWS draws.
    """
    values, counts = np.unique(scores.astype(np.int64), return_counts=True)
    n = len(scores)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, DRAWS) @ values * (100 / n)
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(100 * (values @ counts) / n), float(low), float(high))


def decide(ac: Estimate, ab: Estimate, margin: float) -> Outcome:
    """Whether a ~ c > b.

    Args:
        ac: a - c.
        ab: a - b.
        margin: how many points below c still count as equal.
    Returns:
        holds: a - c is surely above -margin and a - b surely above 0; fails: one of them is surely below;
        open: these runs do not tell.
    """
    if ac.low is None or ac.high is None or ab.low is None or ab.high is None:
        return "open"
    if ac.low > -margin and ab.low > 0:
        return "holds"
    return "fails" if ac.high < -margin or ab.high < 0 else "open"
