"""datalth-train's flags as one object, and which of them a resumed run may change. No torch: the verdict reads it too."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """datalth-train's flags; timm's names."""

    shards: str  # "" with --eval --resume alone, until the run has said which
    token_labels: str | None
    base: str | None
    model: str
    feed: str | None
    tickets: str
    tokens: int | None
    resize_to_tokens: bool
    unmask_epochs: int
    drop_blocks: tuple[int, ...] | None
    keep_rate: float | None
    fuse_token: bool
    shrink_start_epoch: int
    shrink_epochs: int
    repeats: int
    train_split: str
    val_split: str
    pretrained: bool
    initial_checkpoint: str | None
    model_kwargs: dict[str, Any]
    drop_path: float
    grad_checkpointing: bool
    batch_size: int
    grad_accum_steps: int
    epochs: int
    opt: str
    opt_kwargs: dict[str, Any]
    momentum: float
    layer_decay: float | None
    lr: float | None
    lr_base: float
    weight_decay: float
    clip_grad: float | None
    clip_mode: str
    sched: str
    warmup_epochs: int
    warmup_lr: float
    min_lr: float
    smoothing: float
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    mix_token: bool
    aa: str
    color_jitter: float
    reprob: float
    model_ema: bool
    model_ema_decay: float
    amp: bool
    amp_dtype: str
    torchcompile: bool
    device: str | None
    seed: int
    workers: int
    log_interval: int
    recovery_interval: int
    output: str
    experiment: str | None
    resume: str | None
    eval: bool
    log_tensorboard: bool
    wandb_project: str | None


# What a resumed run may say otherwise. The global batch may not change: it decides the samples. Splitting it otherwise over
# ranks and steps keeps the samples, but draws other drop paths and erasing noise.
FREE_TO_CHANGE = frozenset(
    ["resume", "eval", "workers", "device", "torchcompile", "log_interval", "recovery_interval", "output", "experiment"]
    + [
        "log_tensorboard",
        "wandb_project",
        "shards",
        "base",
        "token_labels",
        "world_size",
        "grad_accum_steps",
        "batch_size",
    ]
    + ["initial_checkpoint", "pretrained"]
)
# What args.yaml holds beside the flags.
DERIVED = frozenset(
    ["set_id", "base_set_id", "labels_set_id", "set_method", "world_size", "global_batch", "resolved_tokens"]
)
