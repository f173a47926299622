"""Training as a library call: the same as the command, hooks at their places, and nothing else changed."""

import copy
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from conftest import long
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset, ValidationDataset
from trainer.engine import Stopped
from trainer.families.patches import normalize
from trainer.hooks import Epoch, Hook
from trainer.options import Augment, Output, Recipe, Tickets
from trainer.output import checkpoint
from trainer.output.events import Events
from trainer.output.folder import RunFolder
from trainer.trainer import Trainer
from training import same, summary_of, weights_of

SMALL = {"model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "batch_size": 4, "repeats": 2, "workers": 0}
QUICK = {**SMALL, "epochs": 2, "warmup_epochs": 1, "log_interval": 1}


@pytest.fixture(scope="module")
def opened(tickets: Path) -> TicketSet:
    return TicketSet.open(str(tickets))


def trainer(opened: TicketSet, *hooks: Hook, **settings: Any) -> Trainer:
    return Trainer(opened, Recipe.of({"shards": opened.url, **QUICK, **settings}), hooks)


def state_of(trained: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trained.student.model.state_dict().items()}


class Places(Hook):
    """Writes down where it was called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def begin(self, trainer: Trainer) -> None:
        self.seen.append("begin")

    def before_epoch(self, trainer: Trainer) -> None:
        self.seen.append(f"epoch {trainer.state.epoch}")

    def before_step(self, trainer: Trainer, update: int) -> None:
        self.seen.append(f"step {update}")

    def after_update(self, trainer: Trainer, update: int) -> None:
        self.seen.append(f"updated {update}")

    def share(self, trainer: Trainer) -> None:
        self.seen.append("share")

    def save(self, trainer: Trainer) -> None:
        self.seen.append("save")

    def also_tested(self, trainer: Trainer) -> dict:
        self.seen.append("test")
        return {}

    def after_epoch(self, trainer: Trainer, epoch: Epoch) -> None:
        self.seen.append(f"after {epoch.number}, at {trainer.state.epoch}")

    def at_end(self, trainer: Trainer, results: Mapping[str, Any], answers: torch.Tensor) -> None:
        self.seen.append(f"end {list(results)} {list(answers.shape)}")


class Shrink(Hook):
    """Takes a share of the first block's weights away after each update, more each time: a hook with state that
    changes the student."""

    def __init__(self) -> None:
        self.calls = 0

    def after_update(self, trainer: Trainer, update: int) -> None:
        self.calls += 1
        with torch.no_grad():
            trainer.student.model.blocks[0].mlp.fc1.weight.mul_(1 - 0.01 * self.calls)

    def on_save(self, trainer: Trainer) -> dict[str, Any]:
        return {"shrink_calls": self.calls}

    def on_restore(self, trainer: Trainer, content: Mapping[str, Any]) -> None:
        self.calls = content["shrink_calls"]


class StopAt(Hook):
    """Stops the run after an update, as a signal does."""

    def __init__(self, update: int) -> None:
        self.update, self.asked = update, 0

    def after_update(self, trainer: Trainer, update: int) -> None:
        if update == self.update:
            self.asked = 15


def test_a_library_call_trains_the_commands_weights_and_writes_its_folder(opened, whole, tmp_path):
    trained = trainer(opened, RunFolder(tmp_path / "run"), output=str(tmp_path), experiment="run")
    results = trained.fit()
    assert same(weights_of(tmp_path / "run"), weights_of(whole))
    assert summary_of(tmp_path / "run") == summary_of(whole)
    assert (tmp_path / "run/predictions.parquet").read_bytes() == (whole / "predictions.parquet").read_bytes()
    assert set(results) == {"tickets", "all", "random"}


def test_a_call_never_writes_over_a_run_that_is_there(opened, tmp_path):
    trainer(opened, RunFolder(tmp_path / "run"), epochs=1, warmup_epochs=0).fit()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(TicketSetError, match="run: a run is there already; restore its checkpoint"):
        trainer(opened, RunFolder(tmp_path / "run"), epochs=1, warmup_epochs=0, seed=1).fit()
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_without_hooks_nothing_is_written_and_the_weights_are_the_same(opened, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = trainer(opened)
    trained.fit()
    assert same(state_of(trained), weights_of(whole)) and not list(tmp_path.iterdir())
    other = trainer(opened, seed=1)
    other.fit()
    assert not same(state_of(other), weights_of(whole))  # the comparison can fail


def test_hooks_are_called_at_their_places(opened):
    hook = Places()
    trainer(opened, hook, epochs=1, warmup_epochs=0).fit()
    steps = [call for update in range(6) for call in (f"step {update}", f"updated {update}")]
    ends = ["share", "save", "test", "after 0, at 1", "end ['tickets', 'all', 'random'] [3, 6]"]
    assert hook.seen == ["begin", "epoch 0", *steps, *ends]


@pytest.mark.parametrize("update", [long(1), 7])
def test_a_hook_with_state_goes_on_exactly_after_a_stop(opened, tmp_path, update):
    never = trainer(opened, Shrink(), RunFolder(tmp_path / "never"))
    never.fit()
    stop = StopAt(update)
    stopped = trainer(opened, Shrink(), stop, RunFolder(tmp_path / "run"))
    stopped._stop = lambda: stop.asked
    with pytest.raises(Stopped):
        stopped.fit()
    assert stopped.updates == update + 1
    again = trainer(opened, Shrink(), RunFolder(tmp_path / "run"))
    checkpoint.restore(tmp_path / "run" / checkpoint.RECOVERY, again)
    again.fit()
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "never"))
    forgetful = trainer(opened, Shrink())
    content = checkpoint.read(tmp_path / "run" / checkpoint.LAST)
    del content["shrink_calls"]
    with pytest.raises(TicketSetError, match="does not fit this run"):
        checkpoint.restore(tmp_path / "run" / checkpoint.LAST, forgetful, content)


def test_two_hooks_cannot_write_the_same_part_of_a_checkpoint(opened, tmp_path):
    with pytest.raises(AssertionError, match="would overwrite"):
        trainer(opened, Shrink(), Shrink(), RunFolder(tmp_path / "run")).fit()


def test_validation_never_changes_the_student(opened):
    """Of a selector in the middle of its falling keep rate, whose batch norms and rates a test could move."""
    settings = {"tickets": "full", "drop_blocks": (0, 1), "keep_rate": 0.4, "shrink_epochs": 2}
    trained = trainer(opened, **settings)
    trained.before_step(6)
    rate, before = trained.student._rate, state_of(trained)
    assert 0.4 < rate < 1
    results, _ = trained.evaluate(trained.protocols)
    assert trained.student._rate == rate and same(state_of(trained), before)
    final = copy.deepcopy(trained.student)
    final.set_rate(0.4)
    trained.student = final
    assert trained.evaluate(trained.protocols)[0] == results  # it was tested at its final rate


def test_a_plain_loop_over_the_dataset_makes_the_trainers_batches(opened):
    """As the README does it, in worker processes of a DataLoader, for two ranks; and from the middle of an epoch."""
    tickets, augment = Tickets(tokens=5, repeats=2), Augment()
    alone = TicketDataset(opened, tickets=tickets, augment=augment, batch_size=8, seed=3)
    ranks = TicketDataset(opened, tickets=tickets, augment=augment, batch_size=4, micro_batches=2, seed=3)
    expected = [alone[1, step, 0] for step in range(1, alone.steps)]
    parts = [
        list(DataLoader(ranks, batch_size=None, sampler=ranks.places(1, 1, rank, 2), num_workers=2)) for rank in (0, 1)
    ]
    assert len(expected) == len(parts[0]) == len(parts[1]) == 2
    for step, batch in enumerate(expected):
        for name, tensor in batch.items():
            both = torch.cat([parts[0][step][name], parts[1][step][name]])
            assert torch.equal(both, tensor), name


def test_the_dataset_needs_no_more_than_a_set(opened):
    dataset = TicketDataset(opened, tickets=Tickets(repeats=1))
    batch = dataset[0, 0, 0]
    assert batch["patches"].shape == (128, 8, 768) and len(dataset) == dataset.steps == 1
    pixels = normalize(batch["patches"], (0.5,) * 3, (0.25,) * 3)
    assert pixels.dtype == torch.float32 and -2 <= pixels.min() < pixels.max() <= 2
    assert ValidationDataset(opened)[0]["rankings"].shape == (6, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 17}, "`tokens` 17: expected at most 16"),
        ({"repeats": 4}, "`repeats` 4: .* has 3 training views"),
        ({"unmask_epochs": 3}, "`unmask_epochs` 3: expected at most `epochs` 2"),
        ({"keep_rate": 0.5}, "`keep_rate`: of a selector"),
        ({"epochs": 0}, "`epochs` 0: "),
        ({"opt": "nosuch"}, "`opt` nosuch"),
        ({"device": "nosuch"}, "`device` nosuch"),
        ({"token": 5}, "no such setting: token; near: tokens"),
    ],
)
def test_errors_name_fields(opened, settings, said):
    with pytest.raises(TicketSetError, match=said):
        trainer(opened, **settings)


def test_weights_and_biases_reads_the_events_that_tensorboard_gets(opened, tmp_path, monkeypatch):
    """W&B itself is not installed here; its init must come before the writer that it watches, and once."""
    calls: list[dict[str, Any]] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **given: calls.append({**given, "events": list((tmp_path / "run").glob("events*"))})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    output = Output(wandb_project="tickets")
    folder = RunFolder(tmp_path / "run", output)
    trainer(opened, folder, Events(folder, output)).fit()
    (call,) = calls
    assert call["sync_tensorboard"] and call["project"] == "tickets" and call["name"] == "run" and not call["events"]
    assert call["config"]["epochs"] == 2 and call["resume"] == "allow"
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"train_loss", "lr", "tickets_top1", "all_loss", "random_top5"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("tickets_top1")] == [0, 1]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TicketSetError, match=r"pip install 'datalth\[wandb\]'"):
        Events(folder, output)
