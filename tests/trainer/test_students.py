"""What a run leaves: answers that its accuracies are of, a student for plain timm, classes in whatever order a set has them."""

import csv
import io
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

import trainer.families.lvvit_model  # noqa: F401  plain timm knows LV-ViT after it
from conftest import long, mine
from miner.models import in_class_order
from miner.token_labels import build_labeler
from shards.errors import TicketSetError
from shards.reader import TicketSet
from trainer.cli import main
from trainer.evaluate import best_classes, figures
from trainer.verdict.cli import main as verdict
from training import predict, same, train, weights_of

pytestmark = pytest.mark.slow  # trains and judges students of every family

# Flags of tiny models, and the patches that their tickets are of.
SWIN = ["--model", "swin_tiny_patch4_window7_224", "--drop-path", 0, "--model-kwargs", "embed_dim=12",
        "--model-kwargs", "depths=(1, 1, 1, 1)", "--model-kwargs", "num_heads=(1, 1, 2, 2)"]  # fmt: skip
LVVIT = ["--model", "lvvit_t", "--drop-path", 0, "--model-kwargs", "embed_dim=24", "--model-kwargs", "depth=2",
         "--model-kwargs", "num_heads=2", "--model-kwargs", "stem_width=8"]  # fmt: skip
HIERA = ["--model", "hiera_tiny_224", "--drop-path", 0, "--model-kwargs", "embed_dim=24", "--model-kwargs",
         "num_heads=1", "--model-kwargs", "stages=(1, 1, 2, 1)"]  # fmt: skip
VIT = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "embed_dim=32", "--model-kwargs", "depth=2",
       "--model-kwargs", "num_heads=2"]  # fmt: skip
FAMILIES = {
    "vit": (VIT, (64, 16)),
    "vit of 8 px": ([*VIT[:2], *VIT[2:], "--model-kwargs", "patch_size=8"], (64, 8)),
    "vit of 96 px": (VIT, (96, 16)),
    "patches of 14 px": (["--model", "vit_small_patch14_reg4_dinov2", *VIT[2:]], (64, 16)),  # as views of 56 px
    "rotary, patches of 14 px": (["--model", "eva02_tiny_patch14_224", *VIT[2:]], (64, 16)),
    "resized": ([*VIT, "--resize-to-tokens", "--tokens", 9], (64, 16)),
    "selector": ([*VIT, "--tickets", "full", "--drop-blocks", "0,1"], (64, 16)),
    "swin": ([*SWIN, "--feed", "small-dense"], (64, 16)),
    "swin zero": ([*SWIN, "--feed", "zero"], (64, 16)),
    "lvvit late": (LVVIT, (64, 16)),
    "lvvit early": ([*LVVIT, "--feed", "early"], (64, 16)),
    "hiera": (HIERA, (96, 32)),
    "cnn": (["--model", "test_resnet", "--drop-path", 0], (64, 16)),
}
COLORS = ["red", "lime", "blue", "yellow", "cyan", "magenta", "white", "black", "orange"]
NAMES = [f"{place} of 9" for place in range(9)]


def write_spots(root: Path, split: str, counts: list[int]) -> None:
    """Pictures of 9 classes: which of 3 x 3 places in the middle is bright."""
    rng = np.random.default_rng(len(split))
    for place, (name, count) in enumerate(zip(NAMES, counts, strict=True)):
        (root / split / name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(rng.integers(0, 120, (6, 8, 3), np.uint8)).resize(
                (160, 120), Image.Resampling.BICUBIC
            )
            image.paste(COLORS[place], (x := 34 + 32 * (place % 3), y := 14 + 32 * (place // 3), x + 28, y + 28))
            image.save(root / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def spots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spots")
    write_spots(root, "train", [6] * 9)
    write_spots(root, "val", [4] + [2] * 8)  # the first class has more
    return root


@pytest.fixture(scope="module")
def sets(spots: Path, tmp_path_factory: pytest.TempPathFactory):
    """The set of a size and patch, mined when it is asked for: 4 patches where there are 9, else 9."""
    root = tmp_path_factory.mktemp("sets")

    def of(size: int, patch: int) -> Path:
        out = root / f"{size}-{patch}"
        tokens = 4 if size // patch == 3 else 9
        if not out.exists():
            mine("--data", spots, "--out", out, "--method", "center", "--views", 1, "--tokens", tokens,
                 "--img-size", size, "--patch-size", patch)  # fmt: skip
        return out

    return of


def test_equal_logits_have_one_ranking_for_answers_and_accuracies():
    """bfloat16 of 1000 classes: 24 of 2000 rows had another first class in topk than in argmax."""
    logits = torch.zeros(3, 1000)
    logits[0, [999, 7, 500]] = 2.0
    logits[1, 3:10] = 1.0  # seven share the first five places
    ranked = best_classes(logits)
    assert ranked.tolist() == [[7, 500, 999, 0, 1], [3, 4, 5, 6, 7], [0, 1, 2, 3, 4]]
    for label, top1, top5 in ((7, 1, 2), (999, 0, 1), (8, 0, 0), (0, 1, 2), (5, 0, 1)):
        found = figures(logits, ranked, torch.full((3,), label))
        hits = [row.index(label) if label in row else None for row in ranked.tolist()]
        assert found[0] == hits.count(0) and found[1] == 3 - hits.count(None), label
        assert (found[0] > 0) == bool(top1) and (found[1] > 0) == bool(top5)
    random = torch.randn(400, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert torch.equal(best_classes(random)[:, 0], torch.from_numpy(random.numpy().argmax(1)))
    assert best_classes(torch.tensor([[1.0, 2.0]])).tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "family",
    ["vit", "swin", "lvvit early", *(long(f) for f in ("swin zero", "lvvit late", "hiera", "cnn"))],
)
def test_half_precision_runs_go_through_the_verdict(sets, tmp_path, monkeypatch, family):
    """Every logit the same, as bfloat16 makes some of them: the answer is the first class, 4 of 20 images."""
    from trainer import trainer as run

    build = run.build_student

    def blank(*arguments):
        student = build(*arguments)
        classifiers = student.model.pretrained_cfg["classifier"]
        for name in [classifiers] if isinstance(classifiers, str) else classifiers:
            for parameter in student.model.get_submodule(name).parameters():
                torch.nn.init.zeros_(parameter)
        return student

    monkeypatch.setattr(run, "build_student", blank)
    flags, size = FAMILIES[family]
    half = ["--amp", "--amp-dtype", "bfloat16", "--repeats", 1, "--epochs", 1, "-b", 18, "--lr", 0, "--warmup-lr", 0]
    train(sets(*size), tmp_path, "run", *flags, *half, "--min-lr", 0, plain=True)
    results = json.loads((tmp_path / "run/final.json").read_text())["results"]
    assert {name: figures["top1"] for name, figures in results.items()} == dict.fromkeys(results, 20.0)
    judged = CliRunner().invoke(verdict, [str(tmp_path / "run")])
    assert judged.exit_code == 0, judged.output


def shown(run: Path, opened: TicketSet) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """By plain timm: the student, view 0 of each image as it is, the original images as timm prepares them; labels."""
    model = timm.create_model(f"local-dir:{run}", checkpoint_path=run / "model_best.safetensors").eval()
    config = timm.data.resolve_model_data_config(model)
    prepare = timm.data.create_transform(**config)
    samples = list(opened.stream("val"))
    views = [s.render(0, config["input_size"][1]) for s in samples]
    exact = torch.stack([prepare.transforms[-1](torch.from_numpy(view).permute(2, 0, 1) / 255) for view in views])
    theirs = torch.stack([prepare(Image.open(io.BytesIO(s.image)).convert("RGB")) for s in samples])
    return model, exact, theirs, torch.tensor([s.label for s in samples])


STEADY = ["--repeats", 1, "--mixup", 0, "--cutmix", 0, "--aa", "", "--color-jitter", 0, "--reprob", 0]


@pytest.mark.parametrize(
    "family",
    [
        "vit of 8 px",
        "vit of 96 px",
        "patches of 14 px",
        "rotary, patches of 14 px",
        "resized",
        "selector",
        "swin",
        "lvvit early",
        "hiera",
        "cnn",
    ],
)
def test_plain_timm_rebuilds_the_student_and_shows_it_what_it_was_tested_on(sets, tmp_path, family):
    """The loss on all patches tells every weight, the size, the crop and the normalisation."""
    flags, size = FAMILIES[family]
    train(
        sets(*size),
        tmp_path,
        "run",
        *flags,
        *STEADY,
        "--epochs",
        1,
        "-b",
        18,
        "--lr",
        0.01,
        "--warmup-epochs",
        0,
        plain=True,
    )
    reported = json.loads((tmp_path / "run/final.json").read_text())["results"]["all"]["loss"]
    model, exact, theirs, labels = shown(tmp_path / "run", TicketSet.open(str(sets(*size))))
    loss = torch.nn.functional.cross_entropy
    with torch.inference_mode():
        assert loss(model(exact), labels).item() == pytest.approx(reported, abs=1e-5)
        # timm resizes before it crops, which moves pixels by a fraction of one.
        assert loss(model(theirs), labels).item() == pytest.approx(reported, abs=0.03)
    assert (exact - theirs).abs().mean() < 0.1
    assert model.pretrained_cfg["label_names"] == NAMES


@pytest.mark.parametrize("family", ["vit of 8 px", "vit of 96 px", "swin", "swin zero", "lvvit late", "hiera", "cnn"])
def test_predict_shows_a_student_the_tickets_that_it_was_tested_on(sets, spots, tmp_path, family):
    """The loss tells every probability; tickets come from the photos, by the selector of the set."""
    flags, size = FAMILIES[family]
    more = ["--epochs", 1, "-b", 18, "--lr", 0.01, "--warmup-epochs", 0]
    train(sets(*size), tmp_path, "run", *flags, *STEADY, *more, plain=True)
    reported = json.loads((tmp_path / "run/final.json").read_text())["results"]
    tokens = TicketSet.open(str(sets(*size))).k
    found = losses(tmp_path / "run", spots / "val", tmp_path / "found.csv", "--method", "center")
    assert found[f"{tokens}"] == pytest.approx(reported["tickets"]["loss"], abs=1e-5)
    assert found["all"] == pytest.approx(reported["all"]["loss"], abs=0.03)
    assert abs(reported["tickets"]["loss"] - reported["all"]["loss"]) > 1e-3  # so that one cannot stand for the other
    if family == "swin":  # a smaller image of as many patches is another model
        output = predict(tmp_path / "run", spots / "val", "--method", "center", "--tokens", 4, code=1).output
        assert "--tokens 4: expected 9, what this model was built for" in output


def losses(run: Path, photos: Path, output: Path, *flags: object) -> dict[str, float]:
    """Mean cross-entropy of what datalth-predict says of photos in class folders, by the patches that were shown."""
    predict(run, photos, "--top", 99, "-o", output, *flags)
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(output.read_text().splitlines()):
        if row["label"] == Path(row["file"]).parent.name:
            found.setdefault(row["patches"], []).append(-math.log(float(row["probability"])))
    return {patches: float(np.mean(values)) for patches, values in found.items()}


def test_predict_reaches_the_reported_accuracy_on_the_original_images(learnt, spots, tmp_path):
    predict(learnt, spots / "val", "-o", tmp_path / "found.csv")
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    hits = [row["label"] == Path(row["file"]).parent.name for row in rows]
    assert len(hits) == 20 and best_of(learnt) >= 50 and abs(100 * np.mean(hits) - best_of(learnt)) <= 1


@pytest.fixture(scope="module")
def learnt(sets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt most of the classes."""
    output = tmp_path_factory.mktemp("learnt")
    more = ["--tickets", "full", "--epochs", 4, "-b", 6, "--lr", 4e-3, "--smoothing", 0]
    train(sets(64, 16), output, "run", *FAMILIES["cnn"][0], *STEADY, *more, plain=True)
    return output / "run"


def best_of(run: Path) -> float:
    """The best top-1 on all patches: that of the saved weights."""
    rows = csv.DictReader((run / "summary.csv").read_text().splitlines())
    return max(float(row["eval_all_top1"]) for row in rows)


def test_plain_timm_reaches_the_reported_accuracy_on_the_original_images(sets, learnt):
    model, _, theirs, labels = shown(learnt, TicketSet.open(str(sets(64, 16))))
    with torch.inference_mode():
        found = 100 * (model(theirs).argmax(1) == labels).double().mean().item()
    assert best_of(learnt) >= 50 and abs(found - best_of(learnt)) <= 1
    # timm finds the weights by itself, before it would take the other checkpoints of the folder.
    assert same(timm.create_model(f"local-dir:{learnt}", pretrained=True).state_dict(), model.state_dict())


@pytest.fixture
def renamed(spots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Mine the same images with their classes in another order, or under other names."""
    from miner import run

    def of(names: list[str]) -> Path:
        def other(*arguments, **flags):
            source = open_source(*arguments, **flags)
            to = np.array([names.index(name) if name in names else i for i, name in enumerate(source.classes)])
            splits = {}
            for split, table in source.splits.items():
                labels = pa.array(to[table["label"].to_numpy()], table.schema.field("label").type)
                splits[split] = table.set_column(table.column_names.index("label"), "label", labels)
            return replace(source, classes=names, splits=splits)

        open_source = run.open_source
        with monkeypatch.context() as patch:
            patch.setattr(run, "open_source", other)
            mine("--data", spots, "--out", tmp_path / "set", "--method", "center", "--views", 1, "--tokens", 9)
        return tmp_path / "set"

    return of


def test_classes_in_another_order_are_mapped_by_their_names(learnt, renamed, tmp_path):
    """9 of 9 right became 1 of 9: the weights' own order was taken for the set's."""
    order = [NAMES[place] for place in (4, 0, 8, 1, 7, 2, 6, 3, 5)]
    other = renamed(order)
    assert TicketSet.open(str(other)).classes == order
    cnn = ["--model", "test_resnet", "-j", "0"]
    for source in (["--initial-checkpoint", learnt / "model_best.safetensors"],
                   ["--initial-checkpoint", learnt / "model_best.pth.tar"],
                   ["--resume", learnt / "model_best.pth.tar"]):  # fmt: skip
        done = CliRunner().invoke(main, ["--shards", str(other), *cnn, "--eval", *map(str, source)])
        assert done.exit_code == 0, done.output
        line = next(line for line in done.output.splitlines() if line.startswith("all "))
        assert float(line.split()[2]) == pytest.approx(best_of(learnt), abs=0.01), source
    still = ["--lr", 0, "--warmup-lr", 0, "--min-lr", 0, "--epochs", 1, *STEADY]
    flags = ["--initial-checkpoint", learnt / "model_best.safetensors", *FAMILIES["cnn"][0], *still]
    train(other, tmp_path, "again", *flags, plain=True)
    head = load_file(learnt / "model_best.safetensors")["fc.weight"]
    assert torch.equal(weights_of(tmp_path / "again")["fc.weight"], head[[4, 0, 8, 1, 7, 2, 6, 3, 5]])


def test_other_classes_take_no_head_from_a_checkpoint_though_they_are_as_many(learnt, renamed, tmp_path):
    other = renamed([*NAMES[:8], "another"])
    flags = ["--shards", str(other), "--model", "test_resnet", "-j", "0", "--drop-path", "0", "--eval"]
    for source, said in ((["--initial-checkpoint", learnt / "model_best.safetensors"], "has no trained fc.weight"),
                         (["--resume", learnt], "trained on other classes (9, from 0 of 9) than the set's")):  # fmt: skip
        refused = CliRunner().invoke(main, [*flags, *map(str, source)])
        assert refused.exit_code == 1 and said in refused.output, refused.output
    start = ["--initial-checkpoint", learnt / "model_best.safetensors", *FAMILIES["cnn"][0], *STEADY, "--epochs", 1]
    output = train(other, tmp_path, "again", *start, plain=True).output
    assert "fc.weight, fc.bias start anew" in output


def test_both_heads_of_a_model_change_their_order(tmp_path):
    model = timm.create_model("lvvit_t", num_classes=3, img_size=32, embed_dim=24, depth=1, num_heads=2)
    state = model.state_dict()
    turned = in_class_order(model, state, ["a", "b", "c"], ["c", "a", "b"])
    for name, tensor in state.items():
        moved = name.startswith(("head.", "aux_head."))
        assert torch.equal(turned[name], tensor[[2, 0, 1]] if moved else tensor), name
    assert state.keys() - in_class_order(model, state, ["a", "b", "c"], ["a", "b", "d"]).keys() == {
        "head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}  # fmt: skip


def test_a_labeler_answers_in_the_order_of_the_sets_classes(learnt):
    build = partial(
        build_labeler, "test_resnet", str(learnt / "model_best.safetensors"), device="cpu", amp=False, size=96
    )
    head = load_file(learnt / "model_best.safetensors")["fc.weight"]
    assert torch.equal(build(classes=NAMES[::-1]).model.fc.weight, head.flip(0))
    with pytest.raises(TicketSetError, match="expected a classifier of the set's classes"):
        build(classes=[*NAMES[:8], "another"])
