"""Photos of one's own: from a folder of them to their classes, by the commands of docs/PHOTOS.md.

    python examples/photos.py photos --out work
    python examples/photos.py photos --out work --weights dinov2_s14.safetensors      # without a network
    python examples/photos.py photos --out work --new holiday -- --epochs 5           # what comes after -- is datalth-train's

    photos/CLASS/NAME.jpg       or photos/train/CLASS/NAME.jpg and photos/val/CLASS/NAME.jpg
    work/tickets                the ticket set; work/explore.html: what was kept
    work/model                  the fine-tuned model, which plain timm loads too
    work/classes.csv            what it says of the photos

Every command is printed before it runs. Stopped, the same line goes on.
"""

from pathlib import Path

import click

from commands import show


@click.command()
@click.argument("photos", type=click.Path(path_type=Path))
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--new", type=click.Path(path_type=Path), help="Photos to predict on.  [default: the same]")
@click.option("--model", default="dinov2", show_default=True, help="timm ViT: it looks, and it learns.")
@click.option("--weights", help="Its weights, a file.  [default: timm's, from the hub]")
@click.option("--img-size", default=224, show_default=True, help="Of the views that are cut of photos.")
@click.option("--tokens", default=98, show_default=True, help="Patches of a photo that are trained on.")
def main(
    photos: Path,
    flags: tuple[str, ...],
    out: Path,
    new: Path | None,
    model: str,
    weights: str | None,
    img_size: int,
    tokens: int,
) -> None:
    """PHOTOS to a fine-tuned model, and what it says of photos; FLAGS are further ones of datalth-train."""
    tickets, run = out / "tickets", out / "model"
    looks = ["--weights", weights] if weights else []
    learns = ["--initial-checkpoint", weights] if weights else ["--pretrained"]
    method = [] if model == "dinov2" else ["--method", "cls-attention"]  # dinov2 brings its own
    show("datalth-mine", "--data", photos, "--out", tickets, "--exif", "apply", "--store-side", 512,
         "--img-size", img_size, "--selector", model, *looks, *method, "--tokens", tokens)  # fmt: skip
    show("datalth-shards", "explore", tickets, "-o", out / "explore.html")
    show("datalth-train", "--shards", tickets, "-c", "finetune", "--model", model, *learns, *flags,
         "--output", out, "--experiment", run.name, "--resume", "latest")  # fmt: skip
    broken = (0, 1)  # 1: some photos could not be read, and are listed
    asked = new or photos
    show("datalth-predict", run, asked, "-o", out / "classes.csv", codes=broken)
    show("datalth-predict", run, asked, "--tickets", model, *looks, *method, "-o", out / "on-tickets.csv", codes=broken)


if __name__ == "__main__":
    main()
