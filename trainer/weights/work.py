"""A weight ticket's folder while it is mined: trainings in folders of their own, masks, start weights, the manifest.

What is written is never made again, so that the same command goes on where it was stopped. Under torchrun rank 0 reads and
writes, and the others are told.
"""

import gc
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.costs import sparse_gmacs
from trainer.hooks import Hook
from trainer.options import Boards, Output, Recipe
from trainer.output import checkpoint
from trainer.output.claim import Claim
from trainer.ranks import Rank
from trainer.run import train
from trainer.trainer import Trainer
from trainer.weights.options import Mining
from trainer.weights.plan import difference, plan_of
from trainer.weights.scores import Kept, count_of, sparsity_at
from trainer.weights.subnetwork import Subnetwork, load_start, said_of
from trainer.weights.ticket import (
    MANIFEST,
    START,
    LevelRecord,
    WeightManifest,
    file_record,
    masks_name,
    read_masks,
    read_plan,
    ticket_identity,
    write_manifest,
    write_masks,
    write_plan,
    write_start,
)

log = logging.getLogger("datalth")
_UNFINISHED = re.compile(
    r"plan\.json\.\d+-[0-9a-f]{6}\.tmp"
)  # what a kill leaves that came before the plan was written
State = dict[str, Tensor]
Score = Callable[[Trainer, State], Mapping[str, Tensor]]
Results = dict[str, float] | None  # top-1 by protocol; None: not trained


class Stopped(Exception):
    """A training was asked to stop; holds its exit code."""


class Work:
    """One ticket under way.

    Attributes:
        path: the folder.
        mining, recipe: what the command was told.
        plan: everything that decides the bytes.
        first: the model's first weights.
        steps: of an epoch.
    """

    def __init__(self, mining: Mining, recipe: Recipe, boards: Boards, opened: TicketSet, rank: Rank) -> None:
        if recipe.weights.weight_ticket:
            raise TicketSetError("`weight_ticket`: a ticket is mined from dense weights; leave it out")
        self.path, self.mining, self.recipe = Path(mining.out), mining, recipe
        self._boards, self._opened, self._rank = boards, opened, rank
        trainer = Trainer(opened, recipe, rank=rank)
        self.plan = plan_of(mining, trainer)
        self.first: State = {name: tensor.cpu() for name, tensor in trainer.student.model.state_dict().items()}
        self.steps, self._lr, self._gmacs = trainer.steps, trainer.lr, trainer.costs["train_gmacs"]
        self._student, self._shares = trainer.student, trainer.dataset.token_shares

    def begin(self, claim: Claim) -> bool:
        """Take the folder; False where the ticket is complete.

        Raises:
            TicketSetError: something else is in it, or somebody is at work there.
        """
        return self._rank.on_first(lambda: self._begin(claim))

    def _begin(self, claim: Claim) -> bool:
        if not self.path.is_dir() and self.path.exists():
            raise TicketSetError(f"`out` {self.path}: expected a folder, got a file")
        self.path.mkdir(parents=True, exist_ok=True)
        claim.hold(self.path)
        there = read_plan(self.path)
        if there is None and not all(_UNFINISHED.fullmatch(path.name) for path in self.path.iterdir()):
            raise TicketSetError(f"`out` {self.path}: expected a weight ticket or an empty folder, got something else")
        if there is not None and there.plan_id != self.plan.plan_id:
            raise TicketSetError(f"`out` {self.path}: holds a ticket of another plan: {difference(there, self.plan)}")
        for left in self.path.glob("*.tmp"):
            left.unlink()
        if there is None:
            write_plan(self.path, self.plan)
        return not (self.path / MANIFEST).exists()

    def train(
        self, name: str, recipe: Recipe, subnetwork: Subnetwork | None = None, hooks: Sequence[Hook] = ()
    ) -> dict[str, Any]:
        """A run of datalth-train in a folder of the ticket's, from where it was stopped to its end; its final.json.

        Raises:
            Stopped: a signal came.
        """
        folder = self.path / name
        begun, done = self._rank.on_first(lambda: (folder.exists(), (folder / "final.json").exists()))
        if not done:
            output = Output(
                output=str(self.path), experiment=name, resume="latest" if begun else None, **asdict(self._boards)
            )
            code = train(recipe, output, self._opened, self._rank, hooks, subnetwork)
            gc.collect()  # reference cycles of DDP's hold a model each
            if code:
                raise Stopped(code)
        return self._rank.on_first(lambda: json.loads((folder / "final.json").read_bytes()))

    def short(self, epochs: int, seed: int) -> Recipe:
        """A training of this recipe at a constant, small learning rate, without an average."""
        lr = self.mining.mining_lr or 0.3 * self._lr
        return self.recipe.but(
            epochs=epochs, lr=lr, sched="constant", warmup_epochs=0, model_ema=False, unmask_epochs=0, seed=seed
        )

    def trained(self, name: str) -> State:
        """The weights that a run has ended with."""
        return self._rank.on_first(lambda: self._trained(name))

    def _trained(self, name: str) -> State:
        weights: State = checkpoint.read(self.path / name / checkpoint.LAST)["state_dict"]
        return weights

    def magnitudes(self, name: str) -> dict[str, np.ndarray]:
        """Of the prunable weights that a run has ended with; on rank 0."""
        weights = self._trained(name)
        return {tensor: weights[tensor].abs().double().numpy() for tensor in self.plan.prunable}

    def masks(self, level: int, make: Callable[[], Kept]) -> Kept:
        """A level's masks, made on rank 0 where they are not written yet."""

        def made() -> Kept:
            if not (self.path / masks_name(level)).exists():
                write_masks(self.path, level, make())
            return read_masks(self.path, level, self.plan)

        kept = self._rank.on_first(made)
        count = sum(int(mask.sum()) for mask in kept.values())
        log.info(f"level {level} of {self.plan.levels}: {count} of {self.plan.total} weights are kept")
        return kept

    def count(self, level: int) -> int:
        """Weights that a level keeps."""
        return count_of(self.plan.total, self._sparsity(level))

    def _sparsity(self, level: int) -> float:
        return sparsity_at(self.plan.sparsity, self.plan.levels, level) if level else 0.0

    def start(self, weights: State | None) -> State:
        """The ticket's start weights: as they are written, or else these, from now on.

        Raises:
            TicketSetError: they are not there, and a training that has ended should have written them.
        """

        def read() -> State:
            path = self.path / START
            if weights is not None and not path.exists():
                self.write_start(weights)
            if not path.exists():
                raise TicketSetError(f"{path}: missing; remove {self.path / 'level-00'}, whose training writes it")
            return load_start(path.read_bytes(), str(path))

        return self._rank.on_first(read)

    def write_start(self, weights: State) -> None:
        """On rank 0."""
        from safetensors.torch import save

        write_start(self.path, save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))

    def level(self, level: int, kept: Kept, start: State, updates: int) -> tuple[Recipe, Subnetwork]:
        """What trains a level: as `datalth-train --weight-ticket OUT --weight-level N` does when the ticket is finished.

        Args:
            updates: that finding its masks took.
        """
        plan, files = self.plan, (self.path / masks_name(level), self.path / START)
        identity = self._rank.on_first(lambda: ticket_identity(file_record(files[0]), file_record(files[1])))
        said = said_of(plan, identity, self._sparsity(level))
        recipe = self.recipe.but(
            weight_ticket=str(self.path), weight_level=level, pretrained=False, initial_checkpoint=None
        )
        return recipe, Subnetwork(kept, start, plan.rewind_epochs, None, updates, plan.seed, said)

    @property
    def own(self) -> dict[str, Any]:
        """What args.yaml says of a training that is of no arm: it is the miner's own."""
        return {"weight_method": self.plan.method, "weight_group_id": self.plan.group_id}

    def scores(
        self, score: Score, start: State, name: str | None, recipe: Recipe, subnetwork: Subnetwork | None
    ) -> dict[str, np.ndarray]:
        """Of the prunable weights, by a function of a level's trainer; on rank 0.

        Args:
            name: of the run whose last weights it has; None: it has not trained.
        Raises:
            TicketSetError: scores are missing, or of other shapes.
        """
        trainer = Trainer(self._opened, recipe, rank=Rank(device=self._rank.device), subnetwork=subnetwork)
        if name is not None:
            trainer.student.model.load_state_dict(self._trained(name))
        found, out = score(trainer, start), {}
        if not isinstance(found, Mapping):
            raise TicketSetError(f"`method` {self.plan.method}: expected scores by name, got {type(found).__name__}")
        for tensor, shape in self.plan.prunable.items():
            values = found.get(tensor)
            if not isinstance(values, Tensor) or tuple(values.shape) != shape:
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise TicketSetError(
                    f"`method` {self.plan.method}: {tensor}: expected a tensor of scores {list(shape)}, got {got}"
                )
            out[tensor] = values.detach().double().cpu().numpy()
        return out

    def finish(self, results: Sequence[Results], updates: Sequence[int], seconds: float) -> None:
        """Write the manifest, from what is on the disk.

        Args:
            results: of levels 0 to L.
            updates: of the optimizer, that finding each level's masks took.
        """
        self._rank.on_first(lambda: self._finish(results, updates, seconds))
        log.info(
            f"written: {self.path}; datalth-weights info {self.path} shows it, --weight-ticket {self.path} trains it"
        )

    def _finish(self, results: Sequence[Results], updates: Sequence[int], seconds: float) -> None:
        plan, start = self.plan, file_record(self.path / START)
        levels = [self._record(level, results[level], updates[level]) for level in range(plan.levels + 1)]
        manifest = WeightManifest(
            format=plan.format,
            plan_id=plan.plan_id,
            group_id=plan.group_id,
            start=start,
            levels=tuple(levels),
            timing={"seconds": seconds},
        )
        write_manifest(self.path, manifest)

    def _record(self, level: int, results: Results, updates: int) -> LevelRecord:
        kept = read_masks(self.path, level, self.plan) if level else {}
        masks = file_record(self.path / masks_name(level)) if level else None
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        return LevelRecord(
            level=level,
            sparsity=self._sparsity(level),
            kept=sum(counts.values()) if level else self.plan.total,
            prunable=self.plan.total,
            tensors=counts,
            masks=masks,
            ticket_id=ticket_identity(masks, file_record(self.path / START)) if masks else None,
            results=results,
            updates=updates,
            gmacs=sparse_gmacs(self._student, self._shares, kept),
            dense_gmacs=self._gmacs,
        )
