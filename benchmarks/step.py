"""Seconds of a training step on kept patches, against dense, patch_drop and the selector in the step."""

from typing import Any

import timm

from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from benchmarks.steps import N, Steps

BATCH = 16
TOKENS = {144: 1.0, 101: 1.0, 84: 0.95, 49: 0.95}  # K: what of the arithmetic's speed-up must be reached
RATES = {0.9: (144, 1.40), 0.8: (101, 1.50), 0.75: (84, 1.55)}  # keep rate: K, and how many times as fast


def measure(setting: Setting) -> Part:
    part = Part(notes=[f"batch {BATCH}, float32, AdamW's update included"])
    for name in ("deit_tiny", "deit_small"):
        steps = Steps(name, BATCH)
        teacher: Any = timm.create_model(f"{name}_patch16_224").eval()
        legs: dict[str, Leg] = {"dense": steps.dense()}
        for tokens in TOKENS:
            legs |= {f"ours {tokens}": steps.ours(tokens), f"patch_drop {tokens}": steps.patch_drop(tokens)}
        for rate in RATES:
            legs[f"in step {rate}"] = steps.in_step(teacher, rate)
        laps = turns(legs, setting.rounds)
        part.laps |= {f"{name}, {leg}": found for leg, found in laps.items()}
        dense = steps.macs(N)
        for tokens, wanted in TOKENS.items():
            factor = dense / steps.macs(tokens)
            wall, cpu = speedup(laps[f"ours {tokens}"], laps["dense"])
            what = f"{name} step, K = {tokens}: speed-up / {factor:.2f}, that of its MACs"
            part.rows.append(
                Row(what, "timm dense", [v / factor for v in wall], [v / factor for v in cpu], (">=", wanted))
            )
        for tokens in TOKENS:
            figures = speedup(laps[f"ours {tokens}"], laps[f"patch_drop {tokens}"])
            part.rows.append(Row(f"{name} step, K = {tokens}", "timm patch_drop_rate", *figures, (">=", 0.97)))
        for rate, (tokens, wanted) in RATES.items():
            figures = speedup(laps[f"ours {tokens}"], laps[f"in step {rate}"])
            part.rows.append(Row(f"{name} step, r = {rate}", "selector in the step", *figures, (">=", wanted)))
    return part
