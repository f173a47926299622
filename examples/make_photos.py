"""Photos with true masks, as many as wanted: cut-outs of real photos on real backgrounds, both out of Debian's packages.

One object a picture, small, medium or large, whole and in view; where it stands is drawn as the mean of two uniform places, since
photographers keep things near the middle. Objects are turned, mirrored and toned, so that no two pictures are alike.
Backgrounds of val are never in train; its objects are, unless --unseen: a small ViT from scratch hardly learns to tell things
that it was never shown.

    python examples/make_photos.py --out photos --train 6000 --val 1000

    photos/train/CLASS/NAME.jpg  photos/val/CLASS/NAME.jpg    ImageFolder, 146 x 146 pixels
    photos/masks/...             255 inside the object, for `datalth-shards score` and `datalth-mine --method masks`
    photos/pictures.csv          object, background, size and share of each; CREDITS.txt: whose photos they are

Fetches 320 MB of packages with apt (Debian 12 or newer) where they are not in --cache yet.
"""

import csv
import random
import subprocess
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import click
from PIL import Image, ImageEnhance

SIDE, MARGIN = 146, 9  # view 0 is what is inside of the margin, where the objects are: 128 pixels, 8 x 8 patches
VIEW = SIDE - 2 * MARGIN
SIZES = {"small": (0.04, 0.07), "medium": (0.12, 0.18), "large": (0.30, 0.45)}  # of view 0, by area
OBJECTS = 6  # of a class
VAL = 0.25  # of the objects and of the backgrounds
STAMPS = "usr/share/tuxpaint/stamps"
PACKAGES = {
    "tuxpaint-stamps-default": "GPL-2, Bill Kendrick and contributors",
    "mate-backgrounds": "GPL-2+, their authors",
    "lomiri-wallpapers-16.04": "CC-BY-4.0 (Berasategi), CC-BY-SA-4.0 (Klootwijk, Nerlich)",
    "plasma-workspace-wallpapers": "GPL-2+, KDE Visual Design Group",
}
CLASSES = {  # folders of stamps; a name takes those that begin with it
    "bird": ["animals/birds/"],
    "coin": ["symbols/money/canadian/coins/", "symbols/money/euro/coins/", "symbols/money/us/coins/"],
    "flower": ["plants/flowers/"],
    "fruit": ["food/fruit/"],
    "hoofed": ["animals/mammals/bovines/", "animals/mammals/deer/", "animals/mammals/equines/"],
    "insect": ["animals/insects/"],
    "instrument": ["hobbies/music/string/", "hobbies/music/percussion/", "hobbies/music/brass/"],
    "planet": ["space/planets/", "space/moon/"],
    "vegetable": ["food/vegetables/"],
    "vehicle": ["vehicles/auto/", "vehicles/construction/", "vehicles/emergency/", "vehicles/masstransit/"],
}
NOT = ("bee", "fly", "apple_core", "0_sun", "sedan_police", "7spoke256")  # drawings, parts
ALIKE = (
    "symbols/money/euro/",
    "space/moon/",
    "food/fruit/apple_",
    "animals/birds/heron_",
)  # stand on one side of the split
SCENES = {  # photos of the packages that show nothing of these classes
    "mate-backgrounds": ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood"),
    "lomiri-wallpapers-16.04": ("Bridge_by", "aitzgorri_by", "analogpattern_by", "greentock_by", "life_by", "picosdeeuropa_by",
                                "sunset_by"),
    "plasma-workspace-wallpapers": ("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "FallenLeaf", "Grey", "Kite",
                                    "OneStandsOut", "Path", "Volna", "summer_1am"),
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A row of pictures.csv."""

    file: str
    size: str
    share: str
    stamp: str
    background: str


def package(cache: Path, name: str) -> Path:
    """Its files, unpacked."""
    root = cache / name
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", name], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        deb = max(cache.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return root


def stamps_of(root: Path, parts: list[str]) -> list[str]:
    """Photographic stamps of a class, by their names below STAMPS."""
    found = [path for part in parts for path in sorted((root / STAMPS / part).glob("*.png"))]
    return [str(path.relative_to(root / STAMPS).with_suffix("")) for path in found
            if path.stem not in NOT and not path.stem.endswith(("_mirror", "_desc"))]  # fmt: skip


def halves(names: list[str], seed: str) -> dict[str, list[str]]:
    """Names for train and val; those that are ALIKE stand together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(next((start for start in ALIKE if name.startswith(start)), name), []).append(name)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: len(groups[group]) > 2)  # many that are alike are for train
    split: dict[str, list[str]] = {"train": [], "val": []}
    for group in order:
        split["val" if len(split["val"]) < max(1, VAL * len(names)) else "train"] += groups[group]
    return split


def backgrounds(cache: Path) -> dict[str, Image.Image]:
    """Photos without an object of these classes, some 1300 pixels wide."""
    found: dict[str, Image.Image] = {}
    for name, starts in SCENES.items():
        for start in starts:
            paths = [
                p
                for p in package(cache, name).glob("usr/share/**/*")
                if p.suffix in (".jpg", ".png") and start in str(p)
            ]
            photo = Image.open(max(paths, key=lambda path: path.stat().st_size))
            photo.draft("RGB", (1300, 1300))
            image = photo.convert("RGB")
            image.thumbnail((1300, 1300))
            found[f"{name}:{start}"] = image
    return found


def scene(background: Image.Image, rng: random.Random) -> Image.Image:
    """A random square of a background."""
    side = min(background.size) * rng.uniform(0.25, 1)
    left, top = (rng.uniform(0, whole - side) for whole in background.size)
    image = background.resize((SIDE, SIDE), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return toned(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image, rng)


def toned(image: Image.Image, rng: random.Random) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = enhance(image).enhance(rng.uniform(0.85, 1.15))
    return image


def cut_out(stamp: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """The stamp turned, mirrored and scaled so that it covers a share of view 0, as far as it fits in."""
    if rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stamp = stamp.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    stamp = stamp.crop(stamp.getchannel("A").getbbox())
    area = sum(stamp.getchannel("A").histogram()[128:])
    scale = min((share * VIEW**2 / area) ** 0.5, 0.95 * VIEW / max(stamp.size))
    size = (max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale)))
    stamp = stamp.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")  # clear pixels have no color
    colors = toned(stamp.convert("RGB"), rng)
    colors.putalpha(stamp.getchannel("A"))
    return colors


def compose(
    stamp: Image.Image, background: Image.Image, share: float, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """A picture and its mask."""
    picture, thing = scene(background, rng), cut_out(stamp, share, rng)
    places = [MARGIN + round((VIEW - side) * (rng.random() + rng.random()) / 2) for side in thing.size]
    place = (places[0], places[1])
    picture.paste(thing, place, thing)
    mask = Image.new("L", picture.size)
    mask.paste(thing.getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0), place)
    return picture, mask


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write into.")
@click.option("--train", default=6000, show_default=True, help="Pictures for training.")
@click.option("--val", default=1000, show_default=True, help="Pictures for validation.")
@click.option("--unseen", is_flag=True, help="Validation shows other objects of the classes than training.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--cache", default=Path("~/.cache/datalth-photos"), type=click.Path(path_type=Path), help="Of the packages."
)
def main(out: Path, train: int, val: int, unseen: bool, seed: int, cache: Path) -> None:
    """Write photos of ten classes and their masks."""
    cache = cache.expanduser()
    root = package(cache, "tuxpaint-stamps-default")
    stamps = {name: halves(stamps_of(root, parts), f"{seed}/{name}") for name, parts in CLASSES.items()}
    scenes = backgrounds(cache)
    sides = halves(sorted(scenes), f"{seed}/backgrounds")
    opened = {
        name: Image.open(root / STAMPS / f"{name}.png").convert("RGBA")
        for sets in stamps.values()
        for names in sets.values()
        for name in names
    }
    rows = []
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            rng = random.Random(f"{seed}/{split}/{i}")  # a larger set begins with the same pictures
            label = [*CLASSES][i % len(CLASSES)]
            things = stamps[label]["val" if unseen and split == "val" else "train"][:OBJECTS]
            stamp, size, where = rng.choice(things), rng.choice([*SIZES]), rng.choice(sides[split])
            picture, mask = compose(opened[stamp], scenes[where], rng.uniform(*SIZES[size]), rng)
            file = Path(split, label, f"{i:05d}-{size}.jpg")
            for base in (out, out / "masks"):
                (base / file).parent.mkdir(parents=True, exist_ok=True)
            picture.save(out / file, quality=92)
            mask.save((out / "masks" / file).with_suffix(".png"))
            share = mask.histogram()[255] / VIEW**2
            rows.append(Picture(str(file), size, f"{share:.3f}", stamp, where))
    with open(out / "pictures.csv", "w", newline="", encoding="utf-8") as csv_file:
        writer = csv.writer(csv_file)
        writer.writerow([one.name for one in fields(Picture)])
        writer.writerows(map(astuple, rows))
    credits = "".join(f"{name}: {terms}\n" for name, terms in PACKAGES.items())
    (out / "CREDITS.txt").write_text(
        f"Photos out of these Debian packages, cut and put together:\n{credits}", encoding="utf-8"
    )
    click.echo(f"{out}: {train} train and {val} val pictures of {len(CLASSES)} classes, {SIDE} x {SIDE} pixels")


if __name__ == "__main__":
    main()
