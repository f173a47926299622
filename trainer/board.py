"""TensorBoard and Weights & Biases, each behind its flag and its extra."""

import hashlib
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
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise TicketSetError("--log-tensorboard: pip install 'datalth[tensorboard]'") from None
            self._tensorboard = SummaryWriter(str(folder))
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise TicketSetError("--wandb-project: pip install 'datalth[wandb]'") from None
            assert folder is not None
            # The run's own id, so that a resumed run goes on in its page.
            identity = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
            self._wandb = wandb.init(
                project=wandb_project, name=folder.name, id=identity, resume="allow", config=arguments
            )

    def write(self, epoch: int, figures: dict[str, float]) -> None:
        """Log one epoch."""
        if self._tensorboard is not None:
            for name, value in figures.items():
                self._tensorboard.add_scalar(name, value, epoch)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(figures, step=epoch)
