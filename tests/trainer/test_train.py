"""datalth-train: exact resume, ranks, checkpoints that timm loads, arms, and what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner

from conftest import mine
from shards.errors import TicketSetError
from shards.reader import TicketSet
from shards.rows import Rows
from trainer.cli import main
from trainer.data.dataset import ValidationDataset, loader
from trainer.engine import Setup
from trainer.evaluate import evaluate
from trainer.families.vit import TicketViT
from trainer.options import Machine, Optimization
from trainer.ranks import Rank
from training import SMALL, arguments, same, stopped_at, summary_of, train, two_ranks, weights_of

pytestmark = pytest.mark.slow  # trains for each test


@pytest.mark.parametrize(("update", "number"), [(2, signal.SIGTERM), (8, signal.SIGINT)])
def test_a_run_stopped_in_mid_epoch_resumes_to_the_same_weights_and_losses(
    tickets, whole, tmp_path, monkeypatch, update, number
):
    """SIGTERM and Ctrl-C alike."""
    with monkeypatch.context() as patch:
        stopped_at(update, patch, number)
        output = train(tickets, tmp_path, "run", code=128 + number).output
    assert f"stopped at epoch {update // 7}, step 2; --resume latest goes on" in output
    assert (tmp_path / "run" / "recovery.pth.tar").exists()
    assert not same(
        torch.load(tmp_path / "run" / "recovery.pth.tar", weights_only=True)["state_dict"], weights_of(whole)
    )
    train(tickets, tmp_path, "run", "--resume", "latest")
    assert same(weights_of(tmp_path / "run"), weights_of(whole))
    assert summary_of(tmp_path / "run") == summary_of(whole)


def test_another_seed_gives_other_weights(tickets, whole, tmp_path):
    train(tickets, tmp_path, "run", "--seed", 7)
    assert not same(weights_of(tmp_path / "run"), weights_of(whole))


def test_workers_and_recovery_checkpoints_change_nothing(tickets, whole, tmp_path):
    train(tickets, tmp_path, "run", "-j", 2, "--recovery-interval", 1)
    assert same(weights_of(tmp_path / "run"), weights_of(whole))


@pytest.mark.long
def test_killed_ranks_resume_to_the_same_weights(tickets, tmp_path):
    """Two gloo ranks: under torchrun never stopped; then by hand, both SIGKILLed in mid-epoch, and resumed."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    more = ["-b", "2", "--recovery-interval", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run(
        [*torchrun, "trainer.cli", *arguments(tickets, tmp_path, "never", *more)], check=True, env=environment, **quiet
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.cli", *arguments(tickets, tmp_path, "stopped", *more)],
            env={**environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **quiet,
        )
        for rank in (0, 1)
    ]
    while not (tmp_path / "stopped" / "recovery.pth.tar").exists():
        assert ranks[0].poll() is None
    for process in ranks:
        process.kill()
        process.wait()
    assert not (tmp_path / "stopped" / "final.json").exists()
    resume = arguments(tickets, tmp_path, "stopped", *more, "--resume", "latest")
    subprocess.run([*torchrun, "trainer.cli", *resume], check=True, env=environment, **quiet)
    assert same(weights_of(tmp_path / "stopped"), weights_of(tmp_path / "never"))


def test_timm_loads_the_checkpoints_and_gives_the_same_logits(tickets, whole):
    kwargs = {"num_classes": 3, "img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    images = torch.randn(2, 3, 64, 64)
    logits = []
    for name in ("model_best.pth.tar", "model_best.safetensors"):
        model = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(whole / name), **kwargs).eval()
        logits.append(model(images))
    plain = timm.create_model("deit_tiny_patch16_224", **kwargs).eval()
    before = plain(images)
    plain.load_state_dict(torch.load(whole / "model_best.pth.tar", weights_only=True)["state_dict"])
    assert torch.equal(logits[0], plain(images)) and not torch.equal(before, plain(images))
    assert torch.equal(logits[1], plain(images))
    from safetensors import safe_open

    with safe_open(whole / "model_best.safetensors", "pt") as file:
        assert file.metadata() == {"classes": '["ant", "bee", "cat"]'}  # of several keys the order would vary
    assert (whole / "classes.txt").read_text() == "ant\nbee\ncat\n"


@pytest.mark.parametrize("arm", ["random", "random-fixed", "gaussian", "center", "inverse", "full"])
def test_every_arm_trains(tickets, tmp_path, arm):
    output = train(tickets, tmp_path, arm, "--tickets", arm, "--epochs", 1).output
    tokens = 16 if arm == "full" else 8
    assert f"{arm}: {tokens} of 16 tokens" in output and "random       top-1" in output


def test_unmasked_epochs_and_the_resized_control_train(tickets, tmp_path):
    assert "*** Best metric" in train(tickets, tmp_path, "unmask", "--unmask-epochs", 1).output
    output = train(tickets, tmp_path, "resize", "--resize-to-tokens", "--tokens", 9, "--epochs", 1).output
    assert "whole views, resized: 9 of 16 tokens" in output
    refused = train(tickets, tmp_path, "odd", "--resize-to-tokens", code=1).output
    assert "8 is not a square; use --tokens 4 or 9" in refused


CURRICULUM = ("--resize-to-tokens", "--tokens", 9, "--unmask-epochs", 1)


def test_a_curriculum_of_resolution_resumes_across_the_switch_and_counts_both_sizes(tickets, tmp_path, monkeypatch):
    """7 steps at 3 x 3 patches and 7 at 4 x 4, of one schedule; the model is one of 4 x 4."""
    output = train(tickets, tmp_path, "never", *CURRICULUM).output
    assert "whole views, resized: 9 of 16 tokens, the last 1 epochs all" in output
    assert "Tokens: 9/16" in output and "Tokens: 16/16" in output
    for update in (3, 9):
        with monkeypatch.context() as patch:
            stopped_at(update, patch)
            train(tickets, tmp_path, f"stopped-{update}", *CURRICULUM, code=128 + signal.SIGTERM)
        train(tickets, tmp_path, f"stopped-{update}", *CURRICULUM, "--resume", "latest")
        assert same(weights_of(tmp_path / f"stopped-{update}"), weights_of(tmp_path / "never"))

    train(tickets, tmp_path, "resized", *CURRICULUM[:3])
    curriculum, resized = (json.loads((tmp_path / name / "final.json").read_text()) for name in ("never", "resized"))
    small, dense = resized["cost"]["train_gmacs"], resized["cost"]["dense_gmacs"]
    assert curriculum["cost"]["train_gmacs"] == pytest.approx((small + dense) / 2) and small < dense
    assert curriculum["cost"]["test_gmacs"] == {"all": dense} and curriculum["cost"]["tokens"] == 9
    table = weights_of(tmp_path / "never")["pos_embed"]
    assert table.shape[1] == 17 and weights_of(tmp_path / "resized")["pos_embed"].shape[1] == 10
    model = timm.create_model(f"local-dir:{tmp_path / 'never'}", pretrained=True)  # an ordinary one of the full size
    assert model.patch_embed.grid_size == (4, 4)
    said = CliRunner().invoke(main, ["--eval", "--resume", str(tmp_path / "never"), "-j", "0", "-b", "4"]).output
    assert f"top-1 {curriculum['results']['all']['top1']:.2f}" in said


@pytest.mark.long
def test_two_ranks_train_a_curriculum_of_resolution_as_one_does(tickets, tmp_path):
    """Sums of gradients differ in the last bits."""
    flags = [*map(str, CURRICULUM), "--drop-path", "0", "--reprob", "0", "--clip-grad", "1"]
    ranks = two_ranks(*arguments(tickets, tmp_path, "two", *flags, "-b", "2"))
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    train(tickets, tmp_path, "one", *flags)
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_accumulation_trains_on_the_same_samples(tickets, tmp_path):
    """One batch of 4 and two micro-batches of 2 give the same first loss but for rounding, drop path off."""
    first = []
    for name, flags in (("one", ["-b", 4]), ("two", ["-b", 2, "--grad-accum-steps", 2])):
        output = train(tickets, tmp_path, name, *flags, "--drop-path", 0, "--reprob", 0, "--epochs", 1).output
        line = next(x for x in output.splitlines() if x.startswith("Train: 0"))
        first.append(float(line.split("Loss: ")[1].split(" ")[0]))
    assert first[0] == pytest.approx(first[1], abs=2e-3)


def test_evaluation_equals_timms_own_on_all_patches(tickets, whole):
    opened = TicketSet.open(str(tickets))
    kwargs = {"num_classes": 3, "img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("deit_tiny_patch16_224", checkpoint_path=str(whole / "last.pth.tar"), **kwargs).eval()
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] * 255 for name in ("mean", "std"))
    expected = []
    for sample in opened.stream("val"):
        view = torch.from_numpy(sample.render(0, 64)).permute(2, 0, 1).float()
        expected.append(int(model(((view - mean) / std)[None]).argmax()))
    student, validation = TicketViT(model), ValidationDataset(opened, batch_size=4)
    setup = Setup.of(student, Optimization(), Machine(), Rank())
    batches = loader(validation, range(len(validation)), 0, setup.device)
    found, answers = evaluate({"": student}, batches, ("all",), 8, 6, setup)
    assert answers[0].tolist() == expected
    assert found["all"]["top1"] == pytest.approx(100 * sum(expected == validation.rows.labels) / 6)


def test_eval_reports_three_protocols(tickets, whole, tmp_path):
    flags = ["--resume", whole / "last.pth.tar", "--eval"]
    output = train(tickets, tmp_path, "eval", *flags).output
    assert [line.split()[0] for line in output.splitlines() if "top-1" in line] == ["tickets", "all", "random"]


def test_what_cannot_be_meant_is_refused_in_one_line(tickets, whole, tmp_path, center_set):
    def refused(*flags: object) -> str:
        output = train(tickets, tmp_path, "bad", *flags, code=1).output
        assert output.startswith("Error: ") and output.count("\n") == 1, output
        return output

    assert "expected at most 16" in refused("--tokens", 17)
    assert "has 3 training views" in refused("--repeats", 4)
    assert "expected a timm model or one of" in refused("--model", "vit_tyni")
    assert "cannot take tickets" in refused("--model", "beit_base_patch16_224", "--model-kwargs", "depth=1")
    assert "expected a split of" in refused("--val-split", "dev")
    assert "nothing to evaluate" in refused("--eval")
    assert "no such file" in refused("--resume", tmp_path / "none.pth.tar")
    again = train(tickets, whole.parent, "run", code=1).output
    assert "a run is there already" in again
    other = train(tickets, whole.parent, "run", "--resume", "latest", "--lr-base", 1, code=1).output
    assert "lr_base: 0.0005 there, 1.0 here" in other


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tickets, tmp_path):
    output = train(tickets, tmp_path, "nan", "--lr", 1e30, "--warmup-epochs", 0, "--opt", "sgd", code=1).output
    assert "loss is not finite at epoch" in output
    assert not (tmp_path / "nan" / "last.pth.tar").exists()


def test_a_damaged_or_unfinished_set_is_refused(tickets, tmp_path):
    import shutil

    copy = Path(shutil.copytree(tickets, tmp_path / "set"))
    tar = copy / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "train-000001.tar: expected" in train(copy, tmp_path, "damaged", code=1).output
    (copy / "manifest.json").unlink()
    assert "not finished" in train(copy, tmp_path, "unfinished", code=1).output


def test_a_config_file_sets_defaults_and_typed_flags_win(tickets, tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 1\nlr-base: 0.5\n")
    small = ["--shards", str(tickets), *SMALL, "-b", "4", "-j", "0", "--repeats", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(
        main, ["-c", str(tmp_path / "c.yaml"), *small, "--lr-base", "0.001", "--experiment", "x"]
    )
    assert result.exit_code == 0, result.output
    saved = (tmp_path / "x" / "args.yaml").read_text()
    assert "epochs: 1\n" in saved and "lr_base: 0.001\n" in saved
    (tmp_path / "c.yaml").write_text("epocs: 1\n")
    assert "no such flag: 'epocs'" in CliRunner().invoke(main, ["-c", str(tmp_path / "c.yaml"), *small]).output


def test_ema_has_its_columns_from_the_first_epoch_and_figures_once_it_has_seen_enough(tickets, tmp_path):
    train(tickets, tmp_path, "ema", "--model-ema-decay", 0.88)  # mature after 8.3 of 12 updates
    head, first, second = ((tmp_path / "ema/summary.csv").read_text()).splitlines()
    column = head.split(",").index("eval_ema_all_top1")
    assert first.split(",")[column] == "" and float(second.split(",")[column]) >= 0
    assert "ema_random" in json.loads((tmp_path / "ema/final.json").read_text())["results"]


def test_bfloat16_clipping_checkpointing_and_tensorboard_run(tickets, tmp_path):
    flags = ["--amp", "--amp-dtype", "bfloat16", "--clip-grad", 1, "--grad-checkpointing", "--log-tensorboard"]
    train(tickets, tmp_path, "all", *flags, "--epochs", 1)
    assert list((tmp_path / "all").glob("events.out.tfevents*"))


def test_training_starts_from_a_checkpoint_for_other_classes_and_refuses_another_model(tickets, tmp_path):
    kwargs = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
    donor = timm.create_model("deit_tiny_patch16_224", num_classes=7, **kwargs)
    torch.save({"model": donor.state_dict()}, tmp_path / "donor.pth")
    flags = ["--initial-checkpoint", tmp_path / "donor.pth", "--epochs", 1, "--lr", 1e-12, "--warmup-lr", 1e-12,
             "--min-lr", 1e-12, "--opt", "sgd", "--weight-decay", 0]  # fmt: skip
    train(tickets, tmp_path, "start", *flags)
    trained = weights_of(tmp_path / "start")
    assert torch.allclose(
        trained["blocks.0.attn.qkv.weight"], donor.state_dict()["blocks.0.attn.qkv.weight"], atol=1e-6
    )
    assert trained["head.weight"].shape == (3, 32)
    wide = timm.create_model("deit_tiny_patch16_224", num_classes=7, **{**kwargs, "embed_dim": 48})
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    refused = train(tickets, tmp_path, "wide", "--initial-checkpoint", tmp_path / "wide.pth", code=1).output
    assert "do not fit" in refused and "of another shape" in refused


def test_another_global_batch_is_no_way_to_resume(tickets, whole, tmp_path):
    output = train(tickets, whole.parent, "run", "--resume", "latest", "-b", 2, code=1).output
    assert "global_batch: 4 there, 2 here" in output


def test_full_is_tested_on_the_sets_tickets_and_not_on_all_patches_thrice(tickets, tmp_path):
    train(tickets, tmp_path, "full", "--tickets", "full", "--epochs", 1)
    results = json.loads((tmp_path / "full/final.json").read_text())["results"]
    losses = {results[name]["loss"] for name in ("tickets", "all", "random")}
    assert len(losses) == 3


def test_a_runs_own_args_are_a_config(tickets, whole, tmp_path):
    result = CliRunner().invoke(
        main, ["-c", str(whole / "args.yaml"), "--output", str(tmp_path), "--experiment", "again", "-j", "0"]
    )
    assert result.exit_code == 0, result.output
    assert same(weights_of(tmp_path / "again"), weights_of(whole))


def test_another_number_of_classes_is_refused(tickets, tmp_path):
    assert (
        "expected 3, the set's, got 2"
        in train(tickets, tmp_path, "x", "--model-kwargs", "num_classes=2", code=1).output
    )


def test_weights_that_an_update_broke_are_never_saved(tickets, tmp_path, monkeypatch):
    """The loss of the step is finite, its gradient is not."""
    from trainer import engine

    updates = []
    apply = engine.apply_update

    def poisoned(state, setup, update, *places):
        updates.append(update)
        if len(updates) == 3:
            next(state.student.model.parameters()).grad.fill_(torch.nan)
        apply(state, setup, update, *places)

    monkeypatch.setattr(engine, "apply_update", poisoned)
    output = train(tickets, tmp_path, "nan", "--recovery-interval", 1, code=1).output
    assert "loss is not finite at epoch 0, step 2" in output
    saved = torch.load(tmp_path / "nan/recovery.pth.tar", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["state_dict"].values())


def test_the_mean_loss_does_not_depend_on_where_a_run_was_stopped(tickets, whole, tmp_path, monkeypatch):
    """Also where the log's interval is longer than the epoch."""
    train(tickets, tmp_path, "never", "--log-interval", 50)
    with monkeypatch.context() as patch:
        stopped_at(3, patch)
        train(tickets, tmp_path, "stopped", "--log-interval", 50, code=143)
    train(tickets, tmp_path, "stopped", "--log-interval", 50, "--resume", "latest")
    assert summary_of(tmp_path / "stopped") == summary_of(tmp_path / "never")
    assert summary_of(tmp_path / "never") == summary_of(whole)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--opt", "foo"), "foo"),
        (("--sched", "foo"), "--sched foo"),
        (("--sched", "none"), "constant leaves the learning rate as it is"),
    ],
)
def test_optimizers_and_schedulers_that_timm_does_not_know_are_one_line(tickets, tmp_path, flags, said):
    output = train(tickets, tmp_path, "x", *flags, code=1).output
    assert output.startswith("Error: --opt ") and output.count("\n") == 1 and said in output


def test_the_learning_rates_shown_are_those_of_all_layers(tickets, tmp_path):
    flags = ["--layer-decay", 0.5, "--min-lr", 0.001, "--lr", 0.001, "--warmup-epochs", 0, "--epochs", 1]
    output = train(tickets, tmp_path, "run", *flags).output
    assert output.count("LR: 1.250e-04..1.000e-03 ") == 6
    head, row = ((tmp_path / "run/summary.csv").read_text()).splitlines()
    cells = dict(zip(head.split(","), row.split(","), strict=True))
    assert (cells["lr"], cells["lr_lowest"], cells["lr_head"]) == ("0.001", "0.000125", "0.001")


def test_a_learning_rate_that_min_lr_raises_is_said(tickets, tmp_path):
    output = train(tickets, tmp_path, "run", "--lr", 1e-6, "--epochs", 1).output
    assert "--min-lr 1e-05: above the learning rate 1e-06" in output


@pytest.mark.long
def test_a_model_that_cannot_be_compiled_is_one_line(tickets, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    output = train(tickets, tmp_path, "run", "--torchcompile", "--epochs", 1, code=1).output
    assert "Error: --torchcompile: torch cannot compile here (" in output.splitlines()[-1]
    assert "Traceback" not in output and "without --torchcompile it runs as well, slower" in output


def test_a_place_among_processes_that_is_none_is_one_line(tickets, tmp_path, monkeypatch):
    for place in ({"WORLD_SIZE": ""}, {"RANK": "1", "WORLD_SIZE": "1"}):
        with monkeypatch.context() as patch:
            for name, value in place.items():
                patch.setenv(name, value)
            output = train(tickets, tmp_path, "run", code=1).output
        assert output.startswith("Error: ") and output.count("\n") == 1, output


def test_evaluating_weights_has_no_rows_of_an_average_that_saw_nothing(tickets, whole, tmp_path):
    output = train(tickets, tmp_path, "x", "--eval", "--initial-checkpoint", whole / "model_best.safetensors").output
    assert [line.split()[0] for line in output.splitlines() if "top-1" in line] == ["tickets", "all", "random"]


def test_a_set_mined_anew_while_it_is_read_stops_the_reader(photos, tmp_path):
    flags = ["--data", photos, "--out", tmp_path / "set", "--method", "random", "--shard-size", 6]
    mine(*flags)
    opened = TicketSet.open(str(tmp_path / "set"))
    rows = Rows(opened, "train")
    before = rows.read(0, 0)
    mine(*flags, "--seed", 1, "--overwrite")
    assert (rows.read(0, 0).rankings == before.rankings).all()  # its file is open
    with pytest.raises(TicketSetError, match="mined anew while it was read: expected set_id"):
        rows.read(1, 0)
    (tmp_path / "set" / "manifest.json").unlink()  # as while it is mined
    with pytest.raises(TicketSetError, match="changed while it was read: .* not finished"):
        Rows(opened, "val")


def test_a_device_without_memory_is_one_line(tickets, tmp_path, monkeypatch):
    """As a GPU would say it; never seen on one."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more")

    from trainer import trainer as module

    monkeypatch.setattr(module, "train_epoch", full)
    output = train(tickets, tmp_path, "x", code=1).output.splitlines()[-1]
    assert output == (
        "Error: CUDA out of memory. Tried to allocate 2.00 GiB. Take a smaller --batch-size with more --grad-accum-steps"
    )
