"""One datalth-train command: open the set, find the run's folder, train or test, and say how it ended."""

import contextlib
import gc
import logging
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from miner.models import compiling
from shards.console import printable
from shards.errors import TicketSetError, first_line
from shards.flags import as_flags
from shards.reader import TicketSet
from shards.signals import Signals
from shards.verify import verify
from trainer.config import read_yaml
from trainer.data.loader import WorkerDied
from trainer.engine import Stopped
from trainer.hooks import Hook
from trainer.options import Data, Output, Recipe, Weights
from trainer.output import checkpoint
from trainer.output.claim import Claim
from trainer.output.events import Events
from trainer.output.folder import ARGUMENTS, RunFolder, check_arguments, find
from trainer.output.progress import Progress, report
from trainer.ranks import Rank
from trainer.trainer import Trainer
from trainer.weights.subnetwork import Subnetwork

log = logging.getLogger("datalth")
OPEN_FILES = 65536


class Printable(logging.Formatter):
    """Lines of a log: settings as flags, and a name out of somebody's checkpoint cannot act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return as_flags(printable(super().format(record)))


def run(recipe: Recipe, output: Output) -> int:
    """Train, or only test (`eval`); returns the exit code.

    Raises:
        TicketSetError: whatever a person can mend.
    """
    recipe = with_own_set(recipe, output)
    with prepared(recipe) as (opened, rank):
        return test(recipe, output, opened, rank) if output.eval else train(recipe, output, opened, rank)


@contextlib.contextmanager
def prepared(recipe: Recipe) -> Iterator[tuple[TicketSet, Rank]]:
    """The whole set, and this process among the others of its command; inside, lines are logged by rank 0.

    Raises:
        TicketSetError: whatever a person can mend, of what is done inside too.
    """
    allow_open_files()
    try:
        if recipe.model.initial_checkpoint:
            checkpoint.check(Path(recipe.model.initial_checkpoint), "initial_checkpoint")
        opened = open_whole_set(recipe.data)
        rank = Rank.start(recipe.machine.device)
        handler = logging.StreamHandler()
        handler.setFormatter(Printable())
        level = logging.INFO if rank.number == 0 else logging.ERROR
        logging.basicConfig(level=level, handlers=[handler], force=True)
        with compiling():
            yield opened, rank
    except Exception as error:
        raise _explained(error) from None
    finally:
        if torch.distributed.is_initialized():
            # The process group joins its threads only when nothing refers to it any more, DDP in reference cycles
            # included. A thread left over may free a tensor while Python shuts down, and abort the process.
            gc.collect()
            torch.distributed.destroy_process_group()


def _explained(error: Exception) -> Exception:
    """The error in words, where it is one of another rank or of a device."""
    of_ranks = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
    if torch.distributed.is_initialized() and isinstance(error, RuntimeError) and of_ranks:
        return TicketSetError(f"rank {torch.distributed.get_rank()}: another rank stopped; it says why")
    if isinstance(error, torch.OutOfMemoryError):  # of a device; the host's is a MemoryError
        return TicketSetError(f"{first_line(error)} Take a smaller `batch_size` with more `grad_accum_steps`")
    return error


def allow_open_files() -> None:
    """Raise the soft limit: workers and shards are open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def open_whole_set(data: Data) -> TicketSet:
    """The ticket set, if it is whole.

    Raises:
        TicketSetError: unfinished, damaged, without the wanted splits, or without labels.
    """
    opened = TicketSet.open(str(data.shards), data.base)
    problems = verify(opened)
    if problems:
        raise TicketSetError(
            f"{data.shards}: {problems[0]} ({len(problems)} problems; datalth-shards verify lists them)"
        )
    for split in (data.train_split, data.val_split):
        opened.shard_names(split)
    if not opened.classes:
        raise TicketSetError(f"{data.shards}: its images have no labels; there is nothing to train on")
    return opened


def train(
    recipe: Recipe,
    output: Output,
    opened: TicketSet,
    rank: Rank,
    more: Sequence[Hook] = (),
    subnetwork: Subnetwork | None = None,
) -> int:
    """Train into the run's folder, from its checkpoint on where there is one; returns the exit code.

    Args:
        more: hooks beside those of the command.
        subnetwork: see `Trainer`.
    """
    if recipe.weights.weight_ticket and (recipe.model.pretrained or recipe.model.initial_checkpoint):
        name = "pretrained" if recipe.model.pretrained else "initial_checkpoint"
        raise TicketSetError(f"`{name}`: the weight ticket has the weights to start from; leave one of both out")
    default, signals = f"{recipe.model.model}-{recipe.tickets.tickets}", Signals()
    with contextlib.closing(Claim()) as claim:
        path, newest = rank.on_first(lambda: find(output, default, claim))
        content = checkpoint.read(newest) if newest else None
        folder = RunFolder(path, output, claim)
        events = [Events(folder, output)] if output.log_tensorboard or output.wandb_project else []
        hooks: list[Hook] = [*more, folder, *events, Progress(folder)]
        trainer = Trainer(opened, recipe, hooks, rank, lambda: signals.number, subnetwork=subnetwork)
        if output.resume:
            arguments = trainer.arguments()
            rank.on_first(lambda: check_arguments(path, content, arguments))
        if newest is not None:
            checkpoint.restore(newest, trainer, content)
        with signals.heard():
            try:
                trainer.fit()
                return 0
            except WorkerDied as error:
                last = checkpoint.lying(folder.path)
                goes_on = f"`resume` latest goes on from {last}" if last else "there was no checkpoint yet"
                raise TicketSetError(f"-j {recipe.machine.workers}: {error}; {goes_on}") from None
            except Stopped:
                state = trainer.state
                log.info(f"stopped at epoch {state.epoch}, step {state.step}; `resume` latest goes on from here")
                return 128 + trainer.stopped_by


def test(recipe: Recipe, output: Output, opened: TicketSet, rank: Rank) -> int:
    """A checkpoint's own model under all protocols, on this set; returns the exit code.

    Raises:
        TicketSetError: there is none, or it is of other classes.
    """
    if not (output.resume or recipe.model.initial_checkpoint or recipe.model.pretrained):
        raise TicketSetError("`eval`: nothing to evaluate; give `resume`, `initial_checkpoint` or `pretrained`")
    newest, content, share = None, None, None
    if output.resume:
        _, newest = find(output, "")
        if newest is None:
            raise TicketSetError(f"`resume` {output.resume}: no checkpoint to evaluate")
        content = checkpoint.read(newest)
        asked, then = recipe.tickets.tokens, content["args"]
        share = then.get("resolved_share") if asked in (None, then["tokens"]) else None
        recipe = as_trained(recipe, then)
        log.info(f"{newest}: {recipe.model.model}, trained on {recipe.tickets.tickets}")
    # Nothing is trained: what training alone would refuse is no matter, and an average has seen nothing.
    recipe = recipe.but(
        train_split=recipe.data.val_split,
        repeats=1,
        token_labels="none",
        drop_path=0.0,
        mixup=0.0,
        cutmix=0.0,
        mix_token=False,
        model_ema=False,
        **asdict(Weights()),  # a checkpoint of a weight ticket has its zeros
    )
    signals = Signals()
    trainer = Trainer(opened, recipe, rank=rank, stop=lambda: signals.number, trained=True, share=share)
    if newest is not None and content is not None:
        checkpoint.restore_weights(newest, content, trainer)
    with signals.untorn():
        try:
            report(trainer.state, trainer.evaluate(trainer.protocols)[0])
            return 0
        except Stopped:
            return 128 + trainer.stopped_by  # of another rank; this one's own is raised at the end


def with_own_set(recipe: Recipe, output: Output) -> Recipe:
    """`eval` and `resume` without `shards`: the set that the run was trained on, as its args.yaml names it.

    Raises:
        TicketSetError: it names none, one far away (a file that came from elsewhere calls nobody), or another set is there.
    """
    if recipe.data.shards:
        return recipe
    path = find(output, "")[0] / ARGUMENTS
    try:
        then = read_yaml(path)
    except TicketSetError as error:
        raise TicketSetError(f"`resume` {output.resume}: which set? {error}; give `shards`") from None
    shards, base = then.get("shards"), recipe.data.base or then.get("base")
    if not isinstance(shards, str) or not isinstance(base, str | None) or "://" in shards + (base or ""):
        raise TicketSetError(f"{path}: expected the path of a set, got {shards!r}, base {base!r}; give `shards`")
    try:
        found = TicketSet.open(shards, base).manifest.set_id
    except TicketSetError as error:
        raise TicketSetError(f"{error} (which is what {path} names; `shards` says where it is now)") from None
    if found != then.get("set_id"):
        raise TicketSetError(
            f"{shards}: expected the set that {path} names (set_id {then.get('set_id')!s:.16}), got {found:.16};"
            f" `shards` {shards} tests on it all the same"
        )
    return recipe.but(shards=shards, base=base)


def as_trained(recipe: Recipe, then: dict[str, Any]) -> Recipe:
    """What a checkpoint's model was made with; `tokens` may be another."""
    made_with = ["model", "model_kwargs", "feed", "drop_blocks", "keep_rate", "fuse_token"]
    trained_as = ["tickets", "resize_to_tokens", "unmask_epochs", "epochs"]
    found = {name: then[name] for name in [*made_with, *trained_as]}
    if found["drop_blocks"] is not None:
        found["drop_blocks"] = tuple(found["drop_blocks"])
    return recipe.but(**found, tokens=recipe.tickets.tokens or then["tokens"], pretrained=False)
