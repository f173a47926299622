"""One datalth-train command: check, build, train epoch by epoch, validate, save."""

import contextlib
import copy
import gc
import logging
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from miner.models import compiling
from shards.console import printable
from shards.errors import TicketSetError, first_line
from shards.reader import TicketSet
from trainer.build import World, build_state, on_first_rank, open_rows, open_set, start_world
from trainer.config import read_yaml
from trainer.data.dataset import EvalFeed, TrainFeed, loader
from trainer.data.loader import Batch, WorkerDied
from trainer.engine import State, Stopped, is_better, learning_rate, train_epoch, train_micro_batch
from trainer.evaluate import Figures, evaluate
from trainer.families.base import TicketModel
from trainer.families.dropping import DroppingViT, keep_rate_at
from trainer.options import Options
from trainer.output import checkpoint, screen
from trainer.output.board import Board
from trainer.output.claim import Claim
from trainer.output.folder import ARGUMENTS, RunFolder, check_arguments, find
from trainer.settings import feed_options, protocols, step_options
from trainer.signals import Signals
from trainer.student import build_student, check_flags, costs, timm_config

log = logging.getLogger("datalth")
OPEN_FILES = 65536


class Printable(logging.Formatter):
    """Lines of a log: a name out of somebody's checkpoint cannot act on the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def run(options: Options) -> int:
    """Train, or validate with --eval; returns the exit code.

    Raises:
        TicketSetError: whatever a person can mend.
    """
    allow_open_files()
    try:
        check_flags(options)
        if options.initial_checkpoint:
            checkpoint.check(Path(options.initial_checkpoint), "--initial-checkpoint")
        options = with_own_set(options)
        opened = open_set(options)
        world = start_world(options)
        handler = logging.StreamHandler()
        handler.setFormatter(Printable())
        logging.basicConfig(level=logging.INFO if world.rank == 0 else logging.ERROR, handlers=[handler], force=True)
        with compiling():
            return validate(options, opened, world) if options.eval else train(options, opened, world)
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
        return TicketSetError(f"{first_line(error)} Take a smaller --batch-size with more --grad-accum-steps")
    return error


def allow_open_files() -> None:
    """Raise the soft limit: workers and shards are open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def train(options: Options, opened: TicketSet, world: World) -> int:
    with contextlib.closing(Claim()) as claim:
        path, newest = on_first_rank(world, lambda: find(options, claim))
        content = checkpoint.read(newest) if newest else None
        run = Run(options, opened, world)
        path = run.begin(path, newest, content, claim)
        with run.signals.heard():
            try:
                run.train()
                return 0
            except WorkerDied as error:
                last = checkpoint.lying(path)
                goes_on = f"--resume latest goes on from {last}" if last else "there was no checkpoint yet"
                raise TicketSetError(f"-j {options.workers}: {error}; {goes_on}") from None
            except Stopped:
                state = run.state
                log.info(f"stopped at epoch {state.epoch}, step {state.step}; --resume latest goes on from here")
                return 128 + run.stop


def validate(options: Options, opened: TicketSet, world: World) -> int:
    """--eval: a checkpoint's own model under all protocols, on this set."""
    if not (options.resume or options.initial_checkpoint or options.pretrained):
        raise TicketSetError("--eval: nothing to evaluate; give --resume, --initial-checkpoint or --pretrained")
    content = None
    if options.resume:
        _, newest = find(options)
        if newest is None:
            raise TicketSetError(f"--resume {options.resume}: no checkpoint to evaluate")
        content = checkpoint.read(newest)
        options = as_trained(options, content["args"])
        log.info(f"{newest}: {options.model}, trained on {options.tickets}")
    # Nothing is trained: what training alone would refuse is no matter.
    untrained: dict[str, Any] = {"train_split": options.val_split, "repeats": 1}
    if content is None:
        untrained["model_ema"] = False  # an average has seen nothing
    untrained |= {"mixup": 0.0, "cutmix": 0.0, "mix_token": False, "token_labels": "none", "drop_path": 0.0}
    run = Run(replace(options, **untrained), opened, world)
    if content is not None:
        assert newest is not None
        checkpoint.restore_weights(newest, content, run.state, opened.classes)
    screen.report(run.state, run.evaluate(run.final_protocols)[0])
    return 0


def with_own_set(options: Options) -> Options:
    """--eval --resume RUN without --shards: the set that the run was trained on, as its args.yaml names it.

    Raises:
        TicketSetError: it names none, one far away (a file that came from elsewhere calls nobody), or another set is there.
    """
    if options.shards:
        return options
    path = find(options)[0] / ARGUMENTS
    try:
        then = read_yaml(path)
    except TicketSetError as error:
        raise TicketSetError(f"--resume {options.resume}: which set? {error}; give --shards") from None
    shards, base = then.get("shards"), options.base or then.get("base")
    if not isinstance(shards, str) or not isinstance(base, str | None) or "://" in shards + (base or ""):
        raise TicketSetError(f"{path}: expected the path of a set, got {shards!r}, base {base!r}; give --shards")
    try:
        found = TicketSet.open(shards, base).manifest["set_id"]
    except TicketSetError as error:
        raise TicketSetError(f"{error} (which is what {path} names; --shards says where it is now)") from None
    if found != then.get("set_id"):
        raise TicketSetError(
            f"{shards}: expected the set that {path} names (set_id {then.get('set_id')!s:.16}), got {found:.16};"
            f" --shards {shards} tests on it all the same"
        )
    return replace(options, shards=shards, base=base)


def as_trained(options: Options, then: dict[str, Any]) -> Options:
    """The flags that a checkpoint's model was made with; --tokens may be another."""
    made_with = ["model", "model_kwargs", "feed", "drop_blocks", "keep_rate", "fuse_token", "model_ema"]
    trained_as = ["tickets", "resize_to_tokens", "unmask_epochs", "epochs"]
    then_flags = {name: then[name] for name in [*made_with, *trained_as]}
    return replace(options, **then_flags, tokens=options.tokens or then["tokens"], pretrained=False)


class Run:
    """What one command holds while it runs."""

    def __init__(self, options: Options, opened: TicketSet, world: World) -> None:
        self.options, self.opened, self.world = options, opened, world
        if options.unmask_epochs > options.epochs:
            raise TicketSetError(f"--unmask-epochs {options.unmask_epochs}: expected at most --epochs {options.epochs}")
        torch.manual_seed(options.seed)
        self.plain = build_student(options, opened).to(world.device)
        self.patches = (self.plain.whole_side // opened.manifest["patch_size"]) ** 2  # of a whole view
        # What `full` too is tested on under the ticket and random protocols.
        self.test_tokens = options.tokens or opened.k
        whole = options.resize_to_tokens or options.tickets == "full"
        self.tokens = self.patches if whole else self.test_tokens
        self.feed_options = feed_options(options, opened, self.plain, self.tokens, world.size)
        self.feed = TrainFeed(open_rows(options, opened, options.train_split), self.feed_options)
        self.val = EvalFeed(open_rows(options, opened, options.val_split), self.feed_options, world.rank, world.size)
        self.steps = self.feed.steps()
        self.lr = options.lr_base * self.feed_options.global_batch / 512 if options.lr is None else options.lr
        self.state = build_state(options, self.plain, world, self.lr, self.steps)
        # Signals are agreed on among the hosts: no step waits for a device.
        self._hosts: Any = torch.distributed.new_group(backend="gloo") if world.size > 1 else None
        self.step_options = step_options(options, opened, self.plain, world, self._set_keep_rate, self._stop_requested)
        self.final_protocols, self.own_protocol = protocols(options, self.plain)
        self.protocols = self.final_protocols[:2]
        self.folder: RunFolder | None = None  # rank 0's, in training
        self.signals = Signals()  # in training, those that came
        self.stop = 0  # the number of one that came to any rank

    def _set_keep_rate(self, update: int) -> None:
        """Of a selector that learns to drop more and more; a function of the update, so that resuming is exact."""
        options = self.options
        if isinstance(self.plain, DroppingViT):
            first = options.shrink_start_epoch * self.steps
            last = first + options.shrink_epochs * self.steps
            self.plain.set_rate(keep_rate_at(update, first, last, self.plain.keep_rate))

    def _stop_requested(self) -> bool:
        """Whether any rank was asked to stop; all ranks hear it at the same step."""
        number = torch.tensor(self.signals.number)
        if self._hosts is not None:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._hosts)
        self.stop = int(number)
        return bool(self.stop)

    def begin(self, path: Path, newest: Path | None, content: dict[str, Any] | None, claim: Claim) -> Path:
        """Open the run's folder, and go on from its checkpoint where there is one; returns the folder."""
        arguments = self._arguments()
        if self.options.resume:
            on_first_rank(self.world, lambda: check_arguments(path, content, arguments))
        if newest is not None and content is not None:
            checkpoint.restore(newest, content, self.state)
            self.state.scheduler.step_update(self._updates())
            log.info(f"resuming {newest}: epoch {self.state.epoch}, step {self.state.step}")
        path = on_first_rank(self.world, lambda: self._open_folder(path, arguments, claim))
        self.costs = costs(self.options, self.opened, self.plain, self.tokens, self.test_tokens, self.final_protocols)
        screen.show(self.options, self.plain, self.costs, self.feed_options, self.lr, self.steps, self.feed.labelled)
        if self.feed.augment.skipped:
            skipped = ", ".join(sorted(set(self.feed.augment.skipped)))
            log.info(f"--aa: geometry is mined; {skipped} leave the view as it is")
        log.info(f"output: {path}")
        return path

    def _open_folder(self, path: Path, arguments: dict[str, Any], claim: Claim) -> Path:
        Board(self.options.log_tensorboard, self.options.wandb_project)  # says what is not installed
        if claim.path is None:
            path = claim.make(path, named=bool(self.options.experiment or self.options.resume))
        board = Board(self.options.log_tensorboard, self.options.wandb_project, path, arguments)
        config = timm_config(self.options, self.opened, self.plain)
        self.folder = RunFolder(path, arguments, self.opened.classes, board, self.state.epoch, config)
        return path

    def _updates(self) -> int:
        return self.state.epoch * self.steps + self.state.step

    def train(self) -> None:
        """From the state's epoch and step to the end, and the report.

        Raises:
            Stopped: a signal came; everything so far is saved.
        """
        state, options = self.state, self.options
        if self.world.size > 1:
            # DDP lays its gradient buckets out anew after its first backward. Done before the first update, a resumed
            # process sums gradients in the order of one that was never stopped.
            for _ in range(2):
                self._practise(self.feed)
        unmask_from = self.feed_options.unmask_from
        if unmask_from is not None and state.epoch < unmask_from:
            self._practise(
                TrainFeed(self.feed.rows, replace(self.feed_options, unmask_from=0))
            )  # memory fails now or never
        results = None
        while state.epoch < options.epochs:
            results = self._epoch()
        screen.report(self.state, results or self._finish(self.evaluate(self.final_protocols)))

    def _practise(self, feed: TrainFeed) -> None:
        """One micro-batch forward and backward, thrown away, with an optimizer's two numbers a weight in memory."""
        buffers = [(buffer, buffer.clone()) for buffer in self.plain.buffers()]  # averages of batch norm
        weights = [] if self.state.optimizer.state else [p for p in self.plain.parameters() for _ in range(2)]
        moments = [torch.empty_like(p) for p in weights]
        train_micro_batch(self.state, feed[0, 0, self.world.rank], self.step_options, 0, 0, True)
        self.state.optimizer.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)
        del moments

    def _epoch(self) -> dict[str, Figures]:
        state, options, world = self.state, self.options, self.world
        places = [
            (state.epoch, step, micro * world.size + world.rank)
            for step in range(state.step, self.steps)
            for micro in range(options.grad_accum_steps)
        ]
        # Its worker processes end before those of validation begin, and whatever goes wrong.
        with contextlib.closing(loader(self.feed, places, options.workers, world.device)) as batches:
            train_loss = train_epoch(state, batches, self.steps, self.step_options, self._log, self._save_recovery)
        lr = learning_rate(state)
        is_last = state.epoch == options.epochs - 1
        found = self.evaluate(self.final_protocols if is_last else self.protocols)
        results = found[0]
        metric = results[self.own_protocol]["top1"]
        if is_better(metric, state.best):
            state.best, state.best_epoch = metric, state.epoch
        text = ", ".join(f"{name} {figures['top1']:.2f}" for name, figures in results.items())
        log.info(f"Test: {state.epoch}  top-1 {text}  (best {state.best:.2f}, epoch {state.best_epoch})")
        state.epoch, state.step, state.loss_sum, state.loss_count = state.epoch + 1, 0, 0.0, 0
        if self.folder:
            self.folder.save_epoch(state, metric, train_loss, self._cells(results), lr, self._ema_is_mature())
        return self._finish(found) if is_last else results

    def _cells(self, results: dict[str, Figures]) -> dict[str, Any]:
        """summary.csv's cells; EMA's stand empty until its weights have seen enough, random's until the last epoch."""
        prefixes = ("", "ema_") if self.state.ema is not None else ("",)
        names = [f"{prefix}{protocol}" for prefix in prefixes for protocol in self.final_protocols]
        blank = {"top1": "", "top5": "", "loss": ""}
        return {
            f"{name}_{figure}": {**blank, **results.get(name, {})}[figure]
            for name in names
            for figure in ("top1", "top5", "loss")
        }

    def evaluate(self, protocols: tuple[str, ...]) -> tuple[dict[str, Figures], torch.Tensor]:
        """Raw weights under each protocol with their answers, and the figures of EMA weights once they have seen enough.

        A selector that learns to drop by and by is tested as it will be used, at its final keep rate.
        """
        if isinstance(self.plain, DroppingViT):
            self.plain.set_rate(self.plain.keep_rate)
        models = {"": self.plain}
        if self._ema_is_mature():
            models["ema_"] = self._averaged()
        images = len(self.val.rows)
        with contextlib.closing(
            loader(self.val, range(len(self.val)), self.options.workers, self.world.device)
        ) as batches:
            shown = self._until_stopped(batches, -(-images // (self.world.size * self.options.batch_size)))
            return evaluate(models, shown, protocols, self.test_tokens, images, self.step_options)

    def _averaged(self) -> TicketModel:
        """The student with EMA's weights."""
        averaged = copy.copy(self.plain)
        averaged._modules = {**self.plain._modules, "model": self.state.ema.module}
        return averaged

    def _ema_is_mature(self) -> bool:
        """An average over 1 / (1 - decay) steps; under --eval a checkpoint has said so."""
        if self.state.ema is None or self.options.eval:
            return self.state.ema is not None
        return self._updates() > 1 / (1 - self.options.model_ema_decay)

    def _until_stopped(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        """Batches of validation, with a bar on a terminal; ranks take `count` turns each, though one may have less."""
        for _ in tqdm(range(count), "Test", leave=False, disable=None if self.world.rank == 0 else True):
            if self._stop_requested():  # the epoch's training is saved
                raise Stopped
            if (batch := next(batches, None)) is not None:
                yield batch

    def _log(self, state: State, steps: int, figures: dict[str, float]) -> None:
        tokens = self.patches if self.feed_options.whole(state.epoch) else self.tokens
        screen.progress(state, steps, figures, self.world.size, f"{tokens}/{self.opened.num_patches}")

    def _save_recovery(self, state: State) -> None:
        if self.folder:
            self.folder.save_recovery(state, self._ema_is_mature())

    def _finish(self, found: tuple[dict[str, Figures], torch.Tensor]) -> dict[str, Figures]:
        """Write what the verdict reads."""
        results, answers = found
        if self.folder:
            rows, state = self.val.rows, self.state
            cost = {**self.costs, "seconds": state.seconds}
            final = {"epoch": state.epoch - 1, "results": results, "best": state.best, "cost": cost}
            columns = dict(zip(self.final_protocols, answers.numpy(), strict=False))  # EMA's follow
            self.folder.save_final(final, rows.keys, rows.labels, columns)
        return results

    def _arguments(self) -> dict[str, Any]:
        """args.yaml: the flags, and what they were applied to."""
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.options).items()}
        opened = self.opened
        return arguments | {
            "set_id": opened.manifest["set_id"],
            "base_set_id": (opened.base or opened).manifest["set_id"],
            "labels_set_id": self._labels_set_id(),
            "set_method": opened.manifest["selector"]["method"],
            "world_size": self.world.size,
            "global_batch": self.feed_options.global_batch,
            "resolved_tokens": self.tokens,
        }

    def _labels_set_id(self) -> str | None:
        path = self.options.token_labels
        if path in (None, "none"):
            return path
        return TicketSet.open(path, self.options.base, images=False).manifest["set_id"]
