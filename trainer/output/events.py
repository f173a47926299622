"""TensorBoard and Weights & Biases, each behind its setting and its extra."""

import hashlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import TicketSetError
from trainer.hooks import Epoch, Hook
from trainer.options import Output
from trainer.output.folder import RunFolder

if TYPE_CHECKING:
    from trainer.trainer import Trainer


class Events(Hook):
    """Passes an epoch's figures on to TensorBoard; Weights & Biases reads them there, by its own synchronization.

    Args:
        folder: of the run; comes before this among the hooks, and gives the events their place.
        output: says which is asked for.
    Raises:
        TicketSetError: the package behind a setting is not installed.
    """

    def __init__(self, folder: RunFolder, output: Output) -> None:
        self._folder, self._project = folder, output.wandb_project
        self._writer: Any = None
        wanted = ["torch.utils.tensorboard"] + (["wandb"] if self._project else [])
        for module in wanted:
            try:
                importlib.import_module(module)
            except ImportError:
                extra = "wandb" if self._project else "tensorboard"
                raise TicketSetError(f"this flag needs {extra}: pip install 'datalth[{extra}]'") from None

    def after_epoch(self, trainer: "Trainer", epoch: Epoch) -> None:
        if trainer.rank.number:
            return
        if self._writer is None:  # until the first epoch's end the run's folder holds nothing of theirs
            self._open(trainer, self._folder.path)
        self._writer.add_scalar("train_loss", epoch.loss, epoch.number)
        self._writer.add_scalar("lr", epoch.rates.highest, epoch.number)
        self._writer.add_scalar("lr_head", epoch.rates.head, epoch.number)
        for name, figures in epoch.results.items():
            for figure, value in figures.items():
                self._writer.add_scalar(f"{name}_{figure}", value, epoch.number)
        self._writer.flush()

    def _open(self, trainer: "Trainer", path: Path) -> None:
        if self._project:
            import wandb

            # The run's own id, so that a run that goes on does so in its page.
            identity = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
            wandb.init(
                project=self._project,
                name=path.name,
                id=identity,
                resume="allow",
                config=trainer.arguments(),
                sync_tensorboard=True,
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path))
