"""A GPU that is not there: torch's fake tensors know shape, dtype and device, and hold no values.

Under them whatever needs a value raises (`.item()`, a branch on data, `nonzero`, a boolean mask as index), and so does a
tensor that was not moved to the others' device. What else makes a host wait, a copy, is written down by `Crossings`.
Not shown: bf16 autocast, which torch turns off where there is no driver, and what kernels compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.families import patches

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
M = TypeVar("M", bound=nn.Module)


class Crossings(TorchDispatchMode):
    """Copies between host and device.

    Attributes:
        seen: of each where to (`cuda`, `cpu`), and whether the host waits for it, as for any from memory that is not locked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []
        self._locked: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:  # fake tensors have none
            self._locked.append(torch.empty_like(args[0]))
            return self._locked[-1]
        if torch.is_inference_mode_enabled() and func.namespace == "aten":  # `to` and its like come whole there
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        locked = kwargs.get("pin_memory", False)
        out = func(*args, **{**kwargs, "pin_memory": False} if locked else kwargs)
        if locked or (func is aten.detach.default and self._is_locked(args[0])):  # torch.empty gives a detached one
            self._locked.append(out)
        if func is aten._to_copy.default:
            self._copied(args[0], out, kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._copied(args[1], out, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif func is aten.lift_fresh.default and out.device.type == "cuda":  # torch.tensor(..., device="cuda")
            self.seen.append(("cuda", True))
        return out

    def _copied(self, source: Tensor, target: Tensor, promised: bool) -> None:
        host = source if target.device.type == "cuda" else target
        if source.device != target.device:
            self.seen.append((target.device.type, not (promised and self._is_locked(host))))

    def _is_locked(self, host: Tensor) -> bool:
        return any(host is tensor for tensor in self._locked)

    @property
    def waits(self) -> int:
        """Copies for which the host waits."""
        return sum(waits for _, waits in self.seen)


@contextmanager
def fake_tensors() -> Iterator[Crossings]:
    """All tensors made inside are fake; real ones count as such of the host."""
    patches._levels.cache_clear()  # its tensors outlive a step, and must not outlive the mode they belong to
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as crossings:
            yield crossings
    finally:
        patches._levels.cache_clear()


def faked(module: M, device: torch.device = CUDA) -> M:
    """The module, made outside, with fake weights on a device; inside of `fake_tensors`."""
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    fake: Tensor = torch.empty_like(tensor, device=device)
                    group[name] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
    return module


class OnHost:
    """A tensor of the host's that a step may read there: a fake one has no value."""

    def __init__(self, *values: int) -> None:
        self.values = values

    def __getitem__(self, number: int) -> int:
        return self.values[number]

    def tolist(self) -> list[int]:
        return [*self.values]

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Its fake."""
        return torch.zeros(len(self.values), dtype=torch.int64).pin_memory().to(device, non_blocking=non_blocking)

    def pin_memory(self) -> "OnHost":
        """As if it were."""
        return self
