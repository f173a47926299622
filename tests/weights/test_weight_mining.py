"""datalth-weights mine: every method, killed and going on, the same bytes; what it refuses."""

import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from conftest import long
from trainer.weights.cli import main
from trainer.weights.ticket import WeightTicket
from trainer.weights.verify import verify
from training import QUICK, same, stopped_at, summary_of, train, two_ranks, weights_of

FLAGS = [*QUICK, "--no-model-ema", "--seed", "5"]
BYTES = ("plan.json", "start.safetensors", "masks-*.safetensors")


def flags(tickets: Path, out: Path, *more: object) -> list[str]:
    return ["mine", "--shards", str(tickets), "--out", str(out), *FLAGS, *map(str, more)]


def mine(tickets: Path, out: Path, *more: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, flags(tickets, out, *more))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same: masks, start and plan, and the manifest but for its timing."""
    found = {path.name: path.read_bytes() for pattern in BYTES for path in sorted(folder.glob(pattern))}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["timing"]
    return found | {"manifest.json": json.dumps(manifest, sort_keys=True).encode()}


@pytest.fixture(scope="module")
def imp(center_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two levels to nine tenths, rewound to epoch 1 of 2."""
    out = tmp_path_factory.mktemp("mined") / "imp"
    mine(center_set, out, "--levels", 2, "--rewind-epochs", 1)
    return out


def test_imp_keeps_the_greatest_weights_of_the_training_before(center_set, imp):
    ticket = WeightTicket.open(imp)
    assert verify(ticket) == []
    total = ticket.plan.total
    assert [ticket.manifest.levels[n].kept for n in range(3)] == [total, round(total * 0.1**0.5), round(total * 0.1)]
    first, second = ticket.kept(1), ticket.kept(2)
    dense = weights_of(imp / "level-00")
    flat = np.concatenate([dense[name].abs().numpy().ravel() for name in sorted(first)])
    mask = np.concatenate([first[name].ravel() for name in sorted(first)])
    assert flat[mask].min() >= flat[~mask].max() and mask.sum() == round(total * 0.1**0.5)
    assert all((second[name] <= first[name]).all() for name in first)
    assert [record.updates for record in ticket.manifest.levels] == [0, 12, 18]  # two epochs of six, then one
    assert [len(list(csv.open())) for csv in sorted(imp.glob("level-*/summary.csv"))] == [3, 2, 2]


def test_level_0_is_an_ordinary_run_and_its_weights_at_the_epoch_are_the_start(center_set, imp, tmp_path):
    train(center_set, tmp_path, "run", "--no-model-ema", "--seed", 5)
    assert summary_of(imp / "level-00") == summary_of(tmp_path / "run")
    for name in ("model_best.safetensors", "predictions.parquet", "final.json"):
        ours, theirs = ((folder / name).read_bytes() for folder in (imp / "level-00", tmp_path / "run"))
        if name == "final.json":
            ours, theirs = ({**json.loads(j), "cost": {**json.loads(j)["cost"], "seconds": 0}} for j in (ours, theirs))
        assert ours == theirs, name
    # One epoch of the same schedule: trained on its own it would end elsewhere.
    from shards.reader import TicketSet
    from trainer.config import read_yaml
    from trainer.hooks import Hook
    from trainer.options import Recipe
    from trainer.trainer import Trainer

    seen = {}

    class Look(Hook):
        def before_epoch(self, trainer: Trainer) -> None:
            seen[trainer.state.epoch] = {n: t.clone() for n, t in trainer.student.model.state_dict().items()}

    then = read_yaml(tmp_path / "run" / "args.yaml")
    known = Recipe().flat().keys()
    recipe = Recipe.of({name: value for name, value in then.items() if name in known})
    Trainer(TicketSet.open(str(center_set)), recipe, [Look()]).fit()
    start = load_file(imp / "start.safetensors")
    assert same(start, seen[1]) and not same(start, seen[0])


def test_a_level_is_what_datalth_train_makes_of_the_finished_ticket(center_set, imp, tmp_path):
    train(center_set, tmp_path, "run", "--no-model-ema", "--seed", 5, "--weight-ticket", imp, "--weight-level", 1)
    assert same(weights_of(imp / "level-01"), weights_of(tmp_path / "run"))
    ours, theirs = ((folder / "args.yaml").read_text().splitlines() for folder in (imp / "level-01", tmp_path / "run"))
    differing = {line.partition(":")[0] for line in {*ours} ^ {*theirs}}
    assert differing <= {"experiment", "output"}
    rows = (tmp_path / "run" / "summary.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["epoch", "1"]


@pytest.mark.long
def test_rewound_weights_have_no_plain_reinit_but_another_seeds_start(center_set, imp, tmp_path):
    output = train(
        center_set, tmp_path, "run", "--weight-ticket", imp, "--weight-arm", "reinit", "--no-model-ema", code=1
    ).output
    assert "starts at epoch 1" in output.splitlines()[-1] and "--weight-start" in output
    other = tmp_path / "other"
    mine(center_set, other, "--levels", 2, "--rewind-epochs", 1, "--seed", 6)
    train(center_set, tmp_path, "run2", "--weight-ticket", imp, "--weight-arm", "reinit", "--weight-start", other, "--no-model-ema")  # fmt: skip
    short = train(center_set, tmp_path, "run3", "--weight-ticket", imp, "--epochs", 1, "--no-model-ema", code=1).output
    assert "starts at epoch 1: expected more --epochs, got 1" in short.splitlines()[-1]


def test_the_same_command_again_does_nothing_and_another_is_refused(center_set, imp):
    before = files(imp)
    assert "complete" in mine(center_set, imp, "--levels", 2, "--rewind-epochs", 1)
    assert files(imp) == before
    says = mine(center_set, imp, "--levels", 3, "--rewind-epochs", 1, "--lr", "0.1", code=1)
    assert "another plan: levels: 2 there, 3 here; lr: None there, 0.1 here" in says and len(says.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("update", [4, *(long(u) for u in (1, 8, 10))])
def test_stopped_anywhere_and_going_on_it_gives_the_same_bytes(center_set, imp, tmp_path, monkeypatch, update):
    out = tmp_path / "cut"
    with monkeypatch.context() as stopping:
        stopped_at(update, stopping)
        mine(center_set, out, "--levels", 2, "--rewind-epochs", 1, code=143)
    assert not (out / "manifest.json").exists()
    mine(center_set, out, "--levels", 2, "--rewind-epochs", 1, "-j", 1)
    assert files(out) == files(imp)


@pytest.mark.long
@pytest.mark.slow
def test_killed_after_any_file_and_moved_it_gives_the_same_bytes(center_set, imp, tmp_path):
    """What a kill leaves is a prefix of the files in the order that they are written in."""
    order = [
        "plan.json.1-abcdef.tmp",
        "plan.json",
        "level-00",
        "start.safetensors",
        "masks-01.safetensors",
        "level-01",
        "masks-02.safetensors",
    ]
    for count in range(1, len(order) + 1):
        out = tmp_path / f"cut-{count}"
        out.mkdir()
        for name in order[:count]:
            if name.endswith(".tmp"):
                (out / name).write_bytes(b"half")
                continue
            copy = shutil.copytree if (imp / name).is_dir() else shutil.copy
            copy(imp / name, out / name)
        if count == 3:  # start weights are written inside the run: a finished one without them cannot go on
            assert "remove" in mine(center_set, out, "--levels", 2, "--rewind-epochs", 1, code=1)
            continue
        if count > 1:
            (out / "masks-02.safetensors.1-abcdef.tmp").write_bytes(b"half")
        mine(center_set, out, "--levels", 2, "--rewind-epochs", 1)
        assert files(out) == files(imp) and not list(out.glob("*.tmp"))


@pytest.mark.long
def test_two_ranks_mine_a_ticket(center_set, tmp_path):
    ranks = two_ranks(
        *flags(center_set, tmp_path / "two", "--levels", 2, "--rewind-epochs", 1, "-b", 2), module="trainer.weights.cli"
    )
    for rank in ranks:
        out, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, out
    ticket = WeightTicket.open(tmp_path / "two")
    assert verify(ticket) == [] and ticket.plan.arguments["global_batch"] == 4


@pytest.mark.long
def test_two_miners_of_one_folder(center_set, tmp_path):
    command = [sys.executable, "-m", "trainer.weights.cli", *flags(center_set, tmp_path / "w", "--epochs", 200)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "w" / "level-00").exists():
            time.sleep(0.1)
        assert "under way" in mine(center_set, tmp_path / "w", "--epochs", 200, code=1)
    finally:
        first.kill()
        first.wait()


def test_a_runs_own_arguments_are_a_recipe_for_mining(center_set, imp, tmp_path):
    """Without what names the run, or its weight ticket."""
    told = ["mine", "-c", str(imp / "level-01" / "args.yaml"), "--method", "random", "--out", str(tmp_path / "w")]
    result = CliRunner().invoke(main, told)
    assert result.exit_code == 0, result.output
    assert WeightTicket.open(tmp_path / "w").plan.arguments == WeightTicket.open(imp).plan.arguments


def test_a_random_mask_at_a_later_epoch_has_cost_the_epochs_before(center_set, imp, tmp_path):
    more = ("--no-model-ema", "--seed", 5, "--weight-ticket", imp, "--weight-arm", "random")
    output = train(center_set, tmp_path, "run", *more).output
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert (final["cost"]["updates"], final["cost"]["mining_updates"]) == (6, 6)
    assert "the weight ticket was mined with" not in output
    assert (
        "--seed 6: the weight ticket was mined with 5"
        in train(center_set, tmp_path, "other", *more, "--seed", 6).output
    )


def test_oneshot_is_one_level(center_set, tmp_path):
    mine(center_set, tmp_path / "w", "--method", "oneshot", "--sparsity", 0.5, "--scope", "layer")
    ticket = WeightTicket.open(tmp_path / "w")
    assert ticket.levels == 1 and verify(ticket) == []
    shares = [mask.mean() for mask in ticket.kept().values()]
    assert max(shares) - min(shares) < 0.001
    assert ticket.manifest.levels[1].results.keys() == {"tickets", "all", "random"}


@pytest.mark.long
def test_rst_and_random_of_a_seed_are_one_subnetwork_and_rst_has_learned(center_set, tmp_path):
    mine(center_set, tmp_path / "rst", "--method", "rst", "--transform-epochs", 1, "--mining-lr", 0.001)
    mine(center_set, tmp_path / "random", "--method", "random")
    mine(
        center_set, tmp_path / "twice", "--method", "rst", "--transform-epochs", 1, "--mining-lr", 0.001, "--levels", 2
    )
    rst, random, twice = (WeightTicket.open(tmp_path / name) for name in ("rst", "random", "twice"))
    assert verify(rst) == verify(random) == verify(twice) == []
    kept = rst.kept()
    assert all((kept[name] == mask).all() for name, mask in random.kept().items())
    start, first = (load_file(tmp_path / name / "start.safetensors") for name in ("rst", "random"))
    assert all(not start[name][torch.from_numpy(~mask)].any() for name, mask in kept.items())
    assert all(first[name].all() for name in kept)  # of random masks the start is dense
    assert not same({n: start[n] for n in kept}, {n: first[n] * torch.from_numpy(m) for n, m in kept.items()})
    assert [r.updates for r in twice.manifest.levels] == [0, 6, 12] and rst.manifest.levels[1].results is None
    assert all((twice.kept(2)[name] <= twice.kept(1)[name]).all() for name in kept)
    train(center_set, tmp_path, "run", "--weight-ticket", tmp_path / "rst", "--no-model-ema", "--seed", 5)
    final = json.loads((tmp_path / "run" / "final.json").read_text())
    assert (final["cost"]["updates"], final["cost"]["mining_updates"]) == (12, 6)


@pytest.mark.long
def test_soup_keeps_what_short_trainings_agree_on(center_set, tmp_path):
    mine(center_set, tmp_path / "w", "--method", "soup", "--soup-runs", 3, "--sparsity", 0.8)
    ticket = WeightTicket.open(tmp_path / "w")
    assert verify(ticket) == [] and ticket.level().kept == round(ticket.plan.total * 0.2)
    assert ticket.level().updates == 18
    kept = ticket.kept()
    runs = [weights_of(tmp_path / "w" / f"level-01-{j}") for j in range(3)]
    flat = [np.concatenate([run[n].abs().numpy().ravel() for n in sorted(kept)]) for run in runs]
    cut = [np.sort(f)[-ticket.level().kept] for f in flat]
    votes = sum((f >= c).astype(int) for f, c in zip(flat, cut, strict=True))
    mask = np.concatenate([kept[n].ravel() for n in sorted(kept)])
    assert votes[mask].min() >= votes[~mask].max() and (votes == 3).sum() < mask.sum()


@pytest.mark.long
def test_a_score_of_ones_own(center_set, tmp_path, monkeypatch):
    (tmp_path / "mine_scores.py").write_text(
        textwrap.dedent("""
            import torch

            def movement(trainer, start):
                return {n: (p.detach() - start[n]).abs() for n, p in trainer.student.model.named_parameters()}

            def at_init(trainer, start):
                return {n: p.detach().abs() for n, p in trainer.student.model.named_parameters()}

            at_init.at_start = True

            def none(trainer, start):
                return None

            def wrong(trainer, start):
                return {n: p.detach()[:1] for n, p in trainer.student.model.named_parameters()}
        """)
    )
    monkeypatch.chdir(tmp_path)
    mine(center_set, tmp_path / "w", "--method", "mine_scores:movement", "--levels", 1)
    ticket = WeightTicket.open(tmp_path / "w")
    dense, start = weights_of(tmp_path / "w" / "level-00"), load_file(tmp_path / "w" / "start.safetensors")
    kept = ticket.kept()
    moved = np.concatenate([(dense[n] - start[n]).abs().numpy().ravel() for n in sorted(kept)])
    mask = np.concatenate([kept[n].ravel() for n in sorted(kept)])
    assert moved[mask].min() >= moved[~mask].max() and ticket.plan.score_sha256
    mine(center_set, tmp_path / "start", "--method", "mine_scores:at_init", "--levels", 1)
    assert WeightTicket.open(tmp_path / "start").level().updates == 0
    assert not list((tmp_path / "start").glob("level-*"))
    says = mine(center_set, tmp_path / "wrong", "--method", "mine_scores:wrong", "--levels", 1, code=1)
    assert (
        "--method mine_scores:wrong: blocks.0.attn.proj.weight: expected a tensor of scores [32, 32], got [1, 32]"
        in says
    )
    says = mine(center_set, tmp_path / "none", "--method", "mine_scores:none", "--levels", 1, code=1)
    assert "--method mine_scores:none: expected scores by name, got NoneType" in says
    says = mine(center_set, tmp_path / "x", "--method", "mine_scores:at_init", "--rewind-epochs", 1, code=1)
    assert "--rewind-epochs: mine_scores:at_init scores weights before any training" in says
    sys.modules.pop("mine_scores")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("swin_tiny_patch4_window7_224", ["embed_dim=24", "depths=(2,2)", "num_heads=(1,2)", "window_size=4"]),
        long("lvvit_t", ["embed_dim=32", "depth=2", "num_heads=2", "stem_width=8"]),
        long("hiera_tiny_224", ["embed_dim=24", "num_heads=1", "stages=(1,1,2,1)"]),
        long("test_resnet", []),
        long("eva02_tiny_patch14_224", ["embed_dim=32", "depth=2", "num_heads=2", "patch_size=16"]),
    ],
)
def test_every_family_has_weight_tickets(photos, tmp_path, name, kwargs):
    from conftest import mine as mine_patches

    tickets = tmp_path / "set"
    mine_patches("--data", photos, "--out", tickets, "--method", "center", "--tokens", 4, "--img-size", 96 if "hiera" in name else 128, "--patch-size", 16 if "lvvit" in name or "eva" in name else 32)  # fmt: skip
    args = [part for kwarg in kwargs for part in ("--model-kwargs", kwarg)]
    drop = ["--drop-path", "0"] if "resnet" in name or "swin" in name else []
    told = ["--model", name, *args, *drop, "-b", "4", "--epochs", "1", "--warmup-epochs", "0", "-j", "0", "--repeats", "1", "--no-model-ema", "--mixup", "0", "--cutmix", "0"]  # fmt: skip
    command = ["mine", "--shards", str(tickets), "--out", str(tmp_path / "w"), "--method", "oneshot", *told]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output + str(result.exception)
    ticket = WeightTicket.open(tmp_path / "w")
    assert verify(ticket) == []
    assert not any("embed" in n or n.startswith(("head", "fc.", "stem", "conv1")) for n in ticket.plan.prunable)
    final = json.loads((tmp_path / "w" / "level-01" / "final.json").read_text())
    assert final["weights"]["nonzero_under_mask"] == 0
    assert ticket.level().gmacs < ticket.level().dense_gmacs < 1.001 * ticket.manifest.levels[0].gmacs


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "magic"), "--method magic: expected one of imp, oneshot, rst, soup, random, or module:function"),
        (("--method", "nowhere:score"), "nowhere"),
        (("--method", "math:sqrt"), "--method math:sqrt: expected a function of a file of yours, got a built-in one"),
        (("--method", "oneshot", "--levels", 3), "--levels 3: oneshot has one"),
        (("--method", "rst", "--rewind-epochs", 1), "--rewind-epochs: rst starts from the first weights"),
        (("--method", "random", "--scope", "global"), "--scope global: chance has no scores"),
        (("--power", 2), "--power: of rst, got --method imp"),
        (("--rewind-epochs", 2), "--rewind-epochs 2: expected less than --epochs"),
        (("--sparsity", 1), "--sparsity"),
        (("--prune", "nothing*"), "--prune nothing*: fits no weight"),
        (("--keep", "*"), "expected weights to prune"),
    ],
)
def test_wrong_commands_are_one_line_and_leave_nothing(center_set, tmp_path, more, says):
    result = CliRunner().invoke(main, flags(center_set, tmp_path / "w", *more))
    assert result.exit_code in (1, 2) and says in result.output.splitlines()[-1], result.output
    assert "Traceback" not in result.output and not (tmp_path / "w").exists()


def test_a_folder_with_something_else_is_left_alone(center_set, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("mine")
    assert "expected a weight ticket or an empty folder" in mine(center_set, tmp_path / "w", code=1)
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["thesis.tex"]
