"""timm's optimizer and schedule for a student, and the learning rates that they come to."""

from dataclasses import dataclass
from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

from miner.models import classifier_weights
from shards.errors import TicketSetError, first_line
from trainer.options import Optimization


def learning_rate_of(optimization: Optimization, global_batch: int) -> float:
    """The rate at its height: `lr`, or `lr_base` for each 512 images of a step."""
    return optimization.lr_base * global_batch / 512 if optimization.lr is None else optimization.lr


def build_optimizer(model: Any, optimization: Optimization, lr: float, steps: int) -> tuple[Any, Any]:
    """Optimizer and schedule before the first step, of the weights that have a gradient.

    Args:
        lr: at its height.
        steps: of an epoch.
    Raises:
        TicketSetError: timm does not know the optimizer or the schedule.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            optimization.opt,
            lr=lr,
            weight_decay=optimization.weight_decay,
            layer_decay=optimization.layer_decay,
            **optimization.opt_kwargs,
        )
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("second-order optimizers are not supported")
        if optimization.head_lr is not None:
            _split_head(optimizer, model, optimization.head_lr, lr)
        return optimizer, _schedule(optimizer, optimization, steps)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:  # timm's factories, for unknown names
        reason = first_line(error) if str(error) else "not supported here"
        raise TicketSetError(f"`opt` {optimization.opt}, `sched` {optimization.sched}, `lr` {lr:g}: {reason}") from None


def _split_head(optimizer: Any, model: Any, head_lr: float, lr: float) -> None:
    """Give the classifier groups of its own. Schedules multiply what they say, warm-up and end too, by `lr_scale`."""
    if lr == 0:
        raise TicketSetError("`head_lr`: expected `lr` above 0 beside it; `freeze` '*' trains the classifier alone")
    names = classifier_weights(model)
    head = {id(weight) for name, weight in model.named_parameters() if name in names}
    for group in list(optimizer.param_groups):
        own = [weight for weight in group["params"] if id(weight) in head]
        group["params"] = [weight for weight in group["params"] if id(weight) not in head]
        if own:
            optimizer.add_param_group({**group, "params": own, "lr_scale": head_lr / lr, "head": True})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _schedule(optimizer: Any, optimization: Optimization, steps: int) -> Any:
    # timm before 1.0.30 has no constant schedule; steps that are never taken are one.
    constant = {"sched": "step", "decay_epochs": optimization.epochs + 1}
    scheduler, _ = create_scheduler_v2(
        optimizer,
        **(constant if optimization.sched == "constant" else {"sched": optimization.sched}),
        num_epochs=optimization.epochs,
        min_lr=optimization.min_lr,
        warmup_lr=optimization.warmup_lr,
        warmup_epochs=optimization.warmup_epochs,
        step_on_epochs=False,  # a schedule by updates goes on in the middle of an epoch
        updates_per_epoch=steps,
    )
    if scheduler is None:
        raise ValueError("expected a schedule; constant leaves the learning rate as it is")
    scheduler.step_update(0)
    return scheduler


@dataclass(frozen=True)
class Rates:
    """Learning rates of an optimizer's groups; `layer_decay` gives lower layers less, `head_lr` the classifier another.

    Attributes:
        highest, lowest: of all but a classifier that has its own.
        head: the classifier's.
    """

    highest: float
    lowest: float
    head: float

    @classmethod
    def of(cls, optimizer: Any, lr: float | None = None) -> "Rates":
        """As they are, or where the schedule stands at `lr`."""
        groups: dict[bool, list[float]] = {True: [], False: []}
        for group in optimizer.param_groups:
            rate = group["lr"] if lr is None else lr * group.get("lr_scale", 1.0)
            groups[group.get("head", False)].append(rate)
        body = groups[False] or groups[True]  # a linear probe has the classifier alone
        return cls(max(body), min(body), max(groups[True] or body))

    def __str__(self) -> str:
        span = f"{self.highest:.3e}" if self.lowest == self.highest else f"{self.lowest:.3e}..{self.highest:.3e}"
        return span if self.head == self.highest else f"{span}, head {self.head:.3e}"
