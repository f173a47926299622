"""One datalth-train command: check, build, train epoch by epoch, validate, save."""

import gc
import json
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, update_summary

from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from shards.storage import write_atomic
from trainer import checkpoint
from trainer.board import Board
from trainer.build import World, build_model, gmacs, open_set, start_world, student_side
from trainer.engine import State, StepOptions, Stopped, is_better, train_epoch, train_micro_batch
from trainer.evaluate import PROTOCOLS, evaluate
from trainer.feed import EvalFeed, FeedOptions, TrainFeed, loader
from trainer.options import FREE_TO_CHANGE, Options
from trainer.ticket_vit import TicketViT

log = logging.getLogger("datalth")


def run(options: Options) -> int:
    """Train, or validate with --eval; returns the exit code.

    Raises:
        TicketSetError: whatever a person can mend.
    """
    opened = open_set(options)
    world = start_world(options)
    logging.basicConfig(level=logging.INFO if world.rank == 0 else logging.ERROR, format="%(message)s", force=True)
    try:
        return Run(options, opened, world).execute()
    finally:
        if torch.distributed.is_initialized():
            # The process group joins its threads only when nothing refers to it any more, DDP in reference cycles
            # included. A thread left over may free a tensor while Python shuts down, and abort the process.
            gc.collect()
            torch.distributed.destroy_process_group()


class Run:
    """What one command holds while it runs."""

    def __init__(self, options: Options, opened: TicketSet, world: World) -> None:
        self.options, self.opened, self.world = options, opened, world
        torch.manual_seed(options.seed)
        model = build_model(options, opened)
        wrapped = TicketViT(model).to(world.device)
        self.tokens = self._tokens(wrapped)
        # What `full` is tested on under the ticket and random protocols: the set's K, as the other arms.
        self.test_tokens = self.tokens if options.resize_to_tokens else options.tokens or opened.k
        config = resolve_model_data_config(model)
        global_batch = options.batch_size * world.size * options.grad_accum_steps
        whole = options.tickets == "full" or options.resize_to_tokens
        self.feed_options = FeedOptions(
            arm="full" if whole else options.tickets,
            tokens=self.tokens,
            img_size=student_side(options, opened),
            patch_size=opened.manifest["patch_size"],
            exif=opened.exif,
            seed=options.seed,
            batch_size=options.batch_size,
            global_batch=global_batch,
            repeats=options.repeats,
            aa=options.aa,
            color_jitter=options.color_jitter,
            mean=config["mean"],
            reprob=options.reprob,
            mixup=options.mixup,
            cutmix=options.cutmix,
            mixup_prob=options.mixup_prob,
            mixup_switch_prob=options.mixup_switch_prob,
            unmask_from=options.epochs - options.unmask_epochs if options.unmask_epochs else None,
        )
        self.feed = TrainFeed(self._rows(options.train_split), self.feed_options)
        self.val = EvalFeed(self._rows(options.val_split), self.feed_options, world.rank, world.size)
        self.steps = self.feed.steps()
        self.state, self.lr = self._state(wrapped, model, global_batch)
        self.step_options = self._step_options(config)
        self.protocols = ("all",) if options.resize_to_tokens else ("tickets", "all")
        self.final_protocols = ("all",) if options.resize_to_tokens else PROTOCOLS
        self._results: dict[str, dict[str, float]] | None = None  # of the last epoch
        self.own_protocol = "all" if whole or options.unmask_epochs else "tickets"
        self.folder: Path | None = None
        self.board = Board()
        self._stop = False

    def _rows(self, split: str) -> Rows:
        rows = Rows(self.opened, split)
        if not rows.labelled:
            raise TicketSetError(f"{self.opened.url}: split {split} has images without label")
        if rows.skipped:
            log.info(f"{split}: {rows.skipped} images of the base have no ticket and are skipped")
        if split == self.options.train_split and len(rows) < self.options.repeats:
            raise TicketSetError(f"--repeats {self.options.repeats}: split {split} has only {len(rows)} images")
        views = self.opened.manifest["splits"][split]["views"]
        if split == self.options.train_split and self.options.repeats > max(1, views - 1):
            raise TicketSetError(
                f"--repeats {self.options.repeats}: {self.opened.url} has {max(1, views - 1)} training views an image"
            )
        return rows

    def _tokens(self, wrapped: TicketViT) -> int:
        """K of this run; the model's grid must be the set's."""
        options, grid = self.options, self.opened.grid
        if options.resize_to_tokens:
            return wrapped.grid[0] * wrapped.grid[1]
        if wrapped.grid != grid or wrapped.patch_size != self.opened.manifest["patch_size"]:
            raise TicketSetError(
                f"--model {options.model}: has a {wrapped.grid[0]}x{wrapped.grid[1]} grid of {wrapped.patch_size} px patches,"
                f" but the tickets of {self.opened.url} are for {grid[0]}x{grid[1]} of {self.opened.manifest['patch_size']} px;"
                f" mine with --patch-size {wrapped.patch_size}"
            )
        if options.unmask_epochs > options.epochs:
            raise TicketSetError(f"--unmask-epochs {options.unmask_epochs}: expected at most --epochs {options.epochs}")
        n = self.opened.num_patches
        if (options.tokens or 1) > n:
            raise TicketSetError(f"--tokens {options.tokens}: expected at most {n}, the patches of a view")
        tokens = n if options.tickets == "full" else options.tokens or self.opened.k
        return tokens

    def _state(self, wrapped: TicketViT, model: Any, global_batch: int) -> tuple[State, float]:
        options, device = self.options, self.world.device
        lr = options.lr or options.lr_base * global_batch / 512
        try:
            optimizer = create_optimizer_v2(model, options.opt, lr=lr, weight_decay=options.weight_decay)
            scheduler, _ = create_scheduler_v2(
                optimizer,
                options.sched,
                num_epochs=options.epochs,
                min_lr=options.min_lr,
                warmup_lr=options.warmup_lr,
                warmup_epochs=options.warmup_epochs,
                step_on_epochs=False,
                updates_per_epoch=self.steps,
            )
            scheduler.step_update(0)
        except (AssertionError, AttributeError, ValueError) as error:  # timm's factories, for names they do not know
            reason = str(error).splitlines()[0] if str(error) else "not supported here"
            raise TicketSetError(f"--opt {options.opt}, --sched {options.sched}, --lr {lr:g}: {reason}") from None
        scaler = torch.amp.GradScaler(device.type, enabled=options.amp and options.amp_dtype == "float16")
        ema = ModelEmaV3(model, decay=options.model_ema_decay, use_warmup=True) if options.model_ema else None
        trained: Any = wrapped
        if options.torchcompile:
            trained = torch.compile(trained)  # before DDP, as timm
        if self.world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            trained = torch.nn.parallel.DistributedDataParallel(trained, device_ids=ids)
        self.plain = wrapped
        return State(trained, model, optimizer, scheduler, scaler, ema), lr

    def _step_options(self, config: dict[str, Any]) -> StepOptions:
        options = self.options
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[options.amp_dtype]
        return StepOptions(
            device=self.world.device,
            mean=config["mean"],
            std=config["std"],
            patch_size=self.opened.manifest["patch_size"],
            grid_width=self.plain.grid[1],
            num_classes=len(self.opened.classes),
            smoothing=options.smoothing,
            clip_grad=options.clip_grad,
            accum=options.grad_accum_steps,
            amp_dtype=dtype if options.amp else None,
            seed=options.seed,
            rank=self.world.rank,
            log_interval=options.log_interval,
            recovery_interval=options.recovery_interval,
            stop_requested=self._stop_requested,
        )

    def _stop_requested(self, boundary: bool) -> bool:
        """Whether to stop here. Ranks must stop at one step, so several agree, and only where they wait anyway."""
        if self.world.size == 1:
            return self._stop
        if not boundary:
            return False
        flag = torch.tensor(int(self._stop), device=self.world.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def execute(self) -> int:
        """The command from here on."""
        options = self.options
        if options.eval:
            if not options.resume and not options.initial_checkpoint and not options.pretrained:
                raise TicketSetError("--eval: nothing to evaluate; give --resume, --initial-checkpoint or --pretrained")
            if options.resume:
                self.folder = self._open_folder()
            self._report(self._evaluate(self.final_protocols))
            return 0
        self.folder = self._open_folder()
        self._show()
        if self.world.rank == 0:
            self.board = Board(options.log_tensorboard, options.wandb_project, self.folder, self._arguments())
        before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_stop", True))
        try:
            return self._train()
        except Stopped:
            log.info(f"stopped at epoch {self.state.epoch}, step {self.state.step}; --resume latest goes on from here")
            return 143
        finally:
            signal.signal(signal.SIGTERM, before)

    def _train(self) -> int:
        if self.world.size > 1:
            # DDP lays its gradient buckets out anew after its first backward. Done before the first update, a resumed
            # process sums gradients in the order of one that was never stopped.
            for _ in range(2):
                batch = self.feed[self.state.epoch % self.options.epochs, 0, self.world.rank]
                train_micro_batch(self.state, batch, self.step_options, 0, 0, True)
                self.state.optimizer.zero_grad()
        if self.feed_options.unmask_from is not None and self.state.epoch < self.feed_options.unmask_from:
            self._try_full_step()
        while self.state.epoch < self.options.epochs:
            self._epoch()
        self._report(self._results or self._evaluate(self.final_protocols))
        return 0

    def _epoch(self) -> None:
        state, options = self.state, self.options
        accum, world = options.grad_accum_steps, self.world
        places = [
            (state.epoch, step, micro * world.size + world.rank)
            for step in range(state.step, self.steps)
            for micro in range(accum)
        ]
        batches = loader(self.feed, places, options.workers, world.device)
        train_loss = train_epoch(state, batches, self.steps, self.step_options, self._log, self._save_recovery)
        lr = state.optimizer.param_groups[0]["lr"]
        is_last = state.epoch == options.epochs - 1
        results = self._evaluate(self.final_protocols if is_last else self.protocols)
        self._results = results if is_last else None
        metric = results[self.own_protocol]["top1"]
        epoch = state.epoch
        state.epoch, state.step, state.loss_sum, state.loss_count = epoch + 1, 0, 0.0, 0
        better = is_better(metric, state.best)
        if better:
            state.best, state.best_epoch = metric, epoch
        if self.world.rank == 0 and self.folder:
            arguments = self._arguments()
            if better:
                checkpoint.save_best(self.folder, state, arguments, metric, self.opened.classes)
            flat = self._row(results)
            summary = self.folder / "summary.csv"
            update_summary(epoch, {"loss": train_loss}, flat, summary, lr=lr, write_header=not summary.exists())
            checkpoint.save(self.folder / checkpoint.LAST, state, arguments, metric)
            self.board.write(epoch, {"train_loss": train_loss, "lr": lr, **{k: v for k, v in flat.items() if v != ""}})
            (self.folder / checkpoint.RECOVERY).unlink(missing_ok=True)
        text = ", ".join(f"{name} {figures['top1']:.2f}" for name, figures in results.items())
        log.info(f"Test: {epoch}  top-1 {text}  (best {state.best:.2f}, epoch {state.best_epoch})")

    def _row(self, results: dict[str, dict[str, float]]) -> dict[str, Any]:
        """summary.csv's cells; EMA's stand empty until its weights have seen enough, random's until the last epoch."""
        prefixes = ("", "ema_") if self.state.ema is not None else ("",)
        names = [f"{prefix}{protocol}" for prefix in prefixes for protocol in self.final_protocols]
        return {
            f"{name}_{figure}": results.get(name, {}).get(figure, "")
            for name in names
            for figure in ("top1", "top5", "loss")
        }

    def _evaluate(self, protocols: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Raw weights under each protocol, and EMA weights once they have seen enough steps."""
        results: dict[str, dict[str, float]] = {}
        state, options = self.state, self.options
        models = {"": self.plain}
        updates = state.epoch * self.steps + state.step
        if state.ema is not None and updates > 1 / (1 - options.model_ema_decay):
            models["ema_"] = TicketViT(state.ema.module)
        for prefix, model in models.items():
            batches = loader(self.val, range(len(self.val)), options.workers, self.world.device)
            found = evaluate(model, batches, protocols, self.test_tokens, self.step_options)
            results |= {prefix + name: figures for name, figures in found.items()}
        return results

    def _log(self, state: State, steps: int, figures: dict[str, float]) -> None:
        images = figures["images"] * self.world.size
        mean = state.loss_sum / state.loss_count
        lr = state.optimizer.param_groups[0]["lr"]
        log.info(
            f"Train: {state.epoch} [{state.step:>4d}/{steps} ({100 * state.step / steps:>3.0f}%)]"
            f"  Loss: {figures['loss']:.3f} ({mean:.3f})  {images / figures['seconds']:.1f}/s"
            f"  LR: {lr:.3e}  Data: {figures['waited'] / figures['seconds']:.0%}"
            f"  Tokens: {self.tokens}/{self.plain.grid[0] * self.plain.grid[1]}"
        )

    def _save_recovery(self, state: State) -> None:
        if self.world.rank == 0 and self.folder:
            checkpoint.save(self.folder / checkpoint.RECOVERY, state, self._arguments(), None)

    def _arguments(self) -> dict[str, Any]:
        """args.yaml: the flags, and what they were applied to."""
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.options).items()}
        arguments |= {
            "set_id": self.opened.manifest["set_id"],
            "world_size": self.world.size,
            "global_batch": self.feed_options.global_batch,
            "resolved_tokens": self.tokens,
        }
        return arguments

    def _open_folder(self) -> Path:
        """The run's folder: a new one, or the one that is resumed.

        Raises:
            TicketSetError: it exists and --resume was not given, or holds a run of other arguments.
        """
        options = self.options
        if options.resume and options.resume != "latest":
            folder, path = Path(options.resume).parent, Path(options.resume)
            if Path(options.resume).is_dir():
                folder, path = Path(options.resume), checkpoint.latest(Path(options.resume))
        else:
            name = options.experiment or "-".join([time.strftime("%Y%m%d-%H%M%S"), options.model, options.tickets])
            folder = Path(options.output) / name
            path = folder
        if options.resume:
            if options.resume == "latest":
                if not options.experiment:
                    raise TicketSetError("--resume latest: name the run with --experiment")
                path = checkpoint.latest(folder)
            self._resume(path)
            return folder
        # Rank 0 alone looks: for the others the folder may be there because rank 0 has just made it.
        taken = [self.world.rank == 0 and folder.exists() and any(folder.iterdir())]
        if self.world.size > 1:
            torch.distributed.broadcast_object_list(taken)
        if taken[0]:
            raise TicketSetError(
                f"{folder}: a run is there already; go on with --resume latest, or name another --experiment"
            )
        if self.world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.yaml").write_text(yaml.safe_dump(self._arguments(), sort_keys=False))
            (folder / "classes.txt").write_text("".join(f"{name}\n" for name in self.opened.classes))
        return folder

    def _resume(self, path: Path) -> None:
        content = checkpoint.read(path)
        then, now = content["args"], self._arguments()
        differing = [k for k in now if k not in FREE_TO_CHANGE and then.get(k) != now[k]]
        if differing and not self.options.eval:
            raise TicketSetError(
                f"--resume {path}: trained with other arguments: "
                + "; ".join(f"{k}: {then.get(k)} there, {now[k]} here" for k in differing[:5])
            )
        checkpoint.restore(content, self.state)
        if self.world.rank == 0 and not self.options.eval:
            drop_rows(path.parent / "summary.csv", self.state.epoch)
        self.state.scheduler.step_update(self.state.epoch * self.steps + self.state.step)
        log.info(f"resuming {path}: epoch {self.state.epoch}, step {self.state.step}")

    def _try_full_step(self) -> None:
        """One update's worth of work on all patches, thrown away: memory fails now or never."""
        full = TrainFeed(self.feed.rows, replace(self.feed_options, unmask_from=0))
        micro = self.world.rank
        train_micro_batch(self.state, full[0, 0, micro], self.step_options, 0, 0, True)
        self.state.optimizer.zero_grad()

    def _show(self) -> None:
        """What is about to happen, before the first step."""
        options, n = self.options, self.plain.grid[0] * self.plain.grid[1]
        own, dense = gmacs(self.plain, self.tokens), gmacs(self.plain, n)
        batch = self.feed_options.global_batch
        log.info(f"{options.model}: {sum(p.numel() for p in self.plain.parameters()) / 1e6:.1f} M parameters")
        log.info(
            f"{options.tickets}: {self.tokens} of {n} tokens, {own:.3f} GMACs an image (dense {dense:.3f}, {own / dense:.0%})"
        )
        log.info(
            f"global batch {batch} = {options.batch_size} x {self.world.size} ranks x {options.grad_accum_steps},"
            f" lr {self.lr:.3e}, {options.epochs} epochs of {self.steps} steps"
        )
        if self.feed.augment.skipped:
            log.info(
                f"--aa: geometry is mined; {', '.join(sorted(set(self.feed.augment.skipped)))} leave the view as it is"
            )
        if self.folder:
            log.info(f"output: {self.folder}")

    def _report(self, results: dict[str, dict[str, float]]) -> None:
        for name, figures in results.items():
            log.info(f"{name:12s} top-1 {figures['top1']:.2f}  top-5 {figures['top5']:.2f}  loss {figures['loss']:.4f}")
        if self.world.rank == 0 and self.folder and not self.options.eval:
            final = {"epoch": self.state.epoch - 1, "results": results, "best": self.state.best}
            (self.folder / "final.json").write_text(json.dumps(final, indent=1) + "\n")
        if self.state.best is not None:
            log.info(f"*** Best metric: {self.state.best:.2f} (epoch {self.state.best_epoch})")


def drop_rows(summary: Path, epoch: int) -> None:
    """Take back the rows of epochs that will be trained again: a run may be killed between its row and its checkpoint."""
    if summary.exists():
        lines = summary.read_text().splitlines(keepends=True)
        kept = [line for line in lines[1:] if int(line.split(",")[0]) < epoch]
        write_atomic(summary, "".join([*lines[:1], *kept]).encode())
