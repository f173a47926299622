"""One plain sentence for each claim, with the figures that decide it."""

from trainer.verdict.claim import Claim
from trainer.verdict.statistics import Estimate

RESAMPLED = "one seed, images resampled: says nothing about other seeds"


def interval(estimate: Estimate) -> str:
    """Its 95 % interval in points."""
    return "unknown" if estimate.low is None else f"{estimate.low:+.2f} to {estimate.high:+.2f}"


def sentence(claim: Claim, where: str, margin: float, resampled: bool) -> str:
    """The verdict on one claim.

    Args:
        where: model, tickets and K.
        margin: points.
        resampled: whether the intervals are over images of one seed.
    """
    if claim.ac is None or claim.ab is None:
        return f"{where}: cannot be told: {claim.missing}."
    ac, ab = claim.ac.estimate, claim.ab.estimate
    close = f"a - c = {ac.value:+.2f} (95 %: {interval(ac)})"
    better = f"a - b = {ab.value:+.2f} (95 %: {interval(ab)})"
    if claim.outcome == "holds":
        text = (
            f"the claim holds: winning tickets are as good as all patches to within {margin} points, {close},"
            f" and better than random patches, {better}"
        )
    elif claim.outcome == "fails":
        text = f"the claim fails: {_failures(ac, ab, margin, close, better)}"
    else:
        text = f"cannot be told from these runs: {_doubts(ac, ab, margin, close, better)}"
    return f"{where}: {text}." + (f" ({RESAMPLED[0].upper()}{RESAMPLED[1:]}.)" if resampled else "")


def _failures(ac: Estimate, ab: Estimate, margin: float, close: str, better: str) -> str:
    """The half of the claim that is refuted, and the figure of the other."""
    far = f"winning tickets are more than {margin} points below all patches, {close}"
    worse = f"winning tickets are worse than random patches, {better}"
    below_c = ac.high is not None and ac.high < -margin
    below_b = ab.high is not None and ab.high < 0
    if below_c and below_b:
        return f"{far}, and {worse}"
    if below_c:
        return f"{far}; {'but better than random patches, ' if ab.low is not None and ab.low > 0 else ''}{better}"
    return f"{worse}; {close}"


def _doubts(ac: Estimate, ab: Estimate, margin: float, close: str, better: str) -> str:
    """The half of the claim that the intervals leave open, and the figure of the other."""
    near = ac.low is not None and ac.low > -margin
    above = ab.low is not None and ab.low > 0
    first = f"{close} is above {0 - margin}" if near else f"{close} may be above or below {0 - margin}"
    second = f"{better} is above 0" if above else f"{better} may be above or below 0"
    return f"{first}, and {second}"
