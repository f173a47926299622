"""A run's folder -> its best weights in timm's model, and all that says how they are shown a photo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trainer.families.registry  # noqa: F401  # LV-ViT is a model of timm's from then on
from miner.models import create, load_weights
from shards.checks import OBJECT, Check, fields, integer, list_of, number, one_of, or_null, parse_json, text
from shards.errors import TicketSetError
from shards.schema import MAX_SIDE
from trainer.output import checkpoint
from trainer.output.folder import CONFIG

MAX_CONFIG = 100_000_000  # bytes; the names of a million classes
SIDE, CHANNELS = integer(1, MAX_SIDE), list_of(number(0, 1e3), 3, 3)


@dataclass(frozen=True)
class Views:
    """How a run's views were cut, as `trainer.student.views_said` writes it.

    Attributes:
        exif: whether photos are turned as their EXIF orientation says: "ignore" or "apply".
        img_size: of the views, pixels.
        patch_size: of their patches, pixels.
        tokens: K, of the ticket that it was tested on; where it varies, its mean at most.
        feed: what a ticket becomes; None: the first of the model's family.
        resized: its tickets were whole views at K coarser patches.
        share, sizes: how K varies, see `trainer.data.lengths`; None where it does not.
    """

    exif: str
    img_size: int
    patch_size: int
    tokens: int
    feed: str | None
    resized: bool
    share: float | None = None
    sizes: tuple[int, ...] | None = None


VIEWS: Check = fields(
    {
        "exif": one_of("ignore", "apply"),
        "img_size": SIDE,
        "patch_size": SIDE,
        "tokens": integer(1, 1 << 30),
        "feed": or_null(text(100)),
        "resized": one_of(True, False),
    },
    {"share": number(0, 1), "sizes": list_of(integer(1, 65536), 1, 100)},
)
# What is read of config.json here; the rest is timm's.
SAID: Check = fields(
    {
        "architecture": text(200),
        "label_names": list_of(text(4096), 1, 1_000_000),
        "model_args": OBJECT,
        "pretrained_cfg": fields(
            {
                "input_size": list_of(SIDE, 3, 3),
                "crop_pct": number(0.01, 1),
                "crop_mode": one_of("center", "squash", "border"),
                "interpolation": one_of("bicubic", "bilinear", "lanczos"),
                "mean": CHANNELS,
                "std": list_of(number(1e-6, 1e3), 3, 3),
            }
        ),
    },
    {"views": VIEWS},
)


@dataclass(frozen=True)
class Student:
    """A trained student.

    Attributes:
        model: timm's, in eval mode.
        classes: in the order of its logits.
        views: None where the run's folder does not say: an older version wrote it.
    """

    model: Any
    classes: list[str]
    views: Views | None

    @property
    def exif(self) -> str:
        """As timm, where nothing is said."""
        return self.views.exif if self.views else "ignore"


def open_student(folder: str) -> Student:
    """The best epoch's weights of a run, the file that timm takes of its folder. Nothing in it is run.

    Raises:
        TicketSetError: no run, none of its epochs is over, or its files do not fit each other.
    """
    path = Path(folder, CONFIG)
    if not path.is_file():
        raise TicketSetError(
            f"`run` {folder}: expected the folder of a run of datalth-train whose first tested epoch is over, found no {CONFIG}"
        )
    with path.open("rb") as file:
        config = SAID(parse_json(file.read(MAX_CONFIG), str(path)), str(path))
    if ":" in config["architecture"]:  # timm would read another folder, or ask a hub
        raise TicketSetError(f"{path}: architecture: expected the name of a timm model, got {config['architecture']}")
    weights = path.with_name(checkpoint.BEST_WEIGHTS)
    if not weights.is_file():
        raise TicketSetError(f"`run` {folder}: expected its best weights, found no {weights.name}")
    checkpoint.check(weights, "run")
    # No file of its choice and nothing from a network, whatever its arguments say.
    own = {"pretrained_cfg": config["pretrained_cfg"], "checkpoint_path": ""}
    model = create(config["architecture"], "run", **_apart(own, config["model_args"], path))
    missing = load_weights(model, str(weights), "run")
    if missing or model.num_classes != len(config["label_names"]):
        expected = f"a classifier of the {len(config['label_names'])} classes of {CONFIG}"
        raise TicketSetError(f"`run` {weights}: expected {expected}, got {missing or model.num_classes}")
    views = config.get("views")
    known = Views(**{name: views[name] for name in Views.__dataclass_fields__ if name in views}) if views else None
    return Student(model.eval().requires_grad_(False), list(config["label_names"]), known)


def _apart(own: dict[str, Any], theirs: dict[str, Any], path: Path) -> dict[str, Any]:
    """Both together.

    Raises:
        TicketSetError: an argument of timm's that is none of a model.
    """
    taken = theirs.keys() & {*own, "pretrained", "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable"}
    if taken:
        raise TicketSetError(f"{path}: model_args: expected arguments of a model, got {min(taken)}")
    return own | theirs
