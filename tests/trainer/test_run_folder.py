"""A run's folder: how runs begin, go on, stop and are evaluated, and what the verdict reads."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner

from conftest import long, mine
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer import trainer as trainer_module
from trainer.cli import main
from trainer.options import cores
from trainer.output import checkpoint
from trainer.output.claim import Claim
from trainer.output.folder import Summary
from training import SMALL, arguments, same, stopped_at, summary_of, train, two_ranks, weights_of

pytestmark = pytest.mark.slow  # runs of several processes


def test_resume_latest_begins_a_run_that_has_not_begun(tickets, whole, tmp_path):
    """One command for a queue that starts jobs again: the first time there is no folder, then one without a checkpoint."""
    train(tickets, tmp_path, "run", "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(whole))
    for path in (tmp_path / "run").iterdir():
        if path.name not in ("args.yaml", "classes.txt"):
            path.unlink()
    assert "a run is there already" in train(tickets, tmp_path, "run", code=1).output
    other = train(tickets, tmp_path, "run", "--resume", "latest", "--seed", 1, code=1).output
    assert "seed: 42 there, 1 here" in other
    train(tickets, tmp_path, "run", "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(whole))


def test_resume_refuses_a_folder_that_holds_no_run(tickets, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "without args.yaml" in train(tickets, tmp_path, "run", "--resume", "latest", code=1).output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_the_final_files_agree_with_each_other_and_with_the_set(tickets, whole):
    final = json.loads((whole / "final.json").read_text())
    table = pq.read_table(whole / "predictions.parquet")
    assert table.column_names == ["key", "label", "tickets", "all", "random"]
    stored = [(sample.key, sample.label) for sample in TicketSet.open(str(tickets)).stream("val")]
    assert list(zip(table["key"].to_pylist(), table["label"].to_pylist(), strict=True)) == stored
    for protocol in ("tickets", "all", "random"):
        hits = (table[protocol].to_numpy() == table["label"].to_numpy()).mean()
        assert final["results"][protocol]["top1"] == pytest.approx(100 * hits)
    cost = final["cost"]
    assert (cost["tokens"], cost["patches"]) == (8, 16) and cost["seconds"] > 0
    assert cost["train_gmacs"] == cost["test_gmacs"]["tickets"] < cost["test_gmacs"]["all"] == cost["dense_gmacs"]
    saved = yaml.safe_load((whole / "args.yaml").read_text())
    assert saved["set_id"] == saved["base_set_id"] == TicketSet.open(str(tickets)).manifest.set_id


def test_unmasked_and_resized_runs_count_their_own_cost(tickets, tmp_path):
    train(tickets, tmp_path, "unmask", "--unmask-epochs", 1)
    train(tickets, tmp_path, "resize", "--resize-to-tokens", "--tokens", 9, "--epochs", 1)
    unmask, resize = (json.loads((tmp_path / n / "final.json").read_text()) for n in ("unmask", "resize"))
    k, n = (unmask["cost"]["test_gmacs"][name] for name in ("tickets", "all"))
    assert unmask["cost"]["train_gmacs"] == pytest.approx((k + n) / 2)
    assert list(resize["results"]) == list(resize["cost"]["test_gmacs"]) == ["all"]
    assert resize["cost"]["train_gmacs"] < resize["cost"]["dense_gmacs"] == unmask["cost"]["dense_gmacs"]


def test_eval_takes_the_model_from_the_run(tickets, whole, tmp_path):
    """No --model-kwargs here: without them timm's deit_tiny would not fit. model_best.pth.tar is enough."""
    final = json.loads((whole / "final.json").read_text())["results"]
    for path in (whole, whole / "last.pth.tar", whole / "model_best.pth.tar"):
        flags = ["--shards", str(tickets), "-j", "0", "-b", "4", "--repeats", "2", "--eval", "--resume", str(path)]
        result = CliRunner().invoke(main, flags)
        assert result.exit_code == 0, result.output
        shown = {line.split()[0]: line.split()[2] for line in result.output.splitlines() if " top-1 " in line}
        assert list(shown) == ["tickets", "all", "random"]
        if path.name != "model_best.pth.tar":
            assert shown == {name: f"{final[name]['top1']:.2f}" for name in shown}
    assert not (tmp_path / "run").exists()


def test_eval_on_another_set(tickets, whole, center_set, photos, tmp_path):
    """Its classes must be the run's; how it was stored and repeated is no matter."""
    flags = ["-j", "0", "--eval", "--resume", str(whole)]
    assert CliRunner().invoke(main, ["--shards", str(center_set), *flags]).exit_code == 0  # of 2 training views
    copy = Path(shutil.copytree(photos, tmp_path / "photos"))
    for split in ("train", "val"):
        (copy / split / "cat").rename(copy / split / "dog")
    mine("--data", copy, "--out", tmp_path / "dogs", "--method", "center")
    refused = CliRunner().invoke(main, ["--shards", str(tmp_path / "dogs"), *flags])
    assert refused.exit_code == 1 and "trained on other classes (3, from ant) than" in refused.output


@pytest.mark.parametrize("asked", [True, False])
def test_eval_can_be_stopped(asked, tickets, whole, monkeypatch):
    def stop_requested(self):
        if asked:
            os.kill(os.getpid(), signal.SIGINT)
        return requested(self)

    requested = trainer_module.Trainer.stop_requested
    monkeypatch.setattr(trainer_module.Trainer, "stop_requested", stop_requested)
    result = CliRunner().invoke(
        main, ["--shards", str(tickets), "-j", "0", "-b", "4", "--eval", "--resume", str(whole)]
    )
    assert result.exit_code == (130 if asked else 0)
    assert ("SIGINT: stopped; nothing was to be saved" in result.output) == asked
    assert ("top-1" in result.output) != asked
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_eval_of_a_run_knows_its_set(tickets, whole, center_set, tmp_path, monkeypatch):
    """By its args.yaml, while the same set is there."""
    final = json.loads((whole / "final.json").read_text())["results"]

    def evaluated(*flags: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, ["-j", "0", "-b", "4", "--eval", *map(str, flags)])
        assert result.exit_code == code, result.output
        return result.output

    for flags in (["--resume", whole], ["--resume", whole / "last.pth.tar"],
                  ["--resume", "latest", "--output", whole.parent, "--experiment", whole.name]):  # fmt: skip
        assert f"tickets      top-1 {final['tickets']['top1']:.2f}" in evaluated(*flags)
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    arguments = yaml.safe_load((run / "args.yaml").read_text())
    for changed, said in (
        ({"shards": str(center_set)}, "expected the set that"),
        ({"shards": str(tmp_path / "gone")}, "--shards says where it is now"),
        ({"shards": "http://127.0.0.1:9/set"}, "give --shards"),
        ({"base": "http://127.0.0.1:9/set"}, "give --shards"),
        ({"shards": None}, "give --shards"),
    ):
        (run / "args.yaml").write_text(yaml.safe_dump({**arguments, **changed}))
        refused = evaluated("--resume", run, code=1)
        assert said in refused and refused.count("\n") == 1
    evaluated("--resume", run, "--shards", tickets)
    assert "which set?" in evaluated("--resume", tmp_path / "none.pth.tar", code=1)
    assert "Missing option '--shards'" in evaluated("--pretrained", code=2)
    assert "Missing option '--shards'" in CliRunner().invoke(main, ["--resume", str(run)]).output


@pytest.mark.parametrize("name", ["model_best.pth.tar", "model_best.safetensors"])
def test_weights_alone_cannot_be_resumed(tickets, whole, name):
    output = train(tickets, whole.parent, "x", "--resume", whole / name, code=1).output
    assert "holds weights alone; take last.pth.tar, or start anew" in output and output.count("\n") == 1


def test_eval_refuses_a_head_that_was_never_trained(tickets, whole, tmp_path):
    state = weights_of(whole)
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    torch.save(bare, tmp_path / "bare.pth")
    output = train(tickets, tmp_path, "x", "--eval", "--initial-checkpoint", tmp_path / "bare.pth", code=1).output
    assert "has no trained head.weight" in output
    torch.save(state, tmp_path / "with.pth")
    train(tickets, tmp_path, "x", "--eval", "--initial-checkpoint", tmp_path / "with.pth")


def test_a_young_average_is_never_taken_for_the_model(tickets, tmp_path):
    """timm prefers state_dict_ema; one that has seen 12 steps is noise."""
    train(tickets, tmp_path, "young")
    content = torch.load(tmp_path / "young/last.pth.tar", weights_only=True)
    assert "early_ema" in content and "state_dict_ema" not in content
    train(tickets, tmp_path, "old", "--model-ema-decay", 0.88)
    content = torch.load(tmp_path / "old/last.pth.tar", weights_only=True)
    assert "state_dict_ema" in content and "early_ema" not in content


def test_a_signal_in_validation_loses_nothing(tickets, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        evaluate = trainer_module.evaluate

        def interrupted(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments)

        patch.setattr(trainer_module, "evaluate", interrupted)
        output = train(tickets, tmp_path, "run", code=143).output
    assert "stopped at epoch 0, step 6" in output
    train(tickets, tmp_path, "run", "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(whole))
    assert summary_of(tmp_path / "run") == summary_of(whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line_with_its_name(tickets, tmp_path, workers):
    """The fast verify does not look at pixels: damage of the same size comes up in training."""
    copy = Path(shutil.copytree(tickets, tmp_path / "set"))
    for tar in copy.glob("train-*.tar"):
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"XXX").replace(b"\x89PNG", b"XXXX"))
    output = train(copy, tmp_path, "run", "-j", workers, code=1).output
    assert output.splitlines()[-1].startswith("Error: ") and "Traceback" not in output, output


def test_a_worker_that_dies_is_one_line_that_names_the_last_checkpoint(tickets, whole, tmp_path, monkeypatch):
    from trainer.data.dataset import TicketDataset

    parent = os.getpid()
    views = TicketDataset._views

    def dies(self, *arguments):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return views(self, *arguments)

    def last_line(*flags: object) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(TicketDataset, "_views", dies)
            return train(tickets, tmp_path, "run", "-j", 1, *flags, code=1).output.splitlines()[-1]

    said = last_line()
    assert said.startswith("Error: -j 1: worker process ") and "was killed by SIGKILL; out of memory?" in said
    assert said.endswith("there was no checkpoint yet")
    with monkeypatch.context() as patch:
        stopped_at(8, patch)
        train(tickets, tmp_path, "run", "--resume", "latest", code=143)
    recovery = tmp_path / "run" / "recovery.pth.tar"
    assert last_line("--resume", "latest").endswith(f"; --resume latest goes on from {recovery}")
    train(tickets, tmp_path, "run", "-j", 1, "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(whole))


def wait_for(path: Path, rank: subprocess.Popen) -> None:
    while not path.exists():
        assert rank.poll() is None, rank.communicate()[0]
        time.sleep(0.05)


@pytest.mark.long
def test_one_signalled_rank_stops_all_at_the_same_step_and_losses_are_of_all_ranks(tickets, tmp_path):
    """The interval of the log is longer than the epoch: it does not decide when a signal is heard."""
    flags = ["--drop-path", "0", "--reprob", "0", "--log-interval", "50", "--epochs", "400", "--warmup-epochs", "0"]
    # The first start of a queue's command, too: no folder is there yet.
    ranks = two_ranks(*arguments(tickets, tmp_path, "two", *flags, "-b", "2", "--resume", "latest"))
    wait_for(tmp_path / "two" / "last.pth.tar", ranks[0])
    ranks[1].send_signal(signal.SIGTERM)  # the other rank hears of it by the collective
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], outputs
    assert "--resume latest goes on from here" in outputs[0]
    # The same samples on one rank: the mean loss of the first epoch is that of both ranks together.
    command = [sys.executable, "-m", "trainer.cli", *arguments(tickets, tmp_path, "one", *flags, "-b", "4")]
    one = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "one" / "last.pth.tar", one)
    one.kill()
    one.wait()
    losses = [first_loss(tmp_path / name) for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def first_loss(folder: Path) -> float:
    head, row = (folder / "summary.csv").read_text().splitlines()[:2]
    return float(row.split(",")[head.split(",").index("train_loss")])


FAULTS = """
import os, sys
import torch
from trainer import trainer as run
from trainer.families import base as ticket_model
from trainer.data.dataset import ValidationDataset

fault, rank = sys.argv.pop(1), int(os.environ["RANK"])
if fault == "signal in validation" and rank == 1:
    evaluate = run.evaluate
    def signalled(*arguments):
        os.kill(os.getpid(), 15)
        return evaluate(*arguments)
    run.evaluate = signalled
if fault == "loss" and rank == 1:
    cross_entropy = ticket_model.soft_cross_entropy
    ticket_model.soft_cross_entropy = lambda *arguments: cross_entropy(*arguments) * float("nan")
if fault == "worker" and rank == 1:
    from trainer.data.dataset import TicketDataset
    run_pid, views = os.getpid(), TicketDataset._views
    def dies(*arguments):
        if os.getpid() != run_pid:
            os.kill(os.getpid(), 9)
        return views(*arguments)
    TicketDataset._views = dies
if fault == "image" and rank == 1:
    def broken(*arguments):
        raise OSError("val/bee/bee_0: cannot be read")
    ValidationDataset.__getitem__ = broken
from trainer.cli import main
main()
"""


@pytest.mark.parametrize(
    ("fault", "codes", "said"),
    [
        long("signal in validation", [143, 143], ["stopped at epoch 0, step 6", ""]),
        long("loss", [1, 1], ["loss is not finite at epoch 0, step 0"] * 2),
        long("image", [1, 1], ["another rank stopped; it says why", "val/bee/bee_0: cannot be read"]),
        ("worker", [1, 1], ["another rank stopped; it says why", "-j 1: worker process"]),
    ],
)
def test_a_fault_of_one_rank_is_a_line_on_each(tickets, tmp_path, fault, codes, said):
    (tmp_path / "fault.py").write_text(FAULTS)
    flags = arguments(tickets, tmp_path, "run", "-b", "2", "--log-interval", "50", "-j", int(fault == "worker"))
    ranks = two_ranks(fault, *flags, program=str(tmp_path / "fault.py"))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes, outputs
    for output, text in zip(outputs, said, strict=True):
        assert text in output and "Traceback" not in output, output


def test_every_kind_of_head_is_costed_and_trains(tickets, tmp_path):
    """SigLIP pools by attention."""
    train(tickets, tmp_path, "siglip", "--model", "vit_base_patch16_siglip_224", "--epochs", 1)


def test_timms_optimizer_flags_reach_timm(tickets, tmp_path):
    flags = ["--layer-decay", 0.5, "--opt", "sgd", "--opt-kwargs", "nesterov=False", "--opt-kwargs", "momentum=0.8"]
    train(tickets, tmp_path, "run", *flags, "--clip-grad", 0.01, "--epochs", 1)
    groups = torch.load(tmp_path / "run/last.pth.tar", weights_only=True)["optimizer"]["param_groups"]
    assert {g["momentum"] for g in groups} == {0.8} and {g["nesterov"] for g in groups} == {False}
    assert len({g["lr_scale"] for g in groups}) == 4  # embedding, two blocks, head
    refused = train(tickets, tmp_path, "bad", "--opt-kwargs", "nosuch=1", code=1).output
    assert "nosuch" in refused and refused.count("\n") == 1


def test_a_warmup_as_long_as_the_run_is_said(tickets, tmp_path):
    assert "the learning rate only rises" in train(tickets, tmp_path, "run", "--epochs", 1).output
    assert "has 3 training views an image; take --repeats 3, or mine with datalth-mine --views 5 or more" in (
        train(tickets, tmp_path, "r", "--repeats", 4, code=1).output
    )
    assert "leave --tickets random out" in (
        train(tickets, tmp_path, "t", "--resize-to-tokens", "--tickets", "random", "--tokens", 9, code=1).output
    )


def test_flags_that_cannot_be_meant_are_refused_before_anything_is_trained(tickets, tmp_path):
    def refused(*flags: object, code: int = 1) -> str:
        output = train(tickets, tmp_path, "bad", *flags, code=code).output
        assert "Error: " in output and "Traceback" not in output and not (tmp_path / "bad").exists()
        return output

    small = ("--model-kwargs", "img_size=64", "--tokens", 9)
    assert "has a 4x4 grid" in refused("--resize-to-tokens", *small)
    assert "feeds is 4x4 of 14 px" in refused("--model-kwargs", "patch_size=14", "--model-kwargs", "img_size=70")
    assert "expected 3 input channels" in refused("--model-kwargs", "in_chans=1")
    assert "global_pool ''" in refused("--model-kwargs", "global_pool=", "--model-kwargs", "class_token=True")
    assert "expected cuda or cpu" in refused("--device", "meta")
    assert "second-order" in refused("--opt", "adahessian")
    for flags in (("--model-ema-decay", 1), ("--color-jitter", -1), ("--seed", 10**20), ("--clip-grad", -1)):
        assert "is not in the range" in refused(*flags, code=2)
    for text, message in (
        ("1: 2", "no such flag: '1'"),
        ("mixup: [1]", "expected a number, got [1]"),
        ("epochs: 2.7", "2.7"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        result = CliRunner().invoke(main, ["-c", str(tmp_path / "c.yaml"), "--shards", str(tickets), *SMALL])
        assert result.exit_code == 2 and message in result.output, result.output


def test_a_process_group_that_cannot_be_had_is_one_line(tickets, tmp_path, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert "WORLD_SIZE 2: no process group" in train(tickets, tmp_path, "bad", code=1).output


def test_a_run_that_never_saved_begins_again_with_flags_that_yaml_writes_otherwise(tickets, tmp_path):
    flags = ["--opt-kwargs", "betas=(0.9,0.95)", "--epochs", 1]
    train(tickets, tmp_path, "run", *flags)
    for path in (tmp_path / "run").glob("*.tar"):
        path.unlink()
    train(tickets, tmp_path, "run", *flags, "--resume", "latest")


def test_the_log_says_when_all_patches_are_fed(tickets, tmp_path):
    output = train(tickets, tmp_path, "run", "--unmask-epochs", 1).output
    assert "8 of 16 tokens, the last 1 epochs all;" in output
    lines = [line for line in output.splitlines() if line.startswith("Train: ")]
    assert [line.partition("Tokens: ")[2].split()[0] for line in lines] == ["8/16"] * 6 + ["16/16"] * 6


def test_a_val_split_without_one_good_image_is_refused_before_an_epoch_is_spent(photos, tmp_path):
    copy = Path(shutil.copytree(photos, tmp_path / "photos"))
    for path in (copy / "val").rglob("*.*"):
        path.write_bytes(b"no image")
    mine("--data", copy, "--out", tmp_path / "set", "--method", "center", "--max-failures", 1)
    output = train(tmp_path / "set", tmp_path, "run", "--repeats", 1, code=1).output
    assert "split val has no image that could be read" in output and not (tmp_path / "run").exists()


# What a crash or a full disk leaves.


class Full(io.RawIOBase):
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "last.pth.tar.tmp")
        return len(data)


def test_a_disk_that_fills_up_anywhere_in_a_checkpoint_says_so(tmp_path, monkeypatch):
    content = {"state_dict": {str(i): torch.zeros(500) for i in range(8)}, "args": {}, "classes": ["ant"]}
    checkpoint._write(tmp_path / "whole.pth.tar", content)
    size = (tmp_path / "whole.pth.tar").stat().st_size
    for room in range(0, size, size // 20):

        @contextlib.contextmanager
        def full(path: Path, room: int = room):
            file = io.BufferedWriter(Full(room))
            yield file
            file.flush()

        monkeypatch.setattr(checkpoint, "atomic_file", full)
        with pytest.raises(OSError) as raised:
            checkpoint._write(tmp_path / "last.pth.tar", content)
        assert raised.value.errno == errno.ENOSPC, room


ROW = {"epoch": 1, "train_loss": 0.5, "lr": 0.25}
HEAD = "epoch,train_loss,lr\n"


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (HEAD + "0,2.5,1.0\n1,2.25,1.0\n2,2.0,1.0\n", HEAD + "0,2.5,1.0\n"),  # of epochs that are trained again
        (HEAD + "0,2.5,1.0\n1,2.2", HEAD + "0,2.5,1.0\n"),
        (HEAD + "0,2.5,1.0\n\n" + 300 * "\0", HEAD + "0,2.5,1.0\n"),
        (HEAD.replace("\n", "\r\n") + "0,2.5,1.0\r\n", HEAD + "0,2.5,1.0\n"),
        ("0,2.5,1.0\n", "\n0,2.5,1.0\n"),  # the head was lost; the next row brings it back
        ("", ""),
    ],
)
def test_the_summary_is_mended_after_a_crash(tmp_path, left, kept):
    path = tmp_path / "summary.csv"
    path.write_bytes(left.encode())
    summary = Summary(path, range(1))
    assert path.read_bytes().decode() == kept
    summary.add(ROW)
    assert path.read_bytes().decode() == HEAD + kept.removeprefix(HEAD).strip("\n") + "\n" * bool(kept) + "1,0.5,0.25\n"


def test_a_row_of_the_summary_that_is_lost_is_said(tmp_path, caplog):
    path = tmp_path / "summary.csv"
    path.write_bytes(b"epoch,loss\n0,2.5\n1,\0\0\n2,2.0\n")
    Summary(path, range(3))
    assert path.read_bytes() == b"epoch,loss\n0,2.5\n2,2.0\n"
    assert f"{path}: no readable row of epoch 1" in caplog.text


def test_a_run_killed_before_its_first_files_were_whole_begins_again(tickets, whole, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "classes.txt").write_text("ant\nbee\ncat\n")
    ours = ["args.yaml.77-0a1b2c.tmp", "last.pth.tar.77-0a1b2c.tmp", "model_best.safetensors.77-0a1b2c.tmp"]
    for name in ours:
        (run / name).write_bytes(b"")
    train(tickets, tmp_path, "run", "--resume", "latest", "--epochs", 1)
    assert not list(run.glob("*.tmp"))
    (run / "classes.txt").unlink()  # as a run that was interrupted after args.yaml left it
    (run / "notes.77-0a1b2c.tmp").write_text("not ours")
    train(tickets, tmp_path, "run", "--resume", "latest", "--epochs", 1)
    assert (run / "classes.txt").read_text() == "ant\nbee\ncat\n"
    assert [path.name for path in run.glob("*.tmp")] == ["notes.77-0a1b2c.tmp"]


@pytest.mark.parametrize("text", ["", "a: [1", "just words", "\0\0\0"])
def test_arguments_that_cannot_be_read_are_one_line(tickets, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text(text)
    output = train(tickets, tmp_path, "run", "--resume", "latest", code=1).output
    assert "args.yaml: " in output and output.count("\n") == 1


# Checksums.


def test_a_flipped_bit_in_a_checkpoint_is_found_or_is_of_no_account(whole, tmp_path):
    """Some bytes of a zip are padding: then what is read is the same."""
    data = (whole / "model_best.pth.tar").read_bytes()
    expected, path, dice, found = (
        checkpoint.read(whole / "model_best.pth.tar"),
        tmp_path / "x.pth.tar",
        random.Random(0),
        0,
    )
    for _ in range(60):
        place = dice.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :])
        try:
            content = checkpoint.read(path)
        except TicketSetError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
            continue
        weights = content.pop("state_dict")
        assert same(weights, expected["state_dict"])
        assert content == {name: value for name, value in expected.items() if name != "state_dict"}
    assert found > 40


def test_damaged_files_are_named_where_they_are_used(tickets, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    command = ["sha256sum", "-c", "model_best.safetensors.sha256"]
    assert subprocess.check_output(command, cwd=run) == b"model_best.safetensors: OK\n"
    flags = {
        "model_best.safetensors": ["--eval", "--initial-checkpoint"],
        "model_best.pth.tar": ["--initial-checkpoint"],
        "last.pth.tar": ["--resume"],
    }
    for name, flag in flags.items():
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 4
        (run / name).write_bytes(data)
        output = train(tickets, tmp_path, "x", *flag, run / name, code=1).output
        assert f"{flag[-1]} {run / name}: damaged, not what was written: " in output and output.count("\n") == 1, output
    assert "last.pth.tar: damaged" in train(tickets, tmp_path, "run", "--resume", "latest", code=1).output


def test_a_checkpoint_of_odd_contents_is_one_line(tickets, whole, tmp_path):
    content = torch.load(whole / "last.pth.tar", weights_only=True)
    for changes in ({"args": 1}, {"classes": [1]}, {"epoch": None}, {"step": -1}, {"optimizer": {}},
                    {"state_dict": {1: 2}}, {"state_dict": []}, {"args": {}}):  # fmt: skip
        torch.save({**content, **changes}, tmp_path / "odd.pth.tar")
        output = train(tickets, tmp_path, "x", "--resume", tmp_path / "odd.pth.tar", code=1).output
        assert output.startswith("Error: ") and output.count("\n") == 1, (changes, output)


# One folder, one run.


def test_a_folder_that_a_living_run_has_is_refused(tickets, whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with contextlib.closing(Claim()) as claim:
        claim.hold(run)
        for flags in ([], ["--resume", "latest"], ["--resume", run]):
            output = train(tickets, tmp_path, "run", *flags, code=1).output
            assert f"{run}: a run that is under way (process {os.getpid()}) has it" in output, output
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    train(tickets, tmp_path, "run", "--resume", "latest")


@pytest.mark.parametrize(("named", "names"), [(True, ["run"]), (False, ["run", "run-1", "run-2", "run-3"])])
def test_runs_that_start_at_once_share_no_folder(tmp_path, named, names):
    won, barrier = [], threading.Barrier(4)

    def start() -> None:
        with contextlib.closing(Claim()) as claim:
            barrier.wait()
            with contextlib.suppress(TicketSetError):
                won.append(claim.make(tmp_path / "output" / "run", named).name)
            barrier.wait()

    threads = [threading.Thread(target=start) for _ in names * (4 // len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == names


def test_a_process_that_a_run_left_behind_does_not_keep_its_folder(tmp_path):
    (tmp_path / "run").mkdir()
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    with contextlib.closing(Claim()) as claim:
        claim.hold(tmp_path / "run")
        left = fork.Process(target=lambda: started.set() or time.sleep(60))
        left.start()
    try:
        assert started.wait(30)
        with contextlib.closing(Claim()) as claim:
            claim.hold(tmp_path / "run")
    finally:
        left.kill()
        left.join()


def test_workers_are_as_many_as_there_are_cores_and_four_at_most(monkeypatch):
    for have, expected in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, have=have: set(range(have)))
        assert cores() == expected


def test_a_checkpoint_with_foreign_objects_gets_our_words(tickets, whole, tmp_path):
    content = torch.load(whole / "last.pth.tar", weights_only=True)
    torch.save({**content, "metric": np.float64(1)}, tmp_path / "odd.pth.tar")
    output = train(tickets, tmp_path, "x", "--resume", tmp_path / "odd.pth.tar", code=1).output
    assert "it holds numpy" in output and "save model.state_dict() alone" in output and output.count("\n") == 1
