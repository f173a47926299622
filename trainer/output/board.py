"""TensorBoard and Weights & Biases, each behind its flag and its extra."""

import hashlib
import importlib
from pathlib import Path
from typing import Any

from shards.errors import TicketSetError


class Board:
    """Passes an epoch's figures on; with no flag given it does nothing.

    Raises:
        TicketSetError: the package behind a flag is not installed.
    """

    def __init__(
        self,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        folder: Path | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        self._use_tensorboard, self._project = tensorboard, wandb_project
        self._folder, self._arguments = folder, arguments
        self._tensorboard: Any = None
        self._wandb: Any = None
        for wanted, module, extra in (
            (tensorboard, "torch.utils.tensorboard", "tensorboard"),
            (wandb_project, "wandb", "wandb"),
        ):
            try:
                if wanted:
                    importlib.import_module(module)
            except ImportError:
                raise TicketSetError(f"this flag needs {extra}: pip install 'datalth[{extra}]'") from None

    def _open(self) -> None:
        """At the first epoch's end: until then a run's folder holds nothing of theirs."""
        assert self._folder is not None
        if self._use_tensorboard and self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder))
        if self._project and self._wandb is None:
            import wandb

            # The run's own id, so that a resumed run goes on in its page.
            identity = hashlib.blake2b(str(self._folder.resolve()).encode(), digest_size=6).hexdigest()
            self._wandb = wandb.init(
                project=self._project, name=self._folder.name, id=identity, resume="allow", config=self._arguments
            )

    def write(self, epoch: int, figures: dict[str, float]) -> None:
        """Log one epoch."""
        self._open()
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(figures, step=epoch)
