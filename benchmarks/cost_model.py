"""Mining and training at scale, on paper: rates measured here for the CPU's part, assumed ones for accelerators.

    python -m benchmarks.cost_model

Reads benchmarks/results/*.json. Measured: milliseconds of one CPU core to read, decode, render and gather. Counted: GMACs of selector
and student. Assumed: what an accelerator sustains, and how many CPU cores feed it.
"""

import json
from dataclasses import dataclass

from benchmarks.rounds import RESULTS

SUSTAINED = 100e12  # FLOP/s of one accelerator, bf16, forward and backward; assumed
CORES = 16  # CPU cores beside each accelerator; assumed
VIEWS, EPOCHS, REPEATS = 16, 300, 3
IMAGE_BYTES = 110e3
SELECTOR_GMACS = 3.99  # DeiT-S, evit at r = 0.9
STUDENTS = {"deit_tiny": (1.254, 0.888), "deit_small": (4.599, 3.316)}  # GMACs dense and at K = 144
DATA = {"ImageNet-1k": 1.28e6, "ImageNet-21k": 14e6, "1 B images": 1e9}
ACCELERATORS = (1, 8, 64)


@dataclass(frozen=True)
class Rates:
    """Core-seconds, measured.

    Attributes:
        mined: to read, decode, render and write one view in mining.
        fed: to feed one view in training, DeiT's repeats of 3.
    """

    mined: float
    fed: float


def measured() -> Rates:
    mining = json.loads((RESULTS / "mining.json").read_text(encoding="utf-8"))["rates"]
    loader = json.loads((RESULTS / "loader.json").read_text(encoding="utf-8"))["rates"]
    decode = next(rate for leg, rate in mining.items() if leg.endswith("decode and render"))
    return Rates(1 / decode["units_per_second"], 1 / loader["ours, repeats 3"]["units_per_second"])


def hours(flops: float, core_seconds: float, accelerators: int) -> tuple[float, str]:
    """The longer of the two parts, which run side by side, and its name."""
    parts = {
        "accelerator": flops / SUSTAINED / accelerators / 3600,
        "CPU": core_seconds / CORES / accelerators / 3600,
    }
    name = max(parts, key=parts.__getitem__)
    return parts[name], name


def main() -> None:
    """Print both tables."""
    rates = measured()
    print(f"Measured: {1000 * rates.mined:.2f} ms of a core a mined view, {1000 * rates.fed:.2f} ms a fed one.\n")
    print("| images | accelerators | mining, hours | bound by | set beyond the images |\n|---|---:|---:|---|---:|")
    for name, images in DATA.items():
        views = images * VIEWS
        for count in ACCELERATORS:
            time, bound = hours(2e9 * SELECTOR_GMACS * views, rates.mined * views, count)
            print(f"| {name} | {count} | {time:.1f} | {bound} | {images * 6.9e3 / 1e9:.0f} GB |")
    print("\n| student | images | accelerators | dense, hours | on tickets | bound by | students to pay for mining |")
    print("|---|---|---:|---:|---:|---|---:|")
    for student, (dense, lean) in STUDENTS.items():
        for name, images in list(DATA.items())[:2]:
            for count in ACCELERATORS:
                views = images * EPOCHS
                whole, _ = hours(6e9 * dense * views, rates.fed * views, count)
                time, bound = hours(6e9 * lean * views, rates.fed * views, count)
                mined, _ = hours(2e9 * SELECTOR_GMACS * images * VIEWS, rates.mined * images * VIEWS, count)
                pays = f"{mined / (whole - time):.2f}" if whole > time else "never"
                print(f"| {student} | {name} | {count} | {whole:.1f} | {time:.1f} | {bound} | {pays} |")


if __name__ == "__main__":
    main()
