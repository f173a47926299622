"""Training under masks: zeros that stay zeros bit for bit, and a step equal to one of a model that multiplies by its mask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from made import made_ticket
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.costs import gmacs, sparse_gmacs
from trainer.engine import apply_update, train_micro_batch
from trainer.hooks import Hook
from trainer.options import Recipe
from trainer.trainer import Trainer
from trainer.weights import masks as masked
from trainer.weights.scores import drawn, keep_best
from trainer.weights.subnetwork import Subnetwork, not_zero, prunable
from training import QUICK, same, stopped_at, summary_of, train, two_ranks, weights_of

SMALL = {"model_kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2}, "batch_size": 4, "repeats": 2, "workers": 0}
SHORT = {**SMALL, "epochs": 2, "warmup_epochs": 1, "log_interval": 100, "model_ema_decay": 0.5}


@pytest.fixture(scope="module")
def opened(center_set: Path) -> TicketSet:
    return TicketSet.open(str(center_set))


def trainer(opened: TicketSet, subnetwork: Subnetwork | None = None, *hooks: Hook, **settings: Any) -> Trainer:
    recipe = Recipe.of({"shards": opened.url, **SHORT, **settings})
    return Trainer(opened, recipe, hooks, subnetwork=subnetwork)


@pytest.fixture(scope="module")
def kept(opened: TicketSet) -> dict[str, np.ndarray]:
    names = prunable(trainer(opened).student.model)
    return drawn(names, 1000, "test")


@pytest.fixture(scope="module")
def ticket(center_set: Path, opened: TicketSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model, two levels, made by its first weights' magnitude."""
    model = trainer(opened, seed=3).student.model
    shapes = prunable(model)
    weights = {name: model.get_parameter(name).detach().abs().numpy() for name in shapes}
    first = keep_best(weights, 12000, None, "global")
    levels = [first, keep_best(weights, 2000, first, "global")]
    start = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    folder = tmp_path_factory.mktemp("weights") / "w"
    return made_ticket(folder, levels, start, prunable=shapes, heads={}, sparsity=1 - 2000 / 24576).path


def zeros(weights: dict[str, torch.Tensor], kept: dict[str, np.ndarray]) -> bool:
    """Whether all under the masks are +0.0, byte for byte."""
    return all(not weights[n].detach().numpy()[~m].view(np.uint32).any() for n, m in kept.items())


# What a run leaves


@pytest.mark.parametrize("flags", [(), ("--amp", "--amp-dtype", "bfloat16"), ("--grad-accum-steps", "2", "-b", "2"), ("--opt", "sgd"), ("--clip-grad", "1"), ("--opt", "lamb")])  # fmt: skip
def test_zeros_are_zeros_in_every_file(center_set, ticket, tmp_path, flags):
    run = tmp_path / "run"
    output = train(center_set, tmp_path, "run", "--weight-ticket", ticket, "--model-ema-decay", "0.5", *flags).output
    from trainer.weights.ticket import WeightTicket

    masks = WeightTicket.open(ticket).kept()
    last = torch.load(run / "last.pth.tar", weights_only=True)
    assert zeros(last["state_dict"], masks) and zeros(last["state_dict_ema"], masks)
    assert zeros(load_file(run / "model_best.safetensors"), masks)
    assert not same(last["state_dict"], last["state_dict_ema"])
    assert not zeros(last["state_dict"], {n: ~m for n, m in masks.items()})  # the others have not all stayed or gone
    assert "weights under the mask that are not zero: 0" in output and "sparsity 0.9186" in output
    final = json.loads((run / "final.json").read_text())
    assert final["weights"] == {"kept": 2000, "prunable": 24576, "nonzero_under_mask": 0}
    moments = [state.get("exp_avg") for state in last["optimizer"]["state"].values() if "exp_avg" in state]
    assert all((m == 0).any() for m in moments if m.shape in {masks[n].shape for n in masks})
    args = yaml.safe_load((run / "args.yaml").read_text())
    assert (args["weight_method"], args["weight_sparsity"]) == ("imp", pytest.approx(1 - 2000 / 24576))


@pytest.mark.parametrize("silent", [True, False])
def test_muon_needs_its_weights_settled_and_the_norm_its_gradients_silent(opened, kept, monkeypatch, silent):
    """Negative controls of both halves of the hook."""
    if silent:
        monkeypatch.setattr(masked.Masked, "after_update", Hook.after_update)
        found = trainer(opened, Subnetwork(kept), opt="muon", epochs=1, warmup_epochs=0, model_ema=False)
        with pytest.raises(TicketSetError, match="weights under the mask are not zero; nothing is saved"):
            _run(found)
    else:
        monkeypatch.setattr(masked.Masked, "before_update", Hook.before_update)
        found = trainer(opened, Subnetwork(kept), epochs=1, warmup_epochs=0, model_ema=False)
        _run(found)
        moments = found.state.optimizer.state_dict()["state"].values()
        full = [float((m["exp_avg"] != 0).float().mean()) for m in moments if m["exp_avg"].shape == (96, 32)]
        assert len(full) == 2 and min(full) > 0.1  # .04 are kept


def _run(found: Trainer) -> None:
    found.fit()
    for hook in found.hooks:
        hook.on_save(found)


def test_muon_leaves_zeros_where_both_halves_are_there(opened, kept):
    found = trainer(opened, Subnetwork(kept), opt="muon", epochs=1, warmup_epochs=0)
    _run(found)
    assert not_zero(found.student.model, kept) == 0


class _Multiplied(torch.nn.Module):
    """The reference: a parametrization that multiplies by the mask in every forward."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.from_numpy(mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


@pytest.mark.parametrize("broken", [False, True])
def test_steps_equal_those_of_a_model_that_multiplies_by_its_mask(opened, kept, broken, monkeypatch):
    """Weights, moments and the clipped norm, in float64; without silence the norm differs."""
    if broken:
        monkeypatch.setattr(masked.Masked, "before_update", Hook.before_update)
    settings = {"clip_grad": 0.05, "model_ema": False, "drop_path": 0.0}
    ours, theirs = (trainer(opened, s, **settings) for s in (Subnetwork(kept), None))
    theirs.student.model.load_state_dict(ours.student.model.state_dict())
    for side in (ours, theirs):
        side.student.double()
    reference = theirs.student.model
    for name, mask in kept.items():
        module, _, leaf = name.rpartition(".")
        torch.nn.utils.parametrize.register_parametrization(reference.get_submodule(module), leaf, _Multiplied(mask))
    for update in range(3):
        for side in (ours, theirs):
            batch = side.dataset[0, update, 0]
            train_micro_batch(side.state, batch, _Double(side.setup), update, 0)
            apply_update(side.state, side.setup, update, side.before_update, side.after_update)
    mine = dict(ours.student.model.named_parameters())
    other = {n.replace("parametrizations.", "").replace(".original", ""): p for n, p in reference.named_parameters()}
    equal = []
    for name, weight in mine.items():
        mask = torch.from_numpy(kept[name]) if name in kept else torch.ones_like(weight, dtype=torch.bool)
        a, b = (s.state.optimizer.state[p] for s, p in ((ours, weight), (theirs, other[name])))
        pairs = [(weight[mask], other[name][mask]), (a["exp_avg"], b["exp_avg"]), (a["exp_avg_sq"], b["exp_avg_sq"])]
        # The norm sums up in another order of names; nothing else differs.
        equal += [torch.allclose(x, y, rtol=1e-8, atol=1e-14) for x, y in pairs]
    assert all(equal) != broken


class _Double:
    """A step's setup in float64."""

    def __init__(self, setup: Any) -> None:
        self._setup = setup

    def __getattr__(self, name: str) -> Any:
        return getattr(self._setup, name)

    def normalized(self, patches: torch.Tensor) -> torch.Tensor:
        return self._setup.normalized(patches).double()


# Stopped and resumed, alone and in company


@pytest.mark.slow
def test_killed_in_an_epoch_and_resumed_it_is_the_run_that_was_never_stopped(center_set, ticket, tmp_path, monkeypatch):
    flags = ("--weight-ticket", ticket, "--recovery-interval", 1, "--model-ema-decay", "0.5")
    train(center_set, tmp_path, "whole", *flags)
    with monkeypatch.context() as stopping:
        stopped_at(4, stopping)
        train(center_set, tmp_path, "cut", *flags, code=143)
    train(center_set, tmp_path, "cut", *flags, "--resume", "latest")
    a, b = (torch.load(tmp_path / name / "last.pth.tar", weights_only=True) for name in ("whole", "cut"))
    assert same(a["state_dict"], b["state_dict"]) and same(a["state_dict_ema"], b["state_dict_ema"])


@pytest.mark.slow
def test_another_ticket_is_refused_when_a_run_goes_on(center_set, ticket, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping:
        stopped_at(4, stopping)
        train(center_set, tmp_path, "run", "--weight-ticket", ticket, "--recovery-interval", 1, code=143)
    for other in (("--weight-level", 1), ("--weight-arm", "random")):
        output = train(
            center_set, tmp_path, "run", "--weight-ticket", ticket, *other, "--resume", "latest", code=1
        ).output
        assert "trained with other arguments" in output.splitlines()[-1]
    assert "weight_ticket_id" in train(center_set, tmp_path, "run", "--resume", "latest", code=1).output
    moved = ticket.rename(tmp_path / "moved")
    train(center_set, tmp_path, "run", "--weight-ticket", moved, "--resume", "latest")
    moved.rename(ticket)


@pytest.mark.long
def test_two_ranks_keep_the_same_zeros(center_set, ticket, tmp_path):
    flags = [str(f) for f in (*QUICK, "--shards", center_set, "--output", tmp_path, "--experiment", "two")]
    ranks = two_ranks(*flags, "-b", "2", "--weight-ticket", str(ticket), "--model-ema-decay", "0.5")
    for rank in ranks:
        out, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, out
    from trainer.weights.ticket import WeightTicket

    last = torch.load(tmp_path / "two" / "last.pth.tar", weights_only=True)
    masks = WeightTicket.open(ticket).kept()
    assert zeros(last["state_dict"], masks) and zeros(last["state_dict_ema"], masks)


# Arms


def test_dense_is_a_run_without_a_ticket(center_set, ticket, tmp_path):
    """s = 0: the same files, but for what args.yaml says of the ticket."""
    train(center_set, tmp_path, "plain", "--seed", 3)
    train(center_set, tmp_path, "dense", "--seed", 3, "--weight-ticket", ticket, "--weight-arm", "dense")
    assert same(weights_of(tmp_path / "plain"), weights_of(tmp_path / "dense"))
    assert summary_of(tmp_path / "plain") == summary_of(tmp_path / "dense")
    for name in ("model_best.safetensors", "predictions.parquet", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def arm(ticket: Path, name: str, seed: int = 0, **more: Any) -> Subnetwork:
    found = Subnetwork.of(Recipe.of({"weight_ticket": str(ticket), "weight_arm": name, **more}).weights, seed)
    assert found is not None
    return found


def test_controls_change_what_they_control_and_nothing_else(opened, ticket):
    arms = {name: arm(ticket, name) for name in ("winning", "reinit", "shuffled", "random", "dense")}
    winning = arms["winning"].kept
    counts = {name: {n: int(m.sum()) for n, m in a.kept.items()} for name, a in arms.items()}
    assert counts["winning"] == counts["reinit"] == counts["shuffled"] != counts["random"]
    assert sum(counts["random"].values()) == sum(counts["winning"].values()) == 2000 and not counts["dense"]
    assert max(counts["random"][n] / m.size for n, m in winning.items()) < 0.084  # even: .0814 everywhere
    assert all((arms["reinit"].kept[n] == winning[n]).all() for n in winning)
    assert not any((arms["shuffled"].kept[n] == winning[n]).all() for n in winning)
    students = {name: trainer(opened, a, seed=3).student.model.state_dict() for name, a in arms.items()}
    start = load_file(ticket / "start.safetensors")
    assert same(students["dense"], start)
    for name in ("winning", "shuffled", "random"):
        assert all(torch.equal(students[name][n], start[n]) for n in start if n not in winning)
        assert all(torch.equal(students[name][n][torch.from_numpy(arms[name].kept[n])], start[n][torch.from_numpy(arms[name].kept[n])]) for n in winning)  # fmt: skip
    fresh = students["reinit"]
    assert not any((fresh[n] == start[n])[torch.from_numpy(winning[n])].any() for n in winning)
    again, other = (trainer(opened, arm(ticket, "reinit", s)).student.model.state_dict() for s in (0, 1))
    assert same(again, fresh) and not same(other, fresh)


def test_arms_are_functions_of_the_seed(ticket):
    for name in ("shuffled", "random"):
        one, two, again = (arm(ticket, name, seed).kept for seed in (0, 1, 0))
        assert all((one[n] == again[n]).all() for n in one) and not all((one[n] == two[n]).all() for n in one)


def test_another_level_is_another_ticket(ticket):
    first, last = arm(ticket, "winning", weight_level=1), arm(ticket, "winning")
    assert sum(int(m.sum()) for m in first.kept.values()) == 12000
    assert first.said["weight_ticket_id"] != last.said["weight_ticket_id"]
    assert first.said["weight_group_id"] == last.said["weight_group_id"]


def test_best_weights_load_in_plain_timm(center_set, ticket, tmp_path):
    import timm

    train(center_set, tmp_path, "run", "--weight-ticket", ticket)
    model = timm.create_model("deit_tiny_patch16_224", num_classes=2, img_size=64, embed_dim=32, depth=2, num_heads=2)
    for path in (tmp_path / "run" / "model_best.safetensors", ticket / "start.safetensors"):
        found = load_file(path)
        size = found["patch_embed.proj.weight"].shape[-1]
        model = timm.create_model("deit_tiny_patch16_224", num_classes=len(found["head.bias"]), img_size=_side(found, size), patch_size=size, embed_dim=32, depth=2, num_heads=2)  # fmt: skip
        model.load_state_dict(found, strict=True)


def _side(state: dict[str, torch.Tensor], patch: int) -> int:
    return round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch


# Wrong


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--weight-arm", "random"), "--weight-arm random: of a weight ticket; give --weight-ticket too"),
        (("--weight-ticket", "TICKET", "--weight-level", 9), "expected a level from 1 to 2, got 9"),
        (
            ("--weight-ticket", "TICKET", "--pretrained"),
            "--pretrained: the weight ticket has the weights to start from",
        ),
        (("--weight-ticket", "TICKET", "--weight-start", "TICKET"), "expected --weight-arm reinit beside it"),
        (("--weight-ticket", "TICKET", "--weight-arm", "reinit", "--weight-start", "TICKET"), "of another seed"),
        (("--weight-ticket", "TICKET", "--model-kwargs", "depth=3"), "of another model than this student"),
        (("--weight-ticket", "nowhere"), "expected a weight ticket"),
    ],
)
def test_wrong_flags_are_one_line(center_set, ticket, tmp_path, flags, says):
    told = [ticket if flag == "TICKET" else flag for flag in flags]
    output = train(center_set, tmp_path, "run", *told, code=1).output
    assert says in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "run" / "last.pth.tar").exists()


def test_a_mask_of_a_shape_that_the_model_lacks_is_refused(opened):
    with pytest.raises(TicketSetError, match=r"nothing.weight: expected \[2, 2\], got none"):
        trainer(opened, Subnetwork({"nothing.weight": np.ones((2, 2), bool)}))


def test_arithmetic_in_theory_leaves_out_the_products_of_zeros(opened, kept):
    """Every prunable weight of a ViT meets each token once: K patches and the class token."""
    found = trainer(opened)
    gone = sum(int((~mask).sum()) for mask in kept.values())
    dense = gmacs(found.student, 13)
    assert sparse_gmacs(found.student, {13: 1.0}, kept) == pytest.approx(dense - gone * 14 / 1e9, rel=1e-12)
    assert sparse_gmacs(found.student, {13: 1.0}, {}) == dense


def test_what_may_be_pruned_lies_between_stem_and_head(opened):
    model = trainer(opened).student.model
    names = prunable(model)
    kinds = {name.split(".", 2)[2] for name in names}
    assert kinds == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"} and len(names) == 8
    assert prunable(model, ("head.weight",)).keys() - names.keys() == {"head.weight"}
    assert names.keys() - prunable(model, (), ("*.qkv.*",)).keys() == {f"blocks.{i}.attn.qkv.weight" for i in (0, 1)}
    with pytest.raises(TicketSetError, match="`prune` nose: fits no weight"):
        prunable(model, ("nose",))
    with pytest.raises(TicketSetError, match="expected weights to prune"):
        prunable(model, (), ("blocks.*",))
