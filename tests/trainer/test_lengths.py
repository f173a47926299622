"""Tickets of varying length: K of a view, parts of batches of one K each, and runs that train on them."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import long, mine
from miner.selectors import register_method
from shards import spread
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.data.dataset import TicketDataset, ValidationDataset
from trainer.data.lengths import WINDOW, Lengths, batches_by_length, known, sizes_of
from trainer.data.sampler import epoch_samples, view_of_visit, views_of
from trainer.options import Augment, Recipe, Tickets
from training import arguments as typed
from training import predict, same, stopped_at, train, two_ranks, weights_of

N = 64
SIZES = tuple(range(8, 72, 8))
# Patches that hold 50, 60, 70, 80, 90, 95, 98 % of four views' scores.
FOUR = np.array(
    [
        [1, 2, 3, 4, 6, 8, 10],
        [4, 6, 8, 12, 20, 28, 40],
        [10, 14, 18, 24, 36, 44, 52],
        [32, 39, 45, 52, 58, 61, 63],
    ],
    np.uint8,
)
PLAIN = Augment(mixup=0, cutmix=0, aa="", color_jitter=0, reprob=0)


# --- K of a view


@pytest.mark.parametrize(
    ("share", "tokens"),
    [
        (0.5, [8, 8, 16, 32]),  # 1, 4, 10, 32
        (0.85, [8, 16, 32, 56]),  # 5, 16, 30, 55: halfway from 80 to 90 %
        (0.9, [8, 24, 40, 64]),  # 6, 20, 36, 58
        (0.25, [8, 8, 8, 16]),  # 0.5, 2, 5, 16: halfway from nothing to 50 %
        (0.99, [40, 56, 64, 64]),  # 37, 52, 58, 63.5: halfway from 98 % to all
        (0.0, [8, 8, 8, 8]),
        (1.0, [64, 64, 64, 64]),
    ],
)
def test_patches_are_interpolated_and_rounded_up_to_a_size(share: float, tokens: list[int]) -> None:
    assert Lengths(SIZES, share, N).of(FOUR).tolist() == tokens


def test_the_share_is_the_greatest_within_the_budget() -> None:
    """By hand: at 90 % the four have 8, 24, 40 and 64, which is 34 on average; a millionth more needs another row.

    View 1 needs more than 24 from 92.5 % on, view 2 more than 40 from 92.5 % on, view 0 more than 8 from 95 % on, view 3
    has all from 56 patches, 86.7 %, on. So 34 holds up to 92.5 %, where both others grow: 38.
    """
    found = Lengths.fit(FOUR, 34, SIZES, N)
    assert found.share == 0.925 and found.of(FOUR).mean() == 34
    assert Lengths(SIZES, 0.925001, N).of(FOUR).mean() == 38
    assert Lengths.fit(FOUR, 37, SIZES, N) == found  # no share gives 37
    assert Lengths.fit(FOUR, 38, SIZES, N).of(FOUR).mean() == 38
    assert Lengths.fit(FOUR, 64, SIZES, N).of(FOUR).tolist() == [64] * 4
    assert Lengths.fit(FOUR, 8, SIZES, N).of(FOUR).tolist() == [8] * 4
    with pytest.raises(TicketSetError, match=r"`tokens` auto:7: expected at least 8, the smallest of the sizes 8, 16"):
        Lengths.fit(FOUR, 7, SIZES, N)


def test_the_mean_comes_near_a_budget_and_not_above() -> None:
    rng = np.random.default_rng(0)
    counts = spread.spread_of(rng.gamma(rng.uniform(0.02, 2, (2000, 1)), size=(2000, N)))
    for budget in (12, 20, 32, 50):
        mean = Lengths.fit(counts, budget, SIZES, N).of(counts).mean()
        assert budget - 0.6 < mean <= budget


@pytest.mark.parametrize(
    ("grid", "stored", "sizes"),
    [
        (8, 64, (8, 16, 24, 32, 40, 48, 56, 64)),
        (14, 196, (28, 56, 84, 112, 140, 168, 196)),
        (14, 98, (14, 28, 42, 56, 70, 84, 98)),
        (37, 1369, (185, 370, 555, 740, 925, 1110, 1295, 1369)),
        (1, 1, (1,)),
    ],
)
def test_sizes_are_whole_rows_and_no_more_than_a_compiler_has_graphs(
    grid: int, stored: int, sizes: tuple[int, ...]
) -> None:
    class Opened:
        pass

    opened = Opened()
    opened.grid, opened.stored_tokens = (grid, grid), stored
    assert sizes_of(opened) == sizes


# --- parts of one K each


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("samples", [1600, 1610])
def test_parts_are_pure_and_show_each_sample_once(paired: bool, samples: int) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.choice(SIZES, samples)
    if paired:
        tokens = np.repeat(tokens[::2], 2)[:samples]  # or no batch of pairs would be pure
    steps, size = -(-samples // 20), 20
    shown, kept = batches_by_length(tokens, SIZES, (steps, 2, 10), paired, 3, 0)
    every = np.sort(shown.reshape(-1))
    expected = np.sort(np.arange(steps * size) % samples)  # past the end the epoch begins anew
    assert np.array_equal(every, expected) and kept.shape == (steps, 2)
    windows = -(-steps // WINDOW)
    parts = shown.reshape(-1, 10)
    pure = [len(set(tokens[part].tolist())) == 1 for part in parts]
    assert sum(pure) >= 2 * steps - windows * (len(SIZES) - 1) and sum(pure) > steps
    assert all(tokens[part[0]] == k for part, k, one in zip(parts, kept.reshape(-1), pure, strict=True) if one)
    assert abs(kept.mean() - tokens.mean()) < 1
    assert (kept[:, 0] != kept[:, 1]).sum() > steps / 2  # a step has several K
    plain = np.arange(steps * size).reshape(steps, size) % samples  # negative control: the epoch's own order
    assert sum(len(set(tokens[part].tolist())) == 1 for part in plain.reshape(-1, 10)) == 0
    if paired:
        assert (shown[:, ::2] // 2 == shown[:, 1::2] // 2).all()
    assert not np.array_equal(kept, np.sort(kept, axis=0))  # short ones do not come first
    for window in range(0, steps, WINDOW):  # and nothing leaves its window
        inside = shown[window : window + WINDOW]
        assert np.array_equal(np.sort(inside, axis=None), np.sort(plain[window : window + WINDOW], axis=None))
    again, other = (batches_by_length(tokens, SIZES, (steps, 2, 10), paired, 3, epoch)[0] for epoch in (0, 1))
    assert np.array_equal(again, shown) and not np.array_equal(other, shown)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_views_of_an_epoch_are_those_of_each_visit(views: int) -> None:
    for epoch in range(5):
        samples = epoch_samples(7, epoch, (5, 9), min(2, max(1, views - 1)))
        shown, images = views_of(7, samples, (5, 9), views)
        assert shown.tolist() == [view_of_visit(7, *sample, views) for sample in samples.tolist()]
        assert images.tolist() == [(0, 5)[shard] + row for shard, row in samples[:, :2].tolist()]


# --- fed


def feed(opened: TicketSet, **given: object) -> TicketDataset:
    tickets = Tickets(**{"tokens": "auto:8", "repeats": 2, **given.pop("tickets", {})})
    return TicketDataset(opened, tickets=tickets, **{"augment": PLAIN, "batch_size": 4, "seed": 3, **given})


@register_method("peaked")
def peaked(selector, images, seeds):
    """More peaked scores for some images than for others, as those of objects of several sizes are."""
    brightness = nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), selector.grid).flatten(1)
    scores = (brightness * (5 + 400 * (brightness.mean(1, keepdim=True) - 0.5).abs())).softmax(1)
    return scores.argsort(dim=1, descending=True, stable=True), scores


@pytest.fixture(scope="module")
def tickets(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As conftest's, by `peaked`."""
    out = tmp_path_factory.mktemp("peaked") / "set"
    mine("--data", photos, "--out", out, "--method", "peaked", "--tokens", 8, "--views", 4, "--shard-size", 10)
    return out


@pytest.fixture(scope="module")
def varied(tickets: Path) -> TicketSet:
    return TicketSet.open(str(tickets))


def test_a_batch_is_its_views_first_patches_by_their_own_spread(varied: TicketSet) -> None:
    dataset, whole = feed(varied), feed(varied, tickets={"tokens": 16})
    assert dataset.lengths and len(dataset.token_shares) > 1
    mean = sum(k * share for k, share in dataset.token_shares.items())
    assert 0 < mean <= 8
    counts = known(dataset.rows.spread(), varied)
    kinds = set()
    for step in range(dataset.steps):
        batch, positions = dataset[0, step, 0], dataset._positions(0, step, 0)
        views, images = views_of(3, dataset.samples(0)[positions], dataset.rows.sizes, 4)
        own = dataset.lengths.of(counts[images, views])
        k = batch["keep_indices"].shape[1]
        assert k == dataset.tokens_at(0, step) in dataset.lengths.sizes
        assert abs(k - own.mean()) == min(abs(size - own.mean()) for size in dataset.lengths.sizes)
        for slot, position in enumerate(positions.tolist()):
            step_there, place = divmod(position, 4)
            same_sample = whole[0, step_there, 0]
            assert torch.equal(batch["keep_indices"][slot], same_sample["keep_indices"][place, :k])
            assert torch.equal(batch["patches"][slot], same_sample["patches"][place, :k])
        kinds.add(k)
    assert len(kinds) > 1


@pytest.mark.parametrize("arm", ["random", "random-fixed", "inverse", "center"])
def test_other_arms_have_the_same_lengths(varied: TicketSet, arm: str) -> None:
    winning, other = feed(varied), feed(varied, tickets={"tickets": arm})
    for step in range(winning.steps):
        ours, theirs = winning[0, step, 0]["keep_indices"], other[0, step, 0]["keep_indices"]
        assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("mixing", ["pixels", "patches"])
def test_ranks_and_micro_batches_are_parts_of_one_batch(varied: TicketSet, mixing: str) -> None:
    augment = Augment(mixing=mixing, reprob=0.5)
    alone = feed(varied, augment=augment, batch_size=4, micro_batches=2, parts=2)
    cut = feed(varied, augment=augment, batch_size=2, micro_batches=4, parts=2)  # two ranks, each of both parts
    lengths = set()
    for step, part in itertools.product(range(alone.steps), (0, 1)):
        one, halves = alone[1, step, part], [cut[1, step, 2 * part + rank] for rank in (0, 1)]
        for name, tensor in one.items():
            assert torch.equal(tensor, torch.cat([half[name] for half in halves])), name
        lengths.add((part, one["keep_indices"].shape[1]))
        assert one["keep_indices"].shape[1] == alone.tokens_at(1, step, part) == cut.tokens_at(1, step, 2 * part + 1)
    assert len(lengths) > 2


def test_ranked_views_are_read_as_far_as_the_batch_needs(
    tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine("--data", tickets, "--out", tmp_path / "ranked", "--images", "ranked")
    dataset = feed(TicketSet.open(str(tmp_path / "ranked")), augment=Augment(mixup=0, cutmix=0))
    asked = []
    read_all = dataset.rows.read_all
    monkeypatch.setattr(
        dataset.rows,
        "read_all",
        lambda places, numbers, tokens: asked.append(tokens) or read_all(places, numbers, tokens),
    )
    shown = [dataset[0, step, 0]["patches"].shape[1] for step in range(dataset.steps)]
    assert asked == shown and len(set(shown)) > 1


def test_unmasked_epochs_are_those_of_a_fixed_k(varied: TicketSet) -> None:
    varying, fixed = feed(varied, unmask_from=1), feed(varied, unmask_from=1, tickets={"tokens": 8})
    for name, tensor in varying[1, 1, 0].items():
        assert torch.equal(tensor, fixed[1, 1, 0][name])


def test_validation_says_k_of_each_image(varied: TicketSet) -> None:
    lengths = feed(varied).lengths
    validation = ValidationDataset(varied, "val", batch_size=4, lengths=lengths)
    counts = validation.rows.spread()[:, 0]
    assert torch.cat([validation[i]["tokens"] for i in range(2)]).tolist() == lengths.of(counts).tolist()
    assert "tokens" not in ValidationDataset(varied, "val", batch_size=4)[0]


# --- refused


def test_a_set_that_does_not_say_is_refused_in_words(center_set: Path, tickets: Path, tmp_path: Path) -> None:
    said = train(center_set, tmp_path, "run", *FLAGS, code=1).output
    assert "does not say how its views' scores are spread" in said and "method center are no shares" in said
    opened = TicketSet.open(str(tickets))
    object.__setattr__(opened.manifest, "format", (1, 2))
    with pytest.raises(TicketSetError, match=r"its format is 1\.2, expected 1\.3 or above; mine it again"):
        feed(opened)


FLAGS = ["--tokens", "auto:8", "-b", "8", "--mixup", "0", "--cutmix", "0"]


@pytest.mark.parametrize(
    ("says", "flags", "code"),
    [
        ("--tickets full has one number of patches", ["--tickets", "full", "--tokens", "auto:8"], 1),
        ("--resize-to-tokens has one number of patches", ["--resize-to-tokens", "--tokens", "auto:9"], 1),
        ("--tokens auto:17: expected at most 16", ["--tokens", "auto:17", "-b", "8"], 1),
        ("--batch-size 6: with --tokens auto:8 expected a multiple of 4", [*FLAGS, "-b", "6"], 1),
        (
            "--batch-size 4: with --tokens auto:8 expected a multiple of 8",
            ["--tokens", "auto:8", "-b", "4", "--mixup", "0.8"],
            1,
        ),
        ("--tokens auto:3: expected at least 4", ["--tokens", "auto:3", "-b", "8"], 1),
        ("expected K or auto:K, K a whole number above 0, got 'auto:0'", ["--tokens", "auto:0"], 2),
        ("expected K or auto:K, K a whole number above 0, got 'auto'", ["--tokens", "auto"], 2),
        ("expected K or auto:K, K a whole number above 0, got '0'", ["--tokens", "0"], 2),
    ],
)
def test_what_does_not_go_with_it(tickets: Path, tmp_path: Path, says: str, flags: list[str], code: int) -> None:
    assert says in train(tickets, tmp_path, "run", *flags, code=code).output


def test_a_model_of_one_k_is_refused(tickets: Path, tmp_path: Path) -> None:
    said = train(tickets, tmp_path, "run", "--model", "swin_tiny_patch4_window7_224", *FLAGS, code=1, plain=True)
    assert "small-dense is built for tickets of one K" in said.output
    with pytest.raises(
        TicketSetError, match="^`tokens`: expected the number 98, got '98'$"
    ):  # a program's text is no number
        Tickets(tokens="98")
    assert Recipe.of({"tokens": "auto:98"}).tickets.count == 98


# --- trained


@pytest.fixture(scope="module")
def varying(tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("varying")
    output.joinpath("said").write_text(train(tickets, output, "run", *FLAGS).output)
    return output / "run"


def test_a_run_says_what_came_of_it(varying: Path, tickets: Path) -> None:
    from trainer.config import read_yaml

    said = (varying.parent / "said").read_text()
    args = read_yaml(varying / "args.yaml")
    opened = TicketSet.open(str(tickets))
    dataset = feed(opened)
    assert (args["tokens"], args["resolved_tokens"], args["resolved_share"]) == ("auto:8", 8, dataset.lengths.share)
    views = json.loads((varying / "config.json").read_bytes())["views"]
    assert (views["tokens"], views["share"], tuple(views["sizes"])) == (8, dataset.lengths.share, (4, 8, 12, 16))
    mean = sum(k * share for k, share in dataset.token_shares.items())
    assert f"mean {mean:.1f} of 16: {dataset.lengths.share:.0%} of a view's score" in said
    shown = {int(k) for k in re.findall(r"Tokens: (\d+)/16", said)}
    run = feed(opened, seed=args["seed"], tickets={"repeats": args["repeats"]}, batch_size=2, micro_batches=4, parts=4)
    means = {
        round(np.mean([run.tokens_at(epoch, step, part) for part in range(4)]))
        for epoch, step in itertools.product(range(args["epochs"]), range(run.steps))
    }
    assert shown == means and len(shown) > 1  # of a step's four K


def test_costs_are_means_over_the_views(varying: Path, tickets: Path) -> None:
    from trainer.costs import gmacs
    from trainer.options import Dropping, Model
    from trainer.student import build_student

    opened = TicketSet.open(str(tickets))
    model = Model(model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2})
    student = build_student(opened, model, Tickets(tokens=8), Dropping())
    dataset = feed(opened)
    cost = json.loads((varying / "final.json").read_bytes())["cost"]
    views = dataset._view_tokens[:, 1:].reshape(-1).tolist()
    assert cost["train_gmacs"] == pytest.approx(np.mean([gmacs(student, int(k)) for k in views]))
    tested = ValidationDataset(opened, "val", lengths=dataset.lengths)[0]["tokens"].tolist()
    assert cost["test_gmacs"]["tickets"] == pytest.approx(np.mean([gmacs(student, k) for k in tested]))
    assert cost["test_gmacs"]["all"] == gmacs(student, 16) and cost["tokens"] == 8


@pytest.mark.parametrize("update", [long(2), 4])  # in the middle of a window, in the first epoch and in the second
def test_stopped_and_resumed_gives_the_same_weights(
    varying: Path, tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    with monkeypatch.context() as patch:
        stopped_at(update, patch)
        train(tickets, tmp_path, "run", *FLAGS, code=143)
    train(tickets, tmp_path, "run", *FLAGS, "--resume", tmp_path / "run")
    assert same(weights_of(tmp_path / "run"), weights_of(varying))
    said = train(tickets, tmp_path, "run", *FLAGS, "--tokens", "8", "--resume", tmp_path / "run", code=1).output
    assert "tokens: auto:8 there, 8 here" in said


def test_a_run_is_repeated_from_its_own_args(varying: Path, tickets: Path, tmp_path: Path) -> None:
    """They hold auto:8, and the share that came of it."""
    train(tickets, tmp_path, "again", "-c", varying / "args.yaml", *FLAGS[2:])
    assert same(weights_of(tmp_path / "again"), weights_of(varying))


def test_testing_a_run_again_goes_by_its_own_share(varying: Path, tickets: Path) -> None:
    said = train(tickets, varying.parent, "run", "--eval", "--resume", varying).output
    last = [
        line for line in (varying.parent / "said").read_text().splitlines() if line.startswith(("tickets ", "random "))
    ]
    assert last and all(line in said for line in last)


@pytest.mark.long
def test_two_ranks_are_one_process_of_twice_the_batch(tickets: Path, tmp_path: Path) -> None:
    # Stochastic depth and noise are drawn a micro-batch; Adam makes much of a gradient's last bits.
    flags = [*FLAGS, "--drop-path", 0, "--reprob", 0, "--opt", "sgd", "--lr", 0.05]
    train(tickets, tmp_path, "one", *flags)
    ranks = two_ranks(*typed(tickets, tmp_path, "two", *flags, "-b", "4"))
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].stdout.read()
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    results = [json.loads((tmp_path / name / "final.json").read_bytes())["results"] for name in ("one", "two")]
    assert results[0]["tickets"]["loss"] == pytest.approx(results[1]["tickets"]["loss"], abs=1e-4)


@pytest.mark.parametrize("more", [["--feed", "zero", "--model", "test_resnet"], long(["--model", "lvvit_t"])])
def test_other_families_take_them_too(tickets: Path, tmp_path: Path, more: list[str]) -> None:
    train(
        tickets,
        tmp_path,
        "run",
        *FLAGS,
        *more,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        "--token-labels",
        "none",
        plain=True,
    )


@pytest.mark.long
def test_each_k_is_compiled_once(tickets: Path) -> None:
    """As `build_state` compiles; with torch's own choice the second K makes a graph of any length."""
    from trainer.options import Dropping, Model
    from trainer.student import build_student

    model = Model(model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2})
    student = build_student(TicketSet.open(str(tickets)), model, Tickets(tokens=8), Dropping())
    lengths = []

    def counting(graph, inputs):
        lengths.append(
            next(i.shape[1] for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 3 and i.shape[0] == 2)
        )
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(student, backend=counting, dynamic=False)
    for k in (4, 8, 16, 12, 8, 4, 16, 12):
        compiled(torch.zeros(2, k, 768), torch.arange(k).expand(2, -1))
    assert sorted(lengths) == [4, 8, 12, 16]
    torch._dynamo.reset()


# --- tested


def test_each_image_is_tested_on_its_own_k(varied: TicketSet) -> None:
    from trainer.evaluate import by_length, on_tickets
    from trainer.families.patches import gather_patches
    from trainer.options import Dropping, Model
    from trainer.student import build_student

    model = Model(model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2})
    student = build_student(varied, model, Tickets(tokens=8), Dropping()).eval()
    rng = torch.Generator().manual_seed(0)
    patches, tokens = torch.randn(5, 16, 768, generator=rng), torch.tensor([4, 16, 4, 8, 16])
    rankings = torch.stack([torch.randperm(16, generator=rng) for _ in range(5)])
    with torch.no_grad():
        found = on_tickets(student, patches, rankings, by_length(tokens, patches.device))
        for i, k in enumerate(tokens.tolist()):
            keep = rankings[i : i + 1, :k]
            assert torch.allclose(found[i], student(gather_patches(patches[i : i + 1], keep), keep)[0], atol=1e-5)
        fixed = on_tickets(student, patches, rankings, [(8, None)])
    assert (fixed[0] - found[0]).abs().max() > 1e-4 and torch.allclose(fixed[3], found[3], atol=1e-5)


def test_photos_are_shown_on_as_many_patches_as_they_ask_for(varying: Path, photos: Path, tickets: Path) -> None:
    """The answers of the run's own validation on tickets, whose scores are in the set."""
    import pyarrow.parquet as pq

    output = varying.parent / "answers.csv"
    assert "auto:8" in predict(varying, photos / "val", "--method", "peaked", "-o", output).output
    assert "auto:8" not in predict(varying, photos / "val", "--method", "peaked", "--tokens", 8).output
    said = predict(varying, photos / "val", "--method", "center", code=1).output
    assert "do not say how many patches a photo needs" in said and "--tokens 8 takes as many of each" in said
    rows = [line.split(",") for line in output.read_text().splitlines()[1:]]
    answers = {row[0].rsplit("/", 1)[1].split(".")[0]: row[3] for row in rows if row[1] == "auto:8"}
    found = pq.read_table(varying / "predictions.parquet").to_pylist()
    names = TicketSet.open(str(tickets)).classes
    assert answers == {row["key"].rsplit("/", 1)[1]: names[row["tickets"]] for row in found} and len(answers) == 6


# --- compared


def test_the_verdict_shows_it_beside_a_fixed_k(varying: Path, tickets: Path, tmp_path: Path) -> None:
    from trainer.verdict.report import verdict

    shutil.copytree(varying, tmp_path / "auto")
    train(tickets, tmp_path, "fixed", *FLAGS, "--tokens", 8)
    train(tickets, tmp_path, "random", *FLAGS, "--tickets", "random")
    report = verdict([tmp_path / name for name in ("auto", "fixed", "random")])
    (judge,) = report.judges
    assert [(group.arm, group.tokens) for group in judge.groups] == [
        ("winning", 8),
        ("winning auto", 8),
        ("random auto", 8),
    ]
    text = report.tables(judge)[0].plain()
    assert "winning auto" in text and "random auto" in text
