"""Views a second through the evit selector, against timm's whole forward of the same model on the same batch."""

from typing import Any

import timm
import torch

from benchmarks.rounds import Leg, Part, Row, speedup, turns
from benchmarks.setting import Setting
from miner.drop import default_blocks, keep_counts
from miner.selectors import create_selector

BATCH, GRID = 16, (14, 14)
RATES = {0.9: 1.2, 0.7: 1.5}


def measure(setting: Setting) -> Part:
    torch.manual_seed(0)
    model: Any = timm.create_model("deit_small_patch16_224", num_classes=0).eval()
    images = torch.randn(BATCH, 3, 224, 224)
    blocks = default_blocks(len(model.blocks))

    @torch.inference_mode()
    def whole() -> float:
        return len(model(images))

    legs: dict[str, Leg] = {"timm": whole}
    for rate in RATES:
        selector = create_selector("evit", model, GRID, keep_counts(196, rate), blocks)
        legs[f"evit {rate}"] = lambda selector=selector: len(selector.rank(images))
    part = Part(laps=turns(legs, setting.rounds), notes=[f"batch {BATCH}, float32"])
    for rate, wanted in RATES.items():
        figures = speedup(part.laps[f"evit {rate}"], part.laps["timm"])
        part.rows.append(
            Row(f"selector, evit r = {rate}, deit_small, views/s", "timm forward", *figures, (">=", wanted))
        )
    return part
