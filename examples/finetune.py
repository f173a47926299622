"""Fine-tune pretrained ViTs on photos with the recipe of before and of now, some seeds each: the table in docs/TRAINING.md.

    python examples/finetune.py tickets dinov2_s14.safetensors --model vit_small_patch14_dinov2 --epochs 4 --out finetune

Begun again it goes on; finetune/finetune.json holds a row a run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

# recipes/finetune.yaml as it was, without --amp, which CPUs are slower with, and at fewer epochs.
BEFORE = (
    "--lr-base 5e-5 --weight-decay 1e-8 --min-lr 1e-6 --mixup 0 --cutmix 0 --reprob 0 --repeats 1 --no-model-ema -b 64"
)
ARMS = {"before": [*BEFORE.split(), "--drop-path", "0.1"], "now": ["-c", "finetune"]}


def main() -> None:
    """Train what is not trained yet, one run after the other, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a ticket set of photos")
    parser.add_argument("weights", help="the model's pretrained weights")
    parser.add_argument("--model", required=True, help="timm's name of it")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("finetune"), help="folder of the runs")
    asked = parser.parse_args()
    for arm, flags in ARMS.items():
        for seed in range(1, asked.seeds + 1):
            run = asked.out / f"{asked.model}-{arm}-{seed}"
            if not (run / "final.json").exists():
                command = [sys.executable, "-m", "trainer.cli", *flags, "--epochs", asked.epochs, "--warmup-epochs", 1]
                command += ["--shards", asked.shards, "--model", asked.model, "--initial-checkpoint", asked.weights]
                command += ["--seed", seed, "--val-interval", asked.epochs, "--resume", "latest"]
                command += ["--output", asked.out, "--experiment", run.name]
                subprocess.run([str(word) for word in command], check=True)
    rows = [row_of(path.parent) for path in sorted(asked.out.glob("*/final.json"))]
    (asked.out / "finetune.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def row_of(run: Path) -> dict[str, object]:
    """What came of a run: top-1 in percent under each protocol, and seconds of training."""
    final = json.loads((run / "final.json").read_text(encoding="utf-8"))
    model, arm, seed = run.name.rsplit("-", 2)
    tested = {name: round(figures["top1"], 2) for name, figures in final["results"].items()}
    return {"model": model, "recipe": arm, "seed": int(seed), **tested, "seconds": round(final["cost"]["seconds"])}


if __name__ == "__main__":
    main()
