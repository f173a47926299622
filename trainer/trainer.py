"""Training as a library call: a ticket set, a recipe, hooks -> epochs.

trainer = Trainer(TicketSet.open("shards"), Recipe(tickets=Tickets(tokens=98)), [RunFolder(Path("output/winning"))])
trainer.fit()

What is written and what is said come in by hooks; `trainer.output` has those of datalth-train.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from miner.models import choose_device
from shards.copies import TarCopies
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.costs import costs, sparse_gmacs
from trainer.data.dataset import TicketDataset, ValidationDataset, Views, loader
from trainer.data.lengths import PARTS
from trainer.data.loader import Batch
from trainer.engine import Setup, State, Stopped, is_better, train_epoch, train_micro_batch
from trainer.evaluate import Figures, evaluate
from trainer.families.base import TicketModel
from trainer.families.dropping import FallingKeepRate
from trainer.freeze import freeze
from trainer.hooks import Average, Epoch, Hook
from trainer.optimizer import Rates, build_optimizer, learning_rate_of
from trainer.options import WEIGHT_DERIVED, Data, Machine, Optimization, Recipe
from trainer.ranks import Rank
from trainer.student import build_student
from trainer.weights.masks import Masked
from trainer.weights.subnetwork import Subnetwork


class Trainer:
    """Trains a student on a ticket set, and tests it. A function of the recipe: stopped and restored (see
    `trainer.output.checkpoint.restore`), or on other workers, it gives the same weights.

    Args:
        opened: the set; `shards.verify` checks it.
        recipe: all settings.
        hooks: called at fixed places, see `trainer.hooks`; the average and the falling keep rate that the recipe asks for
            come before them.
        rank: this process among those of the run, `Rank.start()` under torchrun; None: it is alone.
        stop: gives a signal's number once this process is asked to stop, else 0.
        trained: it is only tested, so that the weights it starts from must be whole.
        share: of views' scores, where K varies and the run that is tested found it; None: it is found.
        subnetwork: which weights are trained, and from what; None: as the recipe says, all of them where it names no ticket.
    Attributes:
        student: timm's model behind its stem.
        dataset, validation: what it is fed.
        state: all that changes.
        steps: of an epoch.
        lr: at its height.
    Raises:
        TicketSetError: a recipe that this set or this machine cannot follow.
    """

    def __init__(
        self,
        opened: TicketSet,
        recipe: Recipe,
        hooks: Sequence[Hook] = (),
        rank: Rank | None = None,
        stop: Callable[[], int] | None = None,
        trained: bool = False,
        subnetwork: Subnetwork | None = None,
        share: float | None = None,
    ) -> None:
        self.opened, self.recipe, self._stop = opened, recipe, stop
        self.rank = rank or Rank(device=choose_device(recipe.machine.device, ("cuda", "cpu")))
        machine, tickets = recipe.machine, recipe.tickets
        optimization = in_parts(recipe) if tickets.varying else recipe.optimization
        found = subnetwork or self.rank.on_first(lambda: Subnetwork.of(recipe.weights, machine.seed))
        self.subnetwork = found or Subnetwork({})
        # For the student's first weights; steps seed themselves by their place.
        torch.manual_seed(machine.seed if self.subnetwork.seed is None else self.subnetwork.seed)
        self.student = build_student(opened, recipe.model, tickets, recipe.dropping, trained).to(self.rank.device)
        self.subnetwork.lay_on(self.student.model)
        frozen = freeze(self.student.model, recipe.model.freeze) if recipe.model.freeze else []
        check_student(recipe, self.student)
        views = Views.of(opened, self.student, tickets.resize_to_tokens)
        copies = copies_of(recipe.data)
        self.dataset = TicketDataset(
            opened,
            recipe.data.train_split,
            tickets=tickets,
            augment=recipe.augment,
            views=views,
            batch_size=optimization.batch_size,
            micro_batches=self.rank.size * optimization.grad_accum_steps,
            parts=PARTS if tickets.varying else 1,
            seed=machine.seed,
            unmask_from=optimization.epochs - tickets.unmask_epochs if tickets.unmask_epochs else None,
            token_labels=open_token_labels(recipe),
            copies=copies,
            share=share,
        )
        self.validation = ValidationDataset(
            opened,
            recipe.data.val_split,
            views=replace(views, side=views.whole_side) if tickets.coarse_first else views,
            batch_size=recipe.optimization.batch_size,
            rank=self.rank.number,
            ranks=self.rank.size,
            copies=copies,
            lengths=self.dataset.lengths,
        )
        self.steps = self.dataset.steps
        self.lr = learning_rate_of(optimization, self.dataset.global_batch)
        self.state = build_state(self.student, optimization, machine, self.rank, self.lr, self.steps, tickets.varying)
        self.setup = Setup.of(self.student, optimization, machine, self.rank)
        self._begin_at(self.subnetwork.first_epoch)
        self.hooks: list[Hook] = [*frozen, *hooks]
        # Before all others: what is saved or tested after an update must have seen it.
        if optimization.model_ema:
            self.hooks.insert(0, Average(self.student.model, optimization.model_ema_decay))
        if recipe.dropping.drop_blocks is not None:
            self.hooks.insert(0, FallingKeepRate(recipe.dropping))
        if self.subnetwork.kept:
            self.hooks.insert(0, Masked(self.subnetwork, self.student.model))
        self.stopped_by = 0

    def _begin_at(self, epoch: int) -> None:
        """Rewound weights have seen the epochs before: order and schedule go on from there, with a fresh optimizer.

        Source: Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis (2020), as in open_lth.
        """
        if epoch >= self.recipe.optimization.epochs:
            raise TicketSetError(
                f"`weight_ticket`: starts at epoch {epoch}: expected more `epochs`, got {self.recipe.optimization.epochs}"
            )
        self.state.epoch = epoch
        self.state.scheduler.step_update(self.updates)

    @property
    def updates(self) -> int:
        """Made so far, since epoch 0: the place in order and schedule."""
        return self.state.epoch * self.steps + self.state.step

    @property
    def own_updates(self) -> int:
        """Those of them that this run has made; rewound weights have seen the others."""
        return self.updates - self.subnetwork.first_epoch * self.steps

    @property
    def protocols(self) -> tuple[str, ...]:
        """Of the last validation; the others take the first two."""
        if self.recipe.tickets.resize_to_tokens:
            return ("all",)
        return self.student.protocols if self.opened.holds_whole_views else ("tickets",)

    @property
    def own_protocol(self) -> str:
        """The one that the best epoch goes by: what the student was trained for."""
        tickets = self.recipe.tickets
        sees_all = tickets.resize_to_tokens or tickets.unmask_epochs
        if sees_all or (tickets.tickets == "full" and self.recipe.dropping.drop_blocks is None):
            return "all"
        return self.protocols[0]

    @cached_property
    def costs(self) -> dict[str, Any]:
        """See `trainer.costs`."""
        found = costs(self.recipe, self.opened, self.student, self.dataset, self.validation, self.protocols)
        found["updates"] = (self.recipe.optimization.epochs - self.subnetwork.first_epoch) * self.steps
        if self.subnetwork.said:
            found["sparse_gmacs"] = sparse_gmacs(self.student, self.dataset.token_shares, self.subnetwork.kept)
            found["mining_updates"] = self.subnetwork.mining_updates
        return found

    def arguments(self) -> dict[str, Any]:
        """The settings, and what they were applied to, as args.yaml and checkpoints hold them."""
        opened = self.opened
        flat = {k: list(v) if isinstance(v, tuple) else v for k, v in self.recipe.flat().items()}
        labels = self.recipe.data.token_labels
        if labels not in (None, "none"):
            labels = TicketSet.open(labels, self.recipe.data.base, images=False).manifest.set_id
        return flat | {
            "set_id": opened.manifest.set_id,
            "base_set_id": opened.base_id,
            "labels_set_id": labels,
            "set_method": opened.manifest.selector.method,
            "world_size": self.rank.size,
            "global_batch": self.dataset.global_batch,
            "resolved_tokens": self.dataset.tokens,
            **({"resolved_share": self.dataset.lengths.share} if self.dataset.lengths else {}),
            **dict.fromkeys(WEIGHT_DERIVED),
            **self.subnetwork.said,
        }

    def fit(self) -> "dict[str, Figures]":
        """Train from the state's epoch and step to the end.

        Returns:
            Figures of the last epoch by protocol.
        Raises:
            Stopped: a signal came; everything so far was saved by the hooks.
        """
        for hook in self.hooks:
            hook.begin(self)
        self._rehearse()
        found = None
        while self.state.epoch < self.recipe.optimization.epochs:
            found = self._epoch()
        results, answers = found or self.evaluate(self.protocols)
        for hook in self.hooks:
            hook.at_end(self, results, answers)
        return results

    def _rehearse(self) -> None:
        """Micro-batches forward and backward, thrown away, for what must not happen later."""
        if self.rank.size > 1:
            # DDP lays its gradient buckets out anew after its first backward. Done before the first update, a resumed
            # process sums gradients in the order of one that was never stopped.
            for _ in range(2):
                self._try_batch(self.dataset)
        if self.dataset.lengths is not None:
            self._try_batch(self.dataset.longest())  # as below
        unmask_from = self.dataset.unmask_from
        if unmask_from is not None and self.state.epoch < unmask_from:
            self._try_batch(self.dataset.unmasked())  # memory fails now or never

    def _try_batch(self, dataset: TicketDataset) -> None:
        """One micro-batch forward and backward, with an optimizer's two numbers a weight in memory."""
        buffers = [(buffer, buffer.clone()) for buffer in self.student.buffers()]  # averages of batch norm
        trained = [p for p in self.student.parameters() if p.requires_grad and not self.state.optimizer.state]
        moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        setup = replace(self.setup, optimization=replace(self.setup.optimization, grad_accum_steps=1))
        train_micro_batch(self.state, dataset[0, 0, self.rank.number], setup, 0, 0)
        self.state.optimizer.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
        del moments

    def _epoch(self) -> tuple[dict[str, Figures], Tensor] | None:
        state, last = self.state, self.recipe.optimization.epochs - 1
        for hook in self.hooks:
            hook.before_epoch(self)
        places = self.dataset.places(state.epoch, state.step, self.rank.number, self.rank.size)
        # Its worker processes end before those of validation begin, and whatever goes wrong.
        with contextlib.closing(self._batches(self.dataset, places)) as batches:
            loss = train_epoch(state, batches, self.steps, self.setup, self)
        rates, number = Rates.of(state.optimizer), state.epoch
        found, results, metric, best = None, {}, None, False
        if number == last or (number + 1) % self.recipe.machine.val_interval == 0:
            found = self.evaluate(self.protocols if number == last else self.protocols[:2])
            results = found[0]
            metric = results[self.own_protocol]["top1"]
            best = is_better(metric, state.best)
        if best:
            state.best, state.best_epoch = metric, number
        state.epoch, state.step, state.loss_sum, state.loss_count = number + 1, 0, 0.0, 0
        for hook in self.hooks:
            hook.after_epoch(self, Epoch(number, loss, rates, results, metric, best))
        return found

    def evaluate(self, protocols: Sequence[str]) -> tuple[dict[str, Figures], Tensor]:
        """The student and what hooks have tested beside it, under each protocol, and their answers.

        The student itself is not changed: a selector that learns to drop by and by is tested as it will be used.

        Raises:
            TicketSetError: a protocol for which patches are needed that the set has not stored.
        """
        if not self.opened.holds_whole_views and [*protocols] != ["tickets"]:
            raise TicketSetError(
                f"{self.opened.url}: expected protocol tickets, got {', '.join(protocols)}: others need whole views, and only"
                f" the best {self.opened.stored_tokens} of {self.opened.num_patches} patches are stored"
            )
        models: dict[str, TicketModel] = {"": self.student}
        for hook in self.hooks:
            models |= hook.also_tested(self)
        models = {prefix: model.tested() for prefix, model in models.items()}
        images = len(self.validation.rows)
        with contextlib.closing(self._batches(self.validation, range(len(self.validation)))) as batches:
            shown = self._until_stopped(batches)
            return evaluate(models, shown, protocols, self.test_tokens, images, self.setup)

    @property
    def test_tokens(self) -> int:
        """K of the ticket and random protocols; what `full` too is tested on."""
        return self.recipe.tickets.count or self.opened.k

    def _batches(self, dataset: Any, places: Any) -> Any:
        return loader(dataset, places, self.recipe.machine.workers, self.rank.device)

    def _until_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of validation, with a bar on a terminal; all ranks take as many turns, though one may have less."""
        quiet = None if self.rank.number == 0 else True
        for _ in tqdm(range(self.validation.turns), "Test", leave=False, disable=quiet):
            if self.stop_requested():  # the epoch's training is saved
                raise Stopped
            if (batch := next(batches, None)) is not None:
                yield batch

    # `trainer.engine.Places`, on which train_epoch calls: handed on to the hooks.

    def before_step(self, update: int) -> None:
        """See `Hook.before_step`."""
        for hook in self.hooks:
            hook.before_step(self, update)

    def before_update(self, update: int) -> None:
        """See `Hook.before_update`."""
        for hook in self.hooks:
            hook.before_update(self, update)

    def after_update(self, update: int) -> None:
        """See `Hook.after_update`."""
        for hook in self.hooks:
            hook.after_update(self, update)

    def share(self) -> None:
        """See `Hook.share`; the student's own running averages first."""
        self.rank.share_batch_norm(self.student.model)
        for hook in self.hooks:
            hook.share(self)

    def log(self, figures: dict[str, float]) -> None:
        """See `Hook.log`."""
        for hook in self.hooks:
            hook.log(self, figures)

    def save(self) -> None:
        """See `Hook.save`."""
        for hook in self.hooks:
            hook.save(self)

    def stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks hear it at the same step."""
        self.stopped_by = self.rank.greatest(self._stop() if self._stop else 0)
        return bool(self.stopped_by)


def copies_of(data: Data) -> TarCopies:
    """Where remote tars are copied to."""
    return TarCopies(data.cache, None if data.cache_size is None else round(data.cache_size * 1e9))


def open_token_labels(recipe: Recipe) -> TicketSet | bool | None:
    """The set that holds token labels: another one, None for the ticket set itself, False for none."""
    path = recipe.data.token_labels
    if path in (None, "none"):
        return None if path is None else False
    return TicketSet.open(path, recipe.data.base, images=False)


def check_student(recipe: Recipe, student: TicketModel) -> None:
    """
    Raises:
        TicketSetError: settings for which the model has no use.
    """
    if recipe.data.token_labels not in (None, "none") and not student.wants_token_labels:
        raise TicketSetError(f"`token_labels`: {recipe.model.model} has no use for them; LV-ViT has")
    if recipe.augment.mix_token and "box" not in student.extras:
        raise TicketSetError(f"`mix_token`: {recipe.model.model} has none; it is LV-ViT's")
    if recipe.augment.mixes and recipe.augment.mixing == "patches" and not student.takes_places_twice:
        raise TicketSetError(
            f"`mixing` patches: two views' patches of one place are no ticket for {recipe.model.model}; ViTs take them"
        )


def in_parts(recipe: Recipe) -> Optimization:
    """Steps of the same samples whose batches are cut into parts of one K each, for tickets of varying length.

    Raises:
        TicketSetError: a batch that cannot be cut so.
    """
    optimization, augment = recipe.optimization, recipe.augment
    mixes = augment.mixes or augment.mix_token
    unit = PARTS * (2 if mixes else 1)  # pairs are mixed within a part
    if optimization.batch_size % unit:
        raise TicketSetError(
            f"`batch_size` {optimization.batch_size}: with `tokens` {recipe.tickets.tokens} expected a multiple of {unit}, since"
            f" a batch has {PARTS} parts, of one K each{', in which pairs are mixed' if mixes else ''}"
        )
    accum = optimization.grad_accum_steps * PARTS
    return replace(optimization, batch_size=optimization.batch_size // PARTS, grad_accum_steps=accum)


def build_state(
    student: TicketModel,
    optimization: Optimization,
    machine: Machine,
    rank: Rank,
    lr: float,
    steps: int,
    varying: bool = False,
) -> State:
    """Model, optimizer and schedule before the first step, made by timm.

    Args:
        varying: K differs from step to step.
    Raises:
        TicketSetError: timm does not know the optimizer or the schedule.
    """
    optimizer, scheduler = build_optimizer(student.model, optimization, lr, steps)
    scaler = torch.amp.GradScaler(rank.device.type, enabled=machine.amp and machine.amp_dtype == "float16")
    trained: Any = student
    if machine.torchcompile:
        # Before DDP, as timm. A graph for each K: one for all would be slower at each, and torch would make it at the second.
        trained = torch.compile(trained, dynamic=False if varying else None)
    if rank.size > 1:
        # Prefix tokens' gradients are slices of the position table's: a few numbers, not worth two warnings a rank.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        ids = [rank.device.index] if rank.device.type == "cuda" else None
        trained = torch.nn.parallel.DistributedDataParallel(trained, device_ids=ids)
    return State(trained, student, optimizer, scheduler, scaler)
