"""What a training step takes at its peak above the weights and optimizer state that lie there before it.

Counted from torch's own allocations, so that it is exact and the same every time. Some gradients of weights are there at
the peak, and no fewer tokens make them smaller; so what must fall as the tokens do is what each view adds to the peak.
"""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from benchmarks.rounds import Part, Row
from benchmarks.setting import Setting
from benchmarks.steps import N, Steps

BATCHES, TOKENS = (8, 16), (144, 101, 84, 49)  # fewer views, and gradients alone would make the peak
SLACK = 0.001  # logits and targets of a view, which no ticket makes smaller


def measure(setting: Setting) -> Part:
    part = Part(notes=[f"from batches of {BATCHES[0]} and {BATCHES[1]}, float32; exact, one round"])
    for name in ("deit_tiny", "deit_small"):
        few, many = (Steps(name, batch) for batch in BATCHES)
        dense = a_view(few.dense(), many.dense())
        for tokens in TOKENS:
            ours = a_view(few.ours(tokens), many.ours(tokens))
            dropped = a_view(few.patch_drop(tokens), many.patch_drop(tokens))
            what = f"{name} step, K = {tokens}: memory a view, {ours / 1e6:.1f} of {dense / 1e6:.1f} MB"
            part.rows += [
                Row(what, "timm dense", [ours / dense], wanted=("<=", round((tokens + 1) / (N + 1) + SLACK, 4))),
                Row(f"{name} step, K = {tokens}: memory a view", "timm patch_drop_rate", [ours / dropped], wanted=("<=", 1)),
            ]  # fmt: skip
    return part


def a_view(few: Callable[[], float], many: Callable[[], float]) -> float:
    """Bytes that a view more adds to the peak."""
    return (peak(many) - peak(few)) / (BATCHES[1] - BATCHES[0])


def peak(step: Callable[[], float]) -> int:
    """Bytes allocated at most, above those before the step."""
    step()  # AdamW makes its state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
