"""What datalth-mine is told, in groups. Its flags are made from these fields, and a program makes them by hand.

No torch here: `--help` answers at once.
"""

from dataclasses import dataclass
from typing import Literal

import click

from miner.drop import DEFAULT_KEEP_RATE, parse_blocks
from shards.console import Finite
from shards.errors import TicketSetError
from shards.flags import Settings, setting
from shards.schema import MAX_SEED, MAX_SHARD_IMAGES, MAX_SIDE, MAX_STORE_SIDE, MAX_VIEWS

TRAIN_VIEWS, OTHER_VIEWS = 16, 1
DEFAULT_SELECTOR, DEFAULT_METHOD = "deit_small", "evit"
METHOD_OF = {"dinov2": "cls-attention"}  # it was never trained to drop patches; docs/SELECTORS.md has figures
DEFAULT_QUALITY = 90  # of ranked views
NO_RANKINGS = "none"  # as a method: the set has token labels alone
MASKS = "masks"  # the method that needs a folder of them
# A ticket set that is mined from decides these; of the second, giving the same again is no mistake.
INHERITED, SIZES = frozenset(["inherited"]), frozenset(["size"])


@dataclass(frozen=True)
class Inputs(Settings):
    """Which images are mined."""

    data: str = setting(
        metavar="SPEC",
        help="Image folder, WebDataset tars (quote globs), ImageNet tars, another ticket set, or timm:READER.",
    )
    splits: tuple[str, ...] = setting(
        (), help="Mine only this split (repeatable). A split can be added later.", metavar="S", flag="--split"
    )
    base: str | None = setting(None, metavar="DIR", help="Where the base of a linked --data is now.")
    labels: str | None = setting(
        None, metavar="FILE.csv", help="filename,class for images that carry no class.", marks=INHERITED
    )
    val_share: float = setting(
        0.1,
        Finite(0, 0.9),
        "Share of images that make a val split where there is none; 0: none.",
        metavar="SHARE",
        marks=INHERITED,
    )
    limit: int | None = setting(
        None, click.IntRange(min=1), "Only N images of each split, for a try.", metavar="N", marks=INHERITED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise TicketSetError("`data`: expected a name, got an empty one")


@dataclass(frozen=True)
class Output(Settings):
    """The ticket set that is written."""

    out: str = setting(metavar="DIR", help="Folder of the new ticket set; the same command again resumes it.")
    images: Literal["copy", "link", "ranked"] = setting(
        "copy",
        help="copy: images and tickets; link: from a ticket set, tickets only, images stay there; ranked: views instead of images, patch by patch in ranked order, so that training reads no more than its tickets (of a ticket set, rankings are kept unless a selector is asked for).",
    )
    quality: int | None = setting(
        None, click.IntRange(1, 100), "JPEG quality of ranked views.", metavar="Q", shown=f"{DEFAULT_QUALITY}"
    )
    store_tokens: int | None = setting(
        None,
        click.IntRange(min=1),
        "Best patches stored of each ranked view, rounded up to whole rows; others cannot be trained on.",
        metavar="K",
        shown="all",
    )
    shard_size: int = setting(
        1000, click.IntRange(1, MAX_SHARD_IMAGES), "Images in a shard.", metavar="N", marks=INHERITED
    )
    max_failures: float = setting(0.01, Finite(0, 1), "Stop past this share of failed images.", metavar="SHARE")
    overwrite: bool = setting(False, help="Remove the ticket set in --out and start anew.")
    retry_failed: bool = setting(False, help="Mine the shards that hold failed images again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise TicketSetError("`out`: expected a name, got an empty one")
        for name in ("quality", "store_tokens"):
            if getattr(self, name) is not None and self.images != "ranked":
                raise TicketSetError(
                    f"`{name}`: of ranked views; expected `images` ranked beside it, got {self.images}"
                )


@dataclass(frozen=True)
class Selection(Settings):
    """How patches are ranked."""

    selector: str | None = setting(
        None,
        metavar="NAME",
        help="timm ViT that ranks, or deit_tiny|deit_small|deit_base, trained on ImageNet, or dinov2, for any photos; a method of your own is given one where this is typed, or where it says `needs_model`.",
        shown=DEFAULT_SELECTOR,
    )
    weights: str | None = setting(
        None, metavar="FILE", help="Its weights, .safetensors or .pth. Default: timm's pretrained ones."
    )
    method: str = setting(
        "",
        metavar="NAME",
        help="How patches are ranked; see above.",
        shown=f"{DEFAULT_METHOD}, of dinov2 {METHOD_OF['dinov2']}",
    )
    keep_rate: float | None = setting(
        None, metavar="R", help="Share of patches kept at each of three stages.", shown=f"{DEFAULT_KEEP_RATE}"
    )
    tokens: int | None = setting(
        None, click.IntRange(min=1), "Patches in a ticket, instead of --keep-rate.", metavar="K"
    )
    masks: str | None = setting(
        None,
        metavar="DIR",
        help="For --method masks: PNGs, white on the object, DIR/train/bird/x.png for train/bird/x.jpg.",
    )
    drop_blocks: tuple[int, ...] | None = setting(
        None,
        metavar="I,J,K",
        help="Blocks at which evit drops (default: quarter points, 3,6,9 of 12); the one block of cls-attention and rollout (default: the last).",
        parse=parse_blocks,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens and self.keep_rate is not None:
            raise TicketSetError("`tokens` and `keep_rate` both say how many patches a ticket has; give one of them")
        if not self.method:
            object.__setattr__(self, "method", METHOD_OF.get(self.selector or "", DEFAULT_METHOD))
        if (self.method == MASKS) != bool(self.masks):
            raise TicketSetError(
                f"`method` {self.method}: expected `masks` DIR beside method {MASKS}, and beside no other"
            )

    @property
    def ranks(self) -> bool:
        """Whether there are rankings at all."""
        return self.method != NO_RANKINGS


@dataclass(frozen=True)
class Geometry(Settings):
    """Views of the images, and the patch grid on them."""

    img_size: int = setting(224, click.IntRange(1, MAX_SIDE), "Student's input, pixels.", metavar="PX", marks=SIZES)
    patch_size: int = setting(16, click.IntRange(1, MAX_SIDE), "Student's patch, pixels.", metavar="PX", marks=SIZES)
    views: int | None = setting(
        None,
        click.IntRange(1, MAX_VIEWS),
        "Views of a train image, the canonical one included; of other splits only where --split names them.",
        metavar="V",
        shown=f"{TRAIN_VIEWS} for train, {OTHER_VIEWS} for other splits",
        marks=INHERITED,
    )
    scale: tuple[float, float] = setting(
        (0.08, 1.0), click.FLOAT, "Area of random views.", metavar="MIN MAX", marks=INHERITED
    )
    ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3),
        click.FLOAT,
        "Width / height of random views.",
        metavar="MIN MAX",
        shown="3/4 4/3",
        marks=INHERITED,
    )
    hflip: float = setting(
        0.5, Finite(0, 1), "Probability that a random view is flipped.", metavar="P", marks=INHERITED
    )
    exif: Literal["ignore", "apply"] = setting(
        "ignore", help="EXIF orientation; timm and torchvision ignore it.", marks=INHERITED
    )
    store_side: int | None = setting(
        None,
        click.IntRange(1, MAX_STORE_SIDE),
        "Store larger images as JPEGs of this short side.",
        metavar="S",
        marks=INHERITED,
    )
    seed: int = setting(
        0, click.IntRange(0, MAX_SEED), "Of views, order and random tickets.", metavar="N", marks=INHERITED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.img_size % self.patch_size:
            raise TicketSetError(f"`img_size` {self.img_size} is no multiple of `patch_size` {self.patch_size}")
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "scale" and high > 1):
                bounds = "0 < MIN <= MAX <= 1" if name == "scale" else "0 < MIN <= MAX"
                raise TicketSetError(f"`{name}`: expected {bounds}, got {low:g} {high:g}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a view, (rows, columns)."""
        side = self.img_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class Labeling(Settings):
    """The model of the token labels."""

    token_labels: str | None = setting(
        None,
        metavar="NAME",
        help="Also mine the likeliest five classes at every place (18 x 18) of every whole image, by this timm classifier of the set's classes.",
    )
    token_label_weights: str | None = setting(None, metavar="FILE", help="Its weights.", shown="timm's pretrained ones")
    token_label_size: int | None = setting(
        None,
        click.IntRange(min=1),
        "Side of the whole image as it sees it; near the size that it was trained at.",
        metavar="PX",
        shown="that of 18 places",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("token_label_weights", "token_label_size"):
            if getattr(self, name) and not self.token_labels:
                raise TicketSetError(f"`{name}`: expected `token_labels` NAME beside it, the model that it is of")


@dataclass(frozen=True)
class Machine(Settings):
    """Where and how fast."""

    batch_size: int | None = setting(
        None,
        click.IntRange(min=1),
        "Views per selector batch.",
        metavar="N",
        short="-b",
        shown="128, on a CPU 16; a resumed run keeps its own",
    )
    workers: int | None = setting(
        None,
        click.IntRange(min=1),
        "Threads that read and decode, and as many that encode.",
        metavar="N",
        short="-j",
        shown="cores, 16 at most",
    )
    device: str | None = setting(None, metavar="NAME", help="cuda, cuda:1, mps, cpu.", shown="the best there is")
    amp: bool = setting(False, help="Run the selector in bfloat16; scores stay float32.")
    torchcompile: bool = setting(False, help="torch.compile the selector's blocks.")


@dataclass(frozen=True)
class Fleet(Settings):
    """Several processes that mine one set."""

    elastic: bool = setting(
        False,
        help="Be one of any number of workers that take shards until none is left; they need the same --out and nothing else in common.",
    )
    claim_seconds: float = setting(
        120.0, Finite(0.1, 1e6), "Take over a worker's shard when it has shown no progress for so long.", metavar="S"
    )
    attempts: int = setting(3, click.IntRange(1, 1000), "Give a shard up that has failed so often.", metavar="N")
    ray: str | None = setting(
        None,
        metavar="[ADDRESS]",
        help="Mine on a Ray cluster, one worker a GPU, or on CPUs where there is none. Without an address: that of RAY_ADDRESS or of this machine, else one is started here.",
        bare="auto",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.elastic and self.ray is not None:
            raise TicketSetError("`ray` and `elastic` both say who mines; give one of them")


GROUPS: tuple[type[Settings], ...] = (Inputs, Output, Selection, Geometry, Labeling, Machine, Fleet)
