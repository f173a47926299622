"""What may come into a training at fixed places: averages, falling keep rates, files, figures for others; weight masks, regularizers.

    epoch:  before_epoch | before_step, forward and backward, before_update, after_update | ... | save | validation | after_epoch
    run:    begin | epochs | at_end

A hook sees the trainer as it is and may change its weights; validation never does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from trainer.evaluate import Figures
    from trainer.families.base import TicketModel
    from trainer.optimizer import Rates
    from trainer.trainer import Trainer


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over.

    Attributes:
        number: from 0.
        loss: mean over its steps and all ranks.
        rates: the learning rates at its end.
        results: figures by protocol; those of a hook's models under its prefix and the protocol. Empty where the epoch was
            not tested, see `val_interval`.
        metric: top-1 under the student's own protocol; None where it was not tested.
        is_best: no epoch before it had a better one.
    """

    number: int
    loss: float
    rates: "Rates"
    results: "Mapping[str, Figures]"
    metric: float | None
    is_best: bool


class Hook:
    """Base of hooks; each place does nothing unless it is overridden. Hooks are called in the order they were given in,
    on every rank.

    Attributes:
        prefixes: of the figures of all that `also_tested` may ever give.
    """

    prefixes: tuple[str, ...] = ()

    def begin(self, trainer: "Trainer") -> None:
        """Before the first step of this process, after a checkpoint was restored."""

    def before_epoch(self, trainer: "Trainer") -> None:
        """`trainer.state.epoch` begins, or goes on at `trainer.state.step`."""

    def before_step(self, trainer: "Trainer", update: int) -> None:
        """Before the forward of an update, counted since epoch 0."""

    def before_update(self, trainer: "Trainer", update: int) -> None:
        """Gradients are whole, summed over micro-batches and ranks; not clipped yet, and under AMP still scaled."""

    def after_update(self, trainer: "Trainer", update: int) -> None:
        """The optimizer has made update number `update`; the schedule has not stepped yet."""

    def log(self, trainer: "Trainer", figures: Mapping[str, float]) -> None:
        """Every `log_interval` steps and at an epoch's end: the step's loss, and of the steps since the last time images of
        a rank, seconds, and seconds waited for data."""

    def share(self, trainer: "Trainer") -> None:
        """An epoch's last step is over: whatever each rank has for itself, as running averages, becomes the same."""

    def save(self, trainer: "Trainer") -> None:
        """Within an epoch, at its end before validation, and where a signal stops it: the state is at a step's border."""

    def after_epoch(self, trainer: "Trainer", epoch: Epoch) -> None:
        """Trained, and tested where it was due; `trainer.state` stands at the next epoch."""

    def at_end(self, trainer: "Trainer", results: "Mapping[str, Figures]", answers: Tensor) -> None:
        """All epochs are over.

        Args:
            results: figures by protocol.
            answers: int32 [protocols, images], the class that each image was given, in stored order.
        """

    def also_tested(self, trainer: "Trainer") -> "dict[str, TicketModel]":
        """Other models to test beside the student, by the prefix of their figures."""
        return {}

    def on_save(self, trainer: "Trainer") -> dict[str, Any]:
        """What a checkpoint holds for this hook, under names of its own: plain values and tensors."""
        return {}

    def on_restore(self, trainer: "Trainer", content: Mapping[str, Any]) -> None:
        """Take it back out of a checkpoint.

        Raises:
            KeyError, RuntimeError: it is not in there, or does not fit.
        """


class Average(Hook):
    """timm's exponential moving average of the weights (`model_ema`), tested and saved once it has seen enough."""

    prefixes = ("ema_",)

    def __init__(self, model: Any, decay: float) -> None:
        from timm.utils import ModelEmaV3

        self.decay = decay
        self.ema = ModelEmaV3(model, decay=decay, use_warmup=True)

    def is_mature(self, trainer: "Trainer") -> bool:
        """An average over 1 / (1 - decay) updates has seen as many."""
        return trainer.own_updates > 1 / (1 - self.decay)

    def after_update(self, trainer: "Trainer", update: int) -> None:
        self.ema.update(trainer.student.model, step=trainer.own_updates + 1)

    def share(self, trainer: "Trainer") -> None:
        trainer.rank.share_batch_norm(self.ema.module)

    def also_tested(self, trainer: "Trainer") -> "dict[str, TicketModel]":
        return {"ema_": trainer.student.with_weights_of(self.ema.module)} if self.is_mature(trainer) else {}

    def on_save(self, trainer: "Trainer") -> dict[str, Any]:
        # timm prefers state_dict_ema to state_dict. An average that has seen too little is no model yet.
        name = "state_dict_ema" if self.is_mature(trainer) else "early_ema"
        return {name: self.ema.module.state_dict()}

    def on_restore(self, trainer: "Trainer", content: Mapping[str, Any]) -> None:
        # "young_ema" is what early_ema was called in checkpoints of before.
        found = content.get("state_dict_ema") or content.get("early_ema") or content["young_ema"]
        self.ema.module.load_state_dict(found)


class Beside(Hook):
    """Another timm model of the student's kind, tested beside it.

    Args:
        prefix: of its figures.
    """

    def __init__(self, prefix: str, model: Any) -> None:
        self.prefixes, self._model = (prefix,), model

    def also_tested(self, trainer: "Trainer") -> "dict[str, TicketModel]":
        return {self.prefixes[0]: trainer.student.with_weights_of(self._model)}
