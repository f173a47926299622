"""The settings of a training run, in groups that say what they are of; datalth-train's flags are made from them.

Names are timm's where timm has the setting; defaults are DeiT's recipe for ImageNet. No torch: the verdict reads it too.
"""

import ast
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import click

from miner.drop import DEFAULT_KEEP_RATE, parse_blocks
from shards.console import Finite
from shards.errors import TicketSetError
from shards.flags import Settings, marked, setting

Arm = Literal["winning", "random", "random-fixed", "gaussian", "center", "inverse", "full"]
ARMS: tuple[str, ...] = get_args(Arm)
PROTOCOLS = ("tickets", "all", "random")  # how a student is tested
WeightArm = Literal["winning", "reinit", "shuffled", "random", "dense"]
WEIGHT_ARMS: tuple[str, ...] = get_args(WeightArm)
# What args.yaml holds of a run's weight ticket beside its settings; of a run without one each is None.
WEIGHT_DERIVED = (
    "weight_ticket_id", "weight_group_id", "weight_method", "weight_sparsity", "weight_from", "weight_start_id",
)  # fmt: skip

POSITIVE, COUNT = click.IntRange(min=1), click.IntRange(min=0)
SHARE, AMOUNT = Finite(0, 1), Finite(min=0)
FREE = frozenset(["free"])  # what a resumed run may say otherwise


def key_values(texts: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE each; values are Python literals where they are some, else text.

    Raises:
        TicketSetError: no NAME=VALUE, or a value that no file of ours could hold.
    """
    out: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise TicketSetError(f"expected NAME=VALUE, got {text!r}")
        try:
            out[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # text, or what is no literal
            out[name] = value
        try:
            json.dumps(out[name])  # config.json holds them too
        except (TypeError, ValueError, RecursionError):
            raise TicketSetError(
                f"{name}: expected numbers, text, True, False, None or lists of them, got {value:.80}"
            ) from None
    return out


def cores() -> int:
    """Worker processes where none are asked for; outside Linux, whose sockets and memory they need, none."""
    return min(4, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else 0


@dataclass(frozen=True)
class Data(Settings):
    """Where samples come from. None may be another place when a run goes on: what they must be is in their ids."""

    shards: str | None = setting(
        None,
        metavar="DIR",
        help="Ticket set, plain or linked.  [required, but for --eval --resume: the run's own]",
        marks=FREE,
    )
    token_labels: str | None = setting(
        None,
        metavar="DIR|none",
        help="Set with token labels of the same images, for LV-ViT; none: use none.  [default: the ticket set's own]",
        marks=FREE,
    )
    base: str | None = setting(None, metavar="DIR", help="Where the base of a linked set is now.", marks=FREE)
    cache: str | None = setting(
        None,
        metavar="DIR",
        help="Where tars of a remote set are copied to, once for all runs and ranks of a machine.",
        shown="datalth-UID in the folder of temporary files",
        marks=FREE,
    )
    cache_size: float | None = setting(
        None, AMOUNT, "What copies may take of its disk.", metavar="GB", shown="half of what is free", marks=FREE
    )
    train_split: str = setting("train")
    val_split: str = setting("val")


def parse_tokens(value: Any) -> int | str | None:
    """K, or auto:K: as many of each view as its scores ask for, K on average.

    Args:
        value: text, or a program's value.
    Raises:
        TicketSetError: neither.
    """
    if value is None or (type(value) is int and value > 0):
        return value
    found = re.fullmatch(r"(auto:)?([1-9][0-9]{0,8})", value) if isinstance(value, str) else None
    if found is None:
        raise TicketSetError(f"expected K or auto:K, K a whole number above 0, got {value!r:.80}")
    return value if found[1] else int(value)


@dataclass(frozen=True)
class Tickets(Settings):
    """Which patches of which views are trained on."""

    tickets: Arm = setting("winning", help="Which patches to train on.")
    tokens: int | str | None = setting(
        None,
        metavar="K|auto:K",
        help="Another K of the same rankings. auto:K: of each view as many as its scores ask for, K on average.",
        shown="the set's",
        parse=parse_tokens,
    )
    resize_to_tokens: bool = setting(
        False,
        help="The control of the same cost: the whole view at K coarser patches; with --unmask-epochs until these begin.",
    )
    unmask_epochs: int = setting(0, COUNT, "Train the last E epochs on all patches.")
    repeats: int = setting(3, POSITIVE, "Views replayed per decode (repeated augmentation).")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            parsed = parse_tokens(self.tokens)
        except TicketSetError as error:
            raise TicketSetError(f"`tokens`: {error}") from None
        if type(parsed) is not type(self.tokens):  # a program's "98" is no number, as in all other fields
            raise TicketSetError(f"`tokens`: expected the number {parsed}, got {self.tokens!r}")
        if self.varying and (self.tickets == "full" or self.resize_to_tokens):
            what = "`resize_to_tokens`" if self.resize_to_tokens else "`tickets` full"
            raise TicketSetError(f"`tokens` {self.tokens}: {what} has one number of patches for all views; give K")

    @property
    def varying(self) -> bool:
        """Whether K differs from view to view."""
        return isinstance(self.tokens, str) and self.tokens.startswith("auto:")

    @property
    def count(self) -> int | None:
        """K, or its mean where it varies; None: the set's."""
        return int(str(self.tokens).removeprefix("auto:")) if self.tokens is not None else None

    @property
    def coarse_first(self) -> bool:
        """Whether whole views are shown in coarser patches until the last epochs show all."""
        return self.resize_to_tokens and self.unmask_epochs > 0


@dataclass(frozen=True)
class Model(Settings):
    """timm's model, and what it starts from."""

    model: str = setting(
        "deit_tiny", help="timm ViT, Swin, Hiera or CNN, lvvit_t|s|m, or deit_tiny|deit_small|deit_base."
    )
    feed: str | None = setting(
        None,
        metavar="NAME",
        help="What a ticket becomes: small-dense or zero for Swin, late or early for LV-ViT; other models have one way.",
        shown="the first",
    )
    pretrained: bool = setting(False, help="Start from timm's pretrained weights.", marks=FREE)
    initial_checkpoint: str | None = setting(None, metavar="FILE", help="Start from these weights.", marks=FREE)
    model_kwargs: dict[str, Any] = setting(
        dict, metavar="NAME=VALUE", help="For timm.create_model (repeatable).", parse=key_values
    )
    freeze: str | None = setting(
        None,
        metavar="PATTERN,...",
        help="Keep these weights as they start, by shell patterns of their names: 'blocks.[0-5],*_embed'; '*' is a linear"
        " probe. The classifier always learns.",
    )
    drop_path: float = setting(0.1, SHARE, "Stochastic depth.")
    grad_checkpointing: bool = setting(False, help="Less memory, more time.")


@dataclass(frozen=True)
class Weights(Settings):
    """Which weights are trained at all: an arm of a weight ticket, for any data arm and any family."""

    weight_ticket: str | None = setting(
        None,
        metavar="DIR",
        help="A weight ticket of datalth-weights: train its weights alone, from its start.",
        marks=FREE,
    )
    weight_level: int | None = setting(None, POSITIVE, "Another level of it.", metavar="N", shown="the last")
    weight_arm: WeightArm = setting(
        "winning",
        help="reinit: the mask, fresh weights. shuffled: as many weights a layer, other places. random: another mask of"
        " the same sparsity. dense: its start, no mask.",
    )
    weight_start: str | None = setting(
        None, metavar="DIR", help="For reinit of a ticket that starts later: another seed's, for its start.", marks=FREE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_ticket is None:
            given = {"weight_level": self.weight_level, "weight_start": self.weight_start}
            given["weight_arm"] = self.weight_arm if self.weight_arm != "winning" else None
            for name, value in given.items():
                if value is not None:
                    raise TicketSetError(f"`{name}` {value}: of a weight ticket; give `weight_ticket` too")
        if self.weight_start is not None and self.weight_arm != "reinit":
            raise TicketSetError(f"`weight_start`: expected `weight_arm` reinit beside it, got {self.weight_arm}")


@dataclass(frozen=True)
class Dropping(Settings):
    """Of a model that drops patches inside: a ticket selector that is trained."""

    drop_blocks: tuple[int, ...] | None = setting(
        None,
        metavar="B,B,...",
        help="Train a ticket selector: drop patches inside, at these blocks.",
        parse=parse_blocks,
    )
    keep_rate: float | None = setting(
        None, Finite(0, 1, min_open=True), "Of each drop block.", shown=f"{DEFAULT_KEEP_RATE:g}"
    )
    fuse_token: bool = setting(False, help="EViT's: what a block drops goes on as one token.")
    shrink_start_epoch: int = setting(0, COUNT, "Keep all patches until then.")
    shrink_epochs: int = setting(0, COUNT, "Then go down to --keep-rate over as many epochs.")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name, value in vars(self).items() if value and name != "drop_blocks"]
        if given and self.drop_blocks is None:
            raise TicketSetError(
                f"`{given[0]}`: of a selector that drops patches inside; give `drop_blocks` too."
                " How much of a view a ticket holds is mined; `tokens` takes another K of its ranking"
            )


@dataclass(frozen=True)
class Augment(Settings):
    """What is done to pixels; boxes and flips are mined. Mixup and CutMix mix neighbors of a batch."""

    mixup: float = setting(0.8, AMOUNT, "Alpha; 0: off.")
    cutmix: float = setting(1.0, AMOUNT, "Alpha; 0: off.")
    mixing: Literal["pixels", "patches"] = setting(
        "pixels",
        help="pixels: timm's mixup and CutMix of whole views. patches: the best patches of one view and of the other, as many as their share; of ranked views these alone are read. All patches are always mixed by pixels.",
    )
    mix_token: bool = setting(False, help="LV-ViT's own CutMix, on tokens; with --mixup 0 --cutmix 0.")
    aa: str = setting("rand-m9-mstd0.5-inc1", help="timm's policy; geometric ops leave the view as it is.")
    color_jitter: float = setting(0.4, AMOUNT, "Where there is no --aa.")
    reprob: float = setting(0.25, SHARE, "Random erasing.")

    @property
    def mixes(self) -> bool:
        """Whether there is mixup or CutMix."""
        return self.mixup > 0 or self.cutmix > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixes and self.mix_token:
            raise TicketSetError("`mix_token`: expected `mixup` 0 `cutmix` 0 beside it")


@dataclass(frozen=True)
class Optimization(Settings):
    """From a loss to new weights. Splitting the global batch otherwise over ranks and steps keeps its samples."""

    batch_size: int = setting(128, POSITIVE, "Per device.", short="-b", marks=FREE)
    grad_accum_steps: int = setting(1, POSITIVE, "Batches summed before an update.", marks=FREE)
    epochs: int = setting(300, POSITIVE, "Each as many views as there are images.")
    opt: str = setting("adamw", help="A timm optimizer.")
    opt_kwargs: dict[str, Any] = setting(
        dict, metavar="NAME=VALUE", help="For the optimizer, such as momentum=0.9 (repeatable).", parse=key_values
    )
    layer_decay: float | None = setting(
        None, Finite(0, 1, min_open=True), "Learning rate times D a layer down; for fine-tuning.", metavar="D"
    )
    head_lr: float | None = setting(
        None, AMOUNT, "Absolute, of the classifier at its height; for fine-tuning.", metavar="LR", shown="as the others"
    )
    lr: float | None = setting(None, AMOUNT, "Absolute; overrides --lr-base.")
    lr_base: float = setting(5e-4, AMOUNT, "Per 512 images of the global batch.")
    weight_decay: float = setting(0.05, AMOUNT)
    clip_grad: float | None = setting(None, AMOUNT, "Clip the norm of gradients at X.", metavar="X")
    sched: str = setting("cosine", help="A timm scheduler.")
    warmup_epochs: int = setting(5, COUNT)
    warmup_lr: float = setting(1e-6, AMOUNT)
    min_lr: float = setting(1e-5, AMOUNT)
    smoothing: float = setting(0.1, SHARE, "Label smoothing.")
    model_ema: bool = setting(True, help="Average the weights over the steps too.")
    model_ema_decay: float = setting(0.99996, Finite(0, 1, max_open=True))


@dataclass(frozen=True)
class Machine(Settings):
    """Where and how it is computed, and how often it is saved."""

    amp: bool = setting(False, help="Mixed precision.")
    amp_dtype: Literal["float16", "bfloat16"] = setting("float16")
    torchcompile: bool = setting(False, help="torch.compile the model.", marks=FREE)
    device: str | None = setting(None, help="cuda, cpu.", shown="cuda where there is one", marks=FREE)
    seed: int = setting(42, click.IntRange(0, 2**63 - 1))
    workers: int = setting(
        cores,
        COUNT,
        "Processes that read and decode.",
        short="-j",
        shown="4, or as many as there are cores",
        marks=FREE,
    )
    val_interval: int = setting(1, POSITIVE, "Validate every E epochs, and after the last.", metavar="E", marks=FREE)
    log_interval: int = setting(50, POSITIVE, metavar="STEPS", marks=FREE)
    recovery_interval: int = setting(0, COUNT, "Save within an epoch.", metavar="STEPS", marks=FREE)


@dataclass(frozen=True)
class Boards(Settings):
    """Where figures go beside a run's own files."""

    log_tensorboard: bool = setting(
        False, help="Also write TensorBoard events; pip install 'datalth[tensorboard]'.", marks=FREE
    )
    wandb_project: str | None = setting(
        None, metavar="NAME", help="Also log to Weights & Biases; pip install 'datalth[wandb]'.", marks=FREE
    )


@dataclass(frozen=True)
class Output(Boards):
    """Which run this is, and where its files are."""

    output: str = setting("output", metavar="DIR", help="Folder of the runs.", marks=FREE)
    experiment: str | None = setting(
        None, metavar="NAME", help="Folder of this run.", shown="time, model, tickets", marks=FREE
    )
    resume: str | None = setting(
        None,
        metavar="PATH|latest",
        help="Go on from a run's folder or checkpoint; latest: from --experiment's, if it has begun.",
        marks=FREE,
    )
    eval: bool = setting(False, help="Only validate, under all protocols that apply.", marks=FREE)


@dataclass(frozen=True)
class Recipe:
    """All that decides a training: the set is named by `data`, how it is computed by `machine`."""

    data: Data = field(default_factory=Data)
    tickets: Tickets = field(default_factory=Tickets)
    model: Model = field(default_factory=Model)
    weights: Weights = field(default_factory=Weights)
    dropping: Dropping = field(default_factory=Dropping)
    augment: Augment = field(default_factory=Augment)
    optimization: Optimization = field(default_factory=Optimization)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        tickets, epochs = self.tickets, self.optimization.epochs
        if tickets.unmask_epochs > epochs:
            raise TicketSetError(f"`unmask_epochs` {tickets.unmask_epochs}: expected at most `epochs` {epochs}")
        if self.dropping.drop_blocks is None:
            return
        if tickets.tickets != "full" or tickets.resize_to_tokens:
            raise TicketSetError("`drop_blocks` trains a ticket selector: expected `tickets` full beside it")
        if tickets.tokens or tickets.unmask_epochs:
            name = "tokens" if tickets.tokens else "unmask_epochs"
            raise TicketSetError(f"`{name}`: of students; a selector sees all patches and drops by `keep_rate`")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Recipe":
        """Groups out of names and values, such as a command's; those of `Output` are left alone.

        Raises:
            TicketSetError: no such name, a value that its field does not take, or values that do not go together.
        """
        known = [one.name for group in GROUPS for one in fields(group)]  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise TicketSetError(f"no such setting: {name}{f'; near: {near[0]}' if near else ''}")
        groups = {group.name: group.default_factory for group in fields(cls)}
        return cls(**{name: group_of(group, values) for name, group in groups.items()})

    def flat(self) -> dict[str, Any]:
        """Names and values, as a file holds them."""
        return {name: value for group in fields(self) for name, value in asdict(getattr(self, group.name)).items()}

    def but(self, **changes: Any) -> "Recipe":
        """The same with other values of some fields."""
        return Recipe.of(self.flat() | changes)


def group_of(group: Any, values: Mapping[str, Any]) -> Any:
    """A group out of names and values.

    Raises:
        TicketSetError: a value that its field does not take.
    """
    return group(**{one.name: values[one.name] for one in fields(group) if one.name in values})


GROUPS: tuple[type[Settings], ...] = (Data, Tickets, Model, Weights, Dropping, Augment, Optimization, Machine, Output)
FREE_TO_CHANGE = marked("free", *GROUPS) | {"world_size"}
# Settings that came later: a plan leaves them out where they are unset, so that a weight ticket of before is still of it.
LATER = frozenset(["freeze", "head_lr"])
# What args.yaml holds beside the settings.
DERIVED = frozenset(
    [
        "set_id",
        "base_set_id",
        "labels_set_id",
        "set_method",
        "world_size",
        "global_batch",
        "resolved_tokens",
        "resolved_share",
    ]
).union(WEIGHT_DERIVED)
