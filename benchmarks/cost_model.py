"""Mining and training at scale, on paper: rates measured here for the CPU's part, assumed ones for accelerators.

    python -m benchmarks.cost_model

Reads benchmarks/results/*.json; what is not there yet is a dash. Measured: seconds of one CPU core to mine a view and to feed one, and
bytes of ranked sets. Counted: GMACs of selector and student. Assumed: what an accelerator sustains, and how many CPU cores feed it.
"""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.rounds import RESULTS

SUSTAINED = 100e12  # FLOP/s of one accelerator, bf16, forward and backward; assumed
CORES = 16  # CPU cores beside each accelerator; assumed
VIEWS, EPOCHS = 16, 300
IMAGE_BYTES, RANKING_BYTES = 110e3, 430  # of a photo, and of a view's ranking and box with their share of tar's headers
SELECTOR_GMACS = 3.99  # DeiT-S, evit at r = 0.9
STUDENTS = {  # GMACs, dense and by K
    "deit_tiny": (1.254, {144: 0.888, 98: 0.585, 49: 0.284}),
    "deit_small": (4.599, {144: 3.315, 98: 2.222, 49: 1.100}),
}
LEGS = {144: "ranked, K = 144", 98: "ranked, K = 96", 49: "ranked, K = 48"}  # of as many rows of patches
DATA = {"ImageNet-1k": 1.28e6, "ImageNet-21k": 14e6, "1 B images": 1e9}


def main() -> None:
    """Print the tables."""
    table(["data", "images", "V", "photos, GB", "tickets beside them", "ranked, quality 85", "90", "95"], sizes())
    table(["data", "photos: mining, hours", "bound by", "ranked: mining, hours", "bound by"], mining())
    table(
        ["student", "K", "views/s", "cores: photos", "ranked", "DeiT's: photos", "ranked", "mixed by patches"], cores()
    )
    head = ["student", "K", "dense, hours", "photos", "bound by", "to pay", "ranked", "bound by", "to pay"]
    table(head, training())


def sizes() -> list[list[str]]:
    """GB of sets; of ranked views as many times the photos' bytes as was measured."""
    rows = {row["what"].partition(":")[0]: row["median"] for row in result("size").get("rows", [])}
    lines = []
    for name, images in DATA.items():
        photos = images * IMAGE_BYTES / 1e9
        for views in (4, 8, 16):
            shares = [rows.get(f"size of a ranked set, V = {views}, quality {q}", math.nan) for q in (85, 90, 95)]
            figures = [photos, images * views * RANKING_BYTES / 1e9, *(photos * share for share in shares)]
            lines.append([name, f"{images:.3g}", str(views), *(number(figure, ",.0f") for figure in figures)])
    return lines


def mining() -> list[list[str]]:
    """Hours of one accelerator for 16 views an image."""
    lines = []
    for name, images in DATA.items():
        found = [
            hours(2e9 * SELECTOR_GMACS * images * VIEWS, rate * images * VIEWS) for rate in (mined(), mined_ranked())
        ]
        lines.append([name, *(cell for time, bound in found for cell in (number(time, ",.1f"), bound))])
    return lines


def cores() -> list[list[str]]:
    """CPU cores that one accelerator needs to be fed."""
    lines = []
    for student, (_, lean) in STUDENTS.items():
        for tokens, macs in lean.items():
            views = SUSTAINED / (6e9 * macs)
            legs = ["ours, repeats 3", LEGS[tokens]]
            if tokens == 144:
                legs += ["ours, DeiT", "ranked, DeiT", "ranked, DeiT mixed by patches"]
            needed = [number(views * fed(leg), ".1f") for leg in legs]
            lines.append([student, str(tokens), f"{views:,.0f}", *needed, *[""] * (5 - len(legs))])
    return lines


def training() -> list[list[str]]:
    """Hours of one accelerator on ImageNet-1k, and how many students pay for mining.

    Dense training reads the photos; it, too, waits for them.
    """
    images = DATA["ImageNet-1k"]
    fed_views, mined_views, lines = images * EPOCHS, images * VIEWS, []
    for student, (dense, lean) in STUDENTS.items():
        whole, _ = hours(6e9 * dense * fed_views, fed("ours, repeats 3") * fed_views)
        for tokens, macs in lean.items():
            cells = []
            for rate, leg in ((mined(), "ours, repeats 3"), (mined_ranked(), LEGS[tokens])):
                time, bound = hours(6e9 * macs * fed_views, fed(leg) * fed_views)
                spent, _ = hours(2e9 * SELECTOR_GMACS * mined_views, rate * mined_views)
                pays = "never" if whole <= time else number(spent / (whole - time), ".2f")
                cells += [number(time, ".1f"), bound, pays]
            lines.append([student, str(tokens), number(whole, ".1f"), *cells])
    return lines


def hours(flops: float, core_seconds: float) -> tuple[float, str]:
    """Of one accelerator: the longer of the two parts, which run side by side, and its name."""
    parts = {"accelerator": flops / SUSTAINED / 3600, "CPU": core_seconds / CORES / 3600}
    if math.isnan(core_seconds):
        return math.nan, "-"
    name = max(parts, key=parts.__getitem__)
    return parts[name], name


def fed(leg: str) -> float:
    """Core-seconds to feed a view."""
    return core_seconds("loader", leg)


def mined() -> float:
    """Core-seconds to mine a view of a photo: read, decode, render and write, with a selector that looks at nothing."""
    return core_seconds("mining", "nothing, test_vit, whole")


def mined_ranked() -> float:
    """The same, and to encode the view."""
    legs = [leg for leg in result("mining").get("rates", {}) if "nothing" in leg and "ranked" in leg]
    return core_seconds("mining", next((leg for leg in legs if "whole" in leg), ""))


def core_seconds(part: str, leg: str) -> float:
    """CPU time of a unit; nan where it was not measured."""
    rate = result(part).get("rates", {}).get(leg)
    if rate is None:
        return math.nan
    units = rate["units_per_second"] * statistics.median(rate["wall"])
    return statistics.median(rate["cpu"]) / units


def result(part: str) -> dict[str, Any]:
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    for cells in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(cells)} |")
    print()


if __name__ == "__main__":
    main()
