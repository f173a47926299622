"""This process among those of a run: torchrun's, or one alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.utils import distribute_bn

from miner.models import choose_device
from shards.errors import TicketSetError, first_line
from shards.ranks import rank_and_world

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """Which of how many processes this is, and where it computes.

    Attributes:
        number: from 0.
        size: how many there are.
        device: of this one.
        hosts: a group whose words travel between the hosts' memories, so that no step waits for a device.
    """

    number: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    hosts: Any = None

    @classmethod
    def start(cls, name: str | None = None) -> "Rank":
        """Take this process's place, and meet the others.

        Args:
            name: of the device; None: a GPU where there is one.
        Raises:
            TicketSetError: no such place among the processes, no such device, or the others are not to be had.
        """
        number, size = rank_and_world()
        device = choose_device(name, ("cuda", "cpu"))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if size == 1:
            return cls(device=device)
        try:
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        except (ValueError, RuntimeError) as error:
            raise TicketSetError(f"WORLD_SIZE {size}: no process group, {first_line(error)}") from None
        return cls(number, size, device, torch.distributed.new_group(backend="gloo"))

    def on_first(self, action: Callable[[], T]) -> T:
        """Do on rank 0 what touches the disk; all ranks get its result, or raise its error.

        Raises:
            TicketSetError, OSError: the action's.
        """
        answer: list[Any] = [None]
        if self.number == 0:
            try:
                answer = [action()]
            except (TicketSetError, OSError) as error:
                answer = [error]
        if self.size > 1:
            torch.distributed.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def greatest(self, number: int) -> int:
        """The greatest of all ranks' numbers; all hear it at the same step."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return int(found)

    def mean(self, values: torch.Tensor) -> list[float]:
        """The mean of all ranks' values."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return (values / self.size).tolist()

    def share_batch_norm(self, model: Any) -> None:
        """Give all ranks the mean of their running averages: validation and checkpoints are then of one model."""
        if self.size > 1:
            distribute_bn(model, self.size, reduce=True)
