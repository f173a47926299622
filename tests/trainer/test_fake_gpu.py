"""What can be shown of a GPU without one: every family's step and test on fake CUDA tensors, and their gradients."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch._dynamo
from fakes import CUDA, OnHost, fake_tensors, faked
from test_families import KWARGS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError as NotMoved

from shards.token_labels import TOP
from trainer.data.loader import Batch, pinned
from trainer.engine import Setup, State, train_epoch, train_micro_batch
from trainer.evaluate import evaluate
from trainer.families.base import TicketModel
from trainer.families.dropping import DroppingViT
from trainer.families.registry import feed_of
from trainer.families.vit import TicketViT
from trainer.hooks import Hook
from trainer.optimizer import build_optimizer
from trainer.options import Machine, Optimization
from trainer.ranks import Rank

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN, HIERA = "swin_tiny_patch4_window7_224", "hiera_tiny_224"
# timm's name, feed, pixels of a view, of a patch, K, options.
CASES: dict[str, tuple[str, str | None, int, int, int, dict[str, Any]]] = {
    "ViT": ("deit_tiny_patch16_224", None, 64, 16, 6, SMALL),
    "Eva": ("eva02_tiny_patch14_224", None, 56, 14, 6, SMALL),
    "dropping ViT": ("deit_tiny_patch16_224", None, 64, 16, 16, SMALL),
    "dropping, fused": ("deit_tiny_patch16_224", None, 64, 16, 16, SMALL),
    "Swin, small-dense": (SWIN, "small-dense", 64, 16, 9, KWARGS[SWIN]),
    "Swin, zero": (SWIN, "zero", 64, 16, 6, KWARGS[SWIN]),
    "LV-ViT": ("lvvit_t", "late", 64, 16, 6, SMALL),
    "LV-ViT, early, MixToken": ("lvvit_t", "early", 64, 16, 6, SMALL),
    "LV-ViT, token labels": ("lvvit_t", "early", 64, 16, 6, SMALL),
    "Hiera": (HIERA, None, 96, 32, 4, KWARGS[HIERA]),
    "CNN": ("test_resnet", None, 64, 16, 6, {}),
}
FAMILIES = pytest.mark.parametrize("case", CASES)


def student_of(case: str) -> TicketModel:
    """Small, in training, on the host."""
    name, wanted, side, patch, tokens, options = CASES[case]
    feed, kind = feed_of(timm.create_model(name, **options), wanted)
    side_fed = kind.side_of(tokens, side, patch)
    size = kind.size_arguments(timm.create_model(name, **options), side_fed)
    model: Any = timm.create_model(
        name, num_classes=5, drop_path_rate=0.0 if name == "test_resnet" else 0.1, **options, **size
    )
    if "dropping" in case:
        return DroppingViT(model, (0,), 0.5, "fused" in case).train()
    return kind.wrap(model, feed, (side // patch,) * 2, patch, side_fed).train()


def batch_of(case: str, student: TicketModel) -> dict[str, Any]:
    """As the loader gives it, on the host."""
    _, _, side, patch, tokens, _ = CASES[case]
    n, views = (side // patch) ** 2, 4
    rows = n if student.wants_all else tokens
    batch: dict[str, Any] = {
        "patches": torch.zeros(views, rows, 3 * patch**2, dtype=torch.uint8),
        "keep_indices": torch.zeros(views, tokens, dtype=torch.int64),
        "labels": torch.zeros(views, dtype=torch.int64),
        "partners": torch.zeros(views, dtype=torch.int64),
        "lam": torch.zeros(views),
        "grid_width": OnHost(*[side // patch] * views),
        "erase": torch.zeros(views, 4, dtype=torch.int64),
    }
    if "MixToken" in case:
        batch["box"] = torch.zeros(4, dtype=torch.int64)
    if "labels" in case:
        batch["token_labels"] = torch.zeros(views, 2, TOP, 18, 18, dtype=torch.int32)
        batch |= {"boxes": torch.zeros(views, 4), "flips": torch.zeros(views, dtype=torch.bool)}
    return batch


def shown_batch(case: str, student: TicketModel) -> dict[str, Any]:
    """As the loader of validation gives it."""
    _, _, side, patch, _, _ = CASES[case]
    n = (side // patch) ** 2
    batch: dict[str, Any] = {
        "patches": torch.zeros(4, n, 3 * patch**2, dtype=torch.uint8),
        "rankings": torch.zeros(4, n, dtype=torch.int64),
        "labels": torch.zeros(4, dtype=torch.int64),
        "positions": OnHost(0, 1, 2, 3),
    }
    if student.whole_side != side:
        batch["whole"] = torch.zeros(4, (student.whole_side // patch) ** 2, 3 * patch**2, dtype=torch.uint8)
    return batch


class ForwardOnly:
    """A scaler under which a step ends with its loss: torch's autograd asks for a driver."""

    def scale(self, loss: Tensor) -> "ForwardOnly":
        assert loss.device == CUDA and loss.shape == () and loss.requires_grad
        return self

    def backward(self) -> None:
        pass

    def unscale_(self, optimizer: Any) -> None:
        pass

    def step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.zeros_like(weight)
        optimizer.step()

    def update(self) -> None:
        pass


def setup_and_state(student: TicketModel, scaler: Any, device: torch.device = CUDA) -> tuple[Setup, State]:
    """Of a student that lies on its device; timm's AdamW."""
    setup = Setup.of(student, Optimization(), Machine(log_interval=1000), Rank(device=device))
    return setup, State(student, student, *build_optimizer(student.model, Optimization(), 1e-3, 10), scaler)


def crossings_of_a_step(student: TicketModel, batch: dict[str, Any]) -> list[tuple[str, bool]]:
    """What crosses in the trainer's forward and loss, but for the tables of mean and std, which do once."""
    with fake_tensors() as crossings:
        setup, state = setup_and_state(faked(student), ForwardOnly())
        batch = pinned(batch)
        setup.normalized(batch["patches"].to(CUDA))
        crossings.seen.clear()
        train_micro_batch(state, batch, setup, 0, 0)
        return crossings.seen


@FAMILIES
def test_a_step_takes_its_batch_to_the_gpu_once_and_waits_for_nothing(case: str) -> None:
    student = student_of(case)
    batch = batch_of(case, student)
    assert crossings_of_a_step(student, batch) == [("cuda", False)] * len(batch)


def crossings_of_a_test(student: TicketModel, batch: dict[str, Any], tokens: int, protocols: list[str]) -> Any:
    """What crosses for a batch of validation, under all these protocols; but for the same tables."""
    with fake_tensors() as crossings:

        def batches() -> Iterator[Batch]:
            setup.normalized(batch["patches"].to(CUDA))
            crossings.seen.clear()
            yield pinned(batch)
            through.append([*crossings.seen])

        through: list[list[tuple[str, bool]]] = []
        setup, _ = setup_and_state(faked(student), ForwardOnly())
        try:
            evaluate({"": student}, batches(), protocols, tokens, 4, setup)
        except DataDependentOutputException:  # the figures that it gives at the end are values
            if not through:
                raise
        (seen,) = through
        return seen


@FAMILIES
def test_a_test_takes_each_batch_to_the_gpu_once_and_waits_for_nothing(case: str) -> None:
    student = student_of(case)
    batch, tokens = shown_batch(case, student), CASES[case][4]
    seen = crossings_of_a_test(student, batch, tokens, [*student.protocols])
    assert seen == [("cuda", False)] * (len(batch) + ("random" in student.protocols))  # these rankings are drawn there


def faulty(forward: Callable[[Tensor, Tensor, Tensor], Tensor]) -> TicketModel:
    """A ViT whose logits pass through a function (logits, patches, keep_indices) -> logits."""

    class Faulty(TicketViT):
        def forward(self, patches: Tensor, keep_indices: Tensor) -> Tensor:
            return forward(super().forward(patches, keep_indices), patches, keep_indices)

    return Faulty(student_of("ViT").model).train()


FAULTS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], type[Exception]]] = {
    "not moved": (lambda logits, patches, keep: logits + torch.arange(5), NotMoved),
    "not moved, an index": (lambda logits, patches, keep: logits.gather(1, torch.zeros(4, 5, dtype=torch.long)), NotMoved),
    "item": (lambda logits, patches, keep: logits / patches.max().item(), DataDependentOutputException),
    "branch": (lambda logits, patches, keep: logits if logits.sum() > 0 else -logits, DataDependentOutputException),
    "numpy": (lambda logits, patches, keep: logits + float(patches.cpu().numpy().mean()), RuntimeError),
    "nonzero": (lambda logits, patches, keep: logits + len(patches.nonzero()), DynamicOutputShapeException),
    "boolean mask": (lambda logits, patches, keep: logits + patches[patches > 0].sum(), DynamicOutputShapeException),
}  # fmt: skip
COPIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "from the host": lambda logits, patches, keep: logits + torch.arange(5.0).to(logits.device),
    "to the host": lambda logits, patches, keep: (logits, logits.cpu())[0],
    "made of numbers": lambda logits, patches, keep: logits + torch.tensor([1.0], device=logits.device),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_waits_or_does_not_move_a_tensor_is_caught(fault: str) -> None:
    forward, error = FAULTS[fault]
    with pytest.raises(error):
        crossings_of_a_step(faulty(forward), batch_of("ViT", student_of("ViT")))
    with pytest.raises(error):
        crossings_of_a_test(faulty(forward), shown_batch("ViT", student_of("ViT")), 6, ["tickets"])


@pytest.mark.parametrize("fault", COPIES)
def test_a_copy_that_the_host_waits_for_is_caught(fault: str) -> None:
    seen = crossings_of_a_step(faulty(COPIES[fault]), batch_of("ViT", student_of("ViT")))
    assert sum(waits for _, waits in seen) == 1


def test_an_epoch_waits_for_the_gpu_only_where_it_ends() -> None:
    """The trainer's loop with AdamW and clipping; only its last step looks at losses."""
    student = student_of("ViT")
    batch = batch_of("ViT", student)
    with fake_tensors() as crossings:
        setup, state = setup_and_state(faked(student), ForwardOnly())
        setup = replace(setup, optimization=replace(setup.optimization, clip_grad=1.0))
        with pytest.raises(DataDependentOutputException):
            train_epoch(state, iter([pinned(batch)] * 3), 3, setup, Silent())
    assert state.step == 3
    assert crossings.waits <= 2  # the tables of mean and std


class Silent(Hook):
    """Places where nothing is done."""

    before_step = before_update = after_update = share = log = save = lambda self, *_: None  # type: ignore[assignment]

    def stop_requested(self) -> bool:
        return False


def gradients(student: TicketModel, batch: dict[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Shapes, by the real step with its backward, on fake tensors of the host."""
    host = torch.device("cpu")
    with fake_tensors():
        setup, state = setup_and_state(faked(student, host), torch.amp.GradScaler("cpu", enabled=False), host)
        train_micro_batch(state, batch, setup, 0, 0)
    return {n: None if p.grad is None else tuple(p.grad.shape) for n, p in student.model.named_parameters()}


@FAMILIES
def test_every_weight_has_a_gradient_of_its_shape(case: str) -> None:
    student = student_of(case)
    shapes = {name: tuple(weight.shape) for name, weight in student.model.named_parameters()}
    assert gradients(student, batch_of(case, student)) == shapes


def test_a_part_that_is_cut_off_has_no_gradient() -> None:
    student = student_of("ViT")
    block = student.model.blocks[0]
    block.register_forward_hook(lambda module, inputs, output: output.detach())
    found = gradients(student, batch_of("ViT", student))
    cut = {name for name, shape in found.items() if shape is None}
    assert {name.split(".")[0] for name in cut} >= {"patch_embed", "pos_embed"} and "blocks.0.mlp.fc1.weight" in cut
    assert "blocks.1.mlp.fc1.weight" not in cut


def graphs(case: str, student: TicketModel, tokens: list[int], backend: str) -> int:
    """Compiled for steps of so many patches, one after the other, of normalization and student; none may break."""
    torch._dynamo.reset()
    counted = CompileCounterWithBackend(backend)
    setup, batch = Setup.of(student, Optimization(), Machine(), Rank()), batch_of(case, student)

    def forward(patches: Tensor, keep: Tensor, extras: dict[str, Tensor]) -> Any:
        return student(setup.normalized(patches), keep, **extras)

    compiled = torch.compile(forward, backend=counted, fullgraph=True)
    extras = {name: batch[name] for name in student.extras if name in batch}
    for count in tokens:
        keep = torch.arange(count).expand(4, -1).contiguous()
        patches = batch["patches"] if student.wants_all else batch["patches"][:, :1].expand(-1, count, -1).contiguous()
        outputs = compiled(patches, keep, extras)
        sum(logits.sum() for logits in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    return counted.frame_count


@pytest.mark.long
def test_a_vit_compiles_whole_and_once_more_for_all_other_k() -> None:
    """As at the unmasked epochs."""
    assert graphs("ViT", student_of("ViT"), [6, 6, 16, 9], "aot_eager") == 2


# Their forwards are among the others.
@pytest.mark.long
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("ViT", "LV-ViT, token labels")])
def test_every_student_compiles_whole(case: str) -> None:
    assert graphs(case, student_of(case), [CASES[case][4]], "eager") == 1


@pytest.mark.slow
def test_a_break_in_the_graph_is_caught() -> None:
    def broken(logits: Tensor, patches: Tensor, keep: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return logits

    with pytest.raises(torch._dynamo.exc.Unsupported):
        graphs("ViT", faulty(broken), [6], "eager")
