"""What fine-tuning asks for: a rate of its own for the classifier, frozen weights, tests now and then, time left."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml

from shards.errors import TicketSetError
from trainer.freeze import freeze
from trainer.optimizer import Rates, build_optimizer
from trainer.options import Optimization
from trainer.output.progress import Work
from training import arguments, same, stopped_at, summary_of, train, two_ranks, weights_of

ALL = ["--freeze", "blocks.0,*_embed", "--head-lr", 1e-2, "--layer-decay", 0.5, "--lr", 1e-3]


def small_vit() -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=3
    ).train()


def rates(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Of each weight, by its name; each stands in one group."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = [(names[id(weight)], group["lr"]) for group in optimizer.param_groups for weight in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_the_classifier_has_its_own_rate_on_the_same_schedule():
    """Warm-up of 4 steps, then half a cosine of 8: each weight's rate is the schedule's times its own factor."""
    model, lr, head_lr = small_vit(), 1e-3, 5e-3
    settings = Optimization(
        head_lr=head_lr, layer_decay=0.5, epochs=2, warmup_epochs=1, warmup_lr=1e-4, min_lr=1e-5, opt="lookahead_adamw"
    )
    optimizer, schedule = build_optimizer(model, settings, lr, 4)
    decay = {"head": head_lr / lr, "norm": 0.5, "blocks.1": 0.5, "blocks.0": 0.25, "pos_embed": 0.125}
    for update in range(8):
        schedule.step_update(update)
        warming = 1e-4 + update * (lr - 1e-4) / 4
        whole = warming if update < 4 else 1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi * update / 8)) / 2
        found = rates(model, optimizer)
        assert found.keys() == {name for name, _ in model.named_parameters()}
        for start, factor in decay.items():
            some = {rate for name, rate in found.items() if name.startswith(start)}
            assert some and all(rate == pytest.approx(whole * factor) for rate in some), (start, update)
    assert Rates.of(optimizer, lr) == Rates(0.5 * lr, 0.125 * lr, pytest.approx(head_lr))
    decays = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert (decays[id(model.head.weight)], decays[id(model.head.bias)]) == (0.05, 0.0)


def test_one_rate_is_shown_as_one_number_and_several_as_they_are():
    assert str(Rates(1e-3, 1e-3, 1e-3)) == "1.000e-03"
    assert str(Rates(1e-3, 1e-4, 1e-3)) == "1.000e-04..1.000e-03"
    assert str(Rates(1e-3, 1e-3, 1e-2)) == "1.000e-03, head 1.000e-02"
    model = small_vit()
    freeze(model, "*")
    assert Rates.of(build_optimizer(model, Optimization(head_lr=0.1), 1e-3, 4)[0], 1e-3) == Rates(0.1, 0.1, 0.1)


def test_a_rate_of_the_classifier_beside_none_is_one_line():
    with pytest.raises(TicketSetError, match=r"`head_lr`: expected `lr` above 0 beside it"):
        build_optimizer(small_vit(), Optimization(head_lr=1e-3), 0.0, 4)


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ("*", {"head.weight", "head.bias"}),
        ("blocks,*_embed,cls_token", {"norm.weight", "norm.bias", "head.weight", "head.bias"}),
        ("blocks.[0-1].attn,blocks.*.mlp,blocks.?.norm?.weight,cls_token,*_embed.*,pos_embed,norm",
         {*(f"blocks.{i}.norm{j}.bias" for i in (0, 1) for j in (1, 2)), "head.weight", "head.bias"}),
    ],
)  # fmt: skip
def test_patterns_are_of_weights_and_of_the_modules_that_hold_them(patterns, trained):
    model = small_vit()
    assert freeze(model, patterns) == []
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained


@pytest.mark.parametrize(
    ("pattern", "near"), [("block.0", "blocks.0"), ("patch_embd", "patch_embed"), ("head", "near: ")]
)
def test_a_pattern_that_fits_nothing_names_the_nearest(pattern, near):
    with pytest.raises(TicketSetError, match=f"`freeze` {pattern}: expected .*{near}"):
        freeze(small_vit(), f"norm,{pattern}")


def test_averages_of_frozen_batch_norms_stay_and_others_go_on():
    model = timm.create_model("resnet10t", num_classes=3).train()
    (hook,) = freeze(model, "conv1,bn1,layer1")
    hook.before_step(None, 0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")}
    model(torch.randn(2, 3, 32, 32))
    kept = {name for name, buffer in model.named_buffers() if name in before and torch.equal(buffer, before[name])}
    assert kept == {name for name in before if name.startswith(("conv1", "bn1", "layer1"))} and len(kept) < len(before)


def test_frozen_weights_stay_and_a_run_that_was_stopped_goes_on_exactly(tickets, tmp_path, monkeypatch):
    shown = train(tickets, tmp_path, "never", *ALL).output
    assert "M of them trained" in shown and ", head 1.000e-02, 2 epochs" in shown
    with monkeypatch.context() as patch:
        stopped_at(8, patch)
        train(tickets, tmp_path, "stopped", *ALL, code=143)
    train(tickets, tmp_path, "stopped", *ALL, "--resume", "latest")
    assert same(weights_of(tmp_path / "never"), weights_of(tmp_path / "stopped"))
    assert summary_of(tmp_path / "never") == summary_of(tmp_path / "stopped")
    # The first weights are the seed's: those of a run that froze all but the classifier.
    train(tickets, tmp_path, "probe", "--freeze", "*")
    first, now = (weights_of(tmp_path / name) for name in ("probe", "never"))
    stayed = {name for name in first if torch.equal(first[name], now[name])}
    assert stayed == {name for name in first if name.startswith(("blocks.0.", "patch_embed.", "pos_embed"))}
    then = yaml.safe_load((tmp_path / "never/args.yaml").read_text())
    assert (then["freeze"], then["head_lr"]) == ("blocks.0,*_embed", 0.01)
    train(tickets, tmp_path, "again", "-c", tmp_path / "never/args.yaml")
    assert same(weights_of(tmp_path / "again"), now)


@pytest.mark.long
def test_two_ranks_and_checkpointed_activations_train_what_one_rank_does(tickets, tmp_path):
    """Random numbers are of a place in the global batch; sums of gradients differ in the last bits."""
    flags = [str(flag) for flag in ALL] + ["--drop-path", "0", "--reprob", "0", "--clip-grad", "1"]
    ranks = two_ranks(*arguments(tickets, tmp_path, "two", *flags, "-b", "2", "--grad-checkpointing"))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    train(tickets, tmp_path, "one", *flags)
    one, two = (weights_of(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=2e-5) for name in one)


def test_untested_epochs_have_empty_cells_and_change_no_weight(tickets, tmp_path):
    train(tickets, tmp_path, "each", "--epochs", 4)
    shown = train(tickets, tmp_path, "some", "--epochs", 4, "--val-interval", 3).output
    assert same(weights_of(tmp_path / "each"), weights_of(tmp_path / "some"))
    each, some = (summary_of(tmp_path / name) for name in ("each", "some"))
    assert [bool(row["eval_tickets_top1"]) for row in some] == [False, False, True, True]
    assert some[2:] == each[2:] and some[0]["train_loss"] == each[0]["train_loss"]
    assert shown.count("not tested") == 2
    best = max(some[2:], key=lambda row: float(row["eval_tickets_top1"]))  # the first of equals
    found = torch.load(tmp_path / "some/model_best.pth.tar", weights_only=True)
    assert (found["epoch"], found["metric"]) == (int(best["epoch"]) + 1, float(best["eval_tickets_top1"]))


def test_the_summary_counts_the_seconds_of_training(tickets, tmp_path):
    train(tickets, tmp_path, "run")
    rows = (Path(tmp_path) / "run/summary.csv").read_text().splitlines()
    assert rows[0].endswith(",lr,lr_lowest,lr_head,seconds")
    first, second = (float(row.split(",")[-1]) for row in rows[1:])
    assert 0 <= first <= second


@pytest.mark.parametrize(("frozen", "passes"), [("blocks", 3), ("*", 1)])
def test_time_left_counts_epochs_on_all_patches_and_tests_by_what_they_compute(frozen, passes):
    """5 epochs of 10 steps, the last two on all patches; tested after the 2nd, the 4th and the 5th."""
    model = timm.create_model("test_vit", num_classes=3)
    freeze(model, frozen)
    trainer = SimpleNamespace(
        recipe=SimpleNamespace(
            optimization=SimpleNamespace(epochs=5),
            machine=SimpleNamespace(val_interval=2),
            tickets=SimpleNamespace(unmask_epochs=2),
        ),
        costs={"train_gmacs": (3 * 1 + 2 * 4) / 5, "test_gmacs": {"tickets": 1, "all": 4, "random": 1}},
        steps=10,
        dataset=SimpleNamespace(global_batch=8),
        student=SimpleNamespace(model=model),
        validation=SimpleNamespace(rows=range(20)),
    )
    work = Work(trainer)
    step, test = passes * 8, 20 * (1 + 4)
    expected = {
        (0, 0): 0,
        (0, 7): 7 * step,
        (2, 0): 20 * step + test,
        (3, 0): 30 * step + test,
        (3, 5): 30 * step + 5 * 4 * step + test,
        (4, 0): 30 * step + 10 * 4 * step + 2 * test,
        (5, 0): 30 * step + 20 * 4 * step + 2 * test + 20 * 6,
    }
    assert {place: work.until(*place) for place in expected} == pytest.approx(expected)


def test_weights_of_another_grid_and_of_other_classes_are_a_start(tickets, tmp_path):
    """As CLIP's, with a classifier of 512, and DINOv2's, of a 37 x 37 grid, without one."""
    config = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    clip, dino = (
        timm.create_model("deit_tiny_patch16_224", img_size=side, num_classes=classes, **config)
        for side, classes in ((64, 512), (96, 0))
    )
    for name, model in (("clip", clip), ("dino", dino)):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        start = ["--initial-checkpoint", tmp_path / f"{name}.pth", "--freeze", "*", "--epochs", 1]
        shown = train(tickets, tmp_path, name, *start).output
        assert f"{name}.pth: head.weight, head.bias start anew" in shown
        trained = weights_of(tmp_path / name)
        assert torch.equal(trained["blocks.1.mlp.fc1.weight"], model.state_dict()["blocks.1.mlp.fc1.weight"])
        assert trained["pos_embed"].shape == (1, 17, 32) and len(trained["head.bias"]) == 3
    assert torch.equal(weights_of(tmp_path / "clip")["pos_embed"], clip.state_dict()["pos_embed"])
