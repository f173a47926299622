"""What datalth-weights mine is told beside the settings of its trainings. No torch."""

from dataclasses import dataclass
from typing import Any, Literal

import click

from shards.console import Finite
from shards.errors import TicketSetError
from shards.flags import Settings, setting
from trainer.options import COUNT, POSITIVE

METHODS = ("imp", "oneshot", "rst", "soup", "random")  # others are module:function, one's own score
OF_METHOD = {
    "transform_epochs": ("rst",), "mining_lr": ("rst", "soup"), "power": ("rst",), "soup_runs": ("soup",), "soup_epochs": ("soup",),
}  # fmt: skip


@dataclass(frozen=True)
class Mining(Settings):
    """How a weight ticket is found."""

    out: str = setting(metavar="DIR", help="Folder of the weight ticket; the same command goes on where it stopped.")
    method: str = setting(
        "imp",
        metavar="METHOD",
        help="imp: magnitude, level by level. oneshot: one level. rst: a random part, the others pressed to zero."
        " soup: votes of short trainings. random. module:function: your own score.",
    )
    sparsity: float = setting(
        0.9, Finite(0, 1, min_open=True, max_open=True), "Share of the weights to remove.", metavar="S"
    )
    levels: int | None = setting(None, click.IntRange(1, 999), "In how many steps; each keeps the same share.", metavar="L", shown="imp: at most 20 % a step; else 1")  # fmt: skip
    scope: Literal["global", "layer"] | None = setting(
        None, help="All weights compete, or those of each tensor.", shown="global; rst and random: layer"
    )
    rewind_epochs: int = setting(0, COUNT, "Start from the weights of that epoch, not from the first.", metavar="K")
    prune: tuple[str, ...] = setting((), click.STRING, "Also prune weights of these names, as 'head.weight' (repeatable).", metavar="PATTERN")  # fmt: skip
    keep: tuple[str, ...] = setting((), click.STRING, "Leave these whole (repeatable).", metavar="PATTERN")
    transform_epochs: int | None = setting(None, POSITIVE, "rst: of each level's transformation.", metavar="E", shown="--epochs")  # fmt: skip
    mining_lr: float | None = setting(None, Finite(min=0, min_open=True), "rst, soup: the constant learning rate of their trainings.", metavar="LR", shown="0.3 of the recipe's")  # fmt: skip
    power: float = setting(1.0, Finite(min=0, min_open=True), "rst: weights shrink as (1 - t/T) ** P.", metavar="P")
    soup_runs: int = setting(5, POSITIVE, "soup: trainings that vote.", metavar="J")
    soup_epochs: int = setting(1, POSITIVE, "soup: of each.", metavar="E")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS and ":" not in self.method:
            raise TicketSetError(f"`method` {self.method}: expected one of {', '.join(METHODS)}, or module:function")
        if self.method in ("oneshot", "random") and self.levels not in (None, 1):
            raise TicketSetError(f"`levels` {self.levels}: {self.method} has one; imp and rst have more")
        for name, methods in OF_METHOD.items():
            if self.method not in methods and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise TicketSetError(f"`{name}`: of {' and '.join(methods)}, got `method` {self.method}")
        if self.rewind_epochs and self.method in ("rst", "soup", "random"):
            raise TicketSetError(
                f"`rewind_epochs`: {self.method} starts from the first weights; imp and oneshot can rewind"
            )
        if self.scope == "global" and self.method in ("rst", "random"):
            raise TicketSetError(f"`scope` global: chance has no scores that could compete; {self.method} takes layer")

    @property
    def own(self) -> dict[str, Any]:
        """The settings that only this method has."""
        return {name: getattr(self, name) for name, methods in OF_METHOD.items() if self.method in methods}
