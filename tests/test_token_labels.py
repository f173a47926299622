"""Token labels: the classifier's own head at every place, the same bytes however they are mined, read beside tickets."""

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_verify import edit_json, lines, refresh_tar

import miner.token_labels
from conftest import SELECTOR, contents, inspect, mine, write_image
from miner.token_labels import build_labeler, place_logits
from shards import format as fmt
from shards import token_labels
from shards.errors import TicketSetError
from shards.images import decode, render_pixels
from shards.keys import MAX_KEY_BYTES
from shards.reader import TicketSet
from shards.rows import Rows

pytestmark = pytest.mark.slow  # mines and trains sets of token labels

MODELS = {"test_resnet": {}, "test_nfnet": {}, "test_convnext": {}, "test_vit": {"global_pool": "avg"}}
CLASSES = 3  # of `photos`
NAMES = [str(number) for number in range(CLASSES)]


def classifier(name: str, num_classes: int = CLASSES, **kwargs: object) -> torch.nn.Module:
    """An untrained model whose head is sharp enough to tell places apart."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=num_classes, **kwargs).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("head.fc.weight", "head.weight")) or key == "fc.weight":
                weight.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME.safetensors of the convolutional MODELS, 3 classes; five.safetensors has 5."""
    root = tmp_path_factory.mktemp("classifiers")
    for name in ("test_resnet", "test_nfnet", "test_convnext"):
        save_file({k: v.contiguous() for k, v in classifier(name).state_dict().items()}, root / f"{name}.safetensors")
    save_file(dict(classifier("test_resnet", 5).state_dict()), root / "five.safetensors")
    return root


@pytest.fixture(scope="module")
def flags(folder: Path) -> list[object]:
    return ["--token-labels", "test_resnet", "--token-label-weights", folder / "test_resnet.safetensors"]


@pytest.fixture(scope="module")
def arguments(photos: Path, weights: Path, flags: list[object]) -> list[object]:
    """Tickets and token labels; view batches of 16, so image batches of 2, in shards of 6, 6, 6, 3 and 6 images."""
    words = ["--data", photos, "--selector", SELECTOR, "--weights", weights, "--views", 2, "--shard-size", 6, "-b", 16]
    return [*words, *flags]


@pytest.fixture(scope="module")
def reference(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labeled") / "set"
    mine(*arguments, "--out", out)
    return out


@pytest.fixture(scope="module")
def pair(center_set: Path, flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ is `center_set`, tickets/ a link of other tickets, labels/ a link of token labels alone."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(center_set, root / "base")
    link = ("--data", root / "base", "--images", "link")
    mine(*link, "--out", root / "tickets", "--method", "random")
    mine(*link, "--out", root / "labels", "--method", "none", *flags)
    return root


# --- what is stored


@pytest.mark.parametrize("name", MODELS)
def test_a_place_has_the_heads_answer(name: str) -> None:
    """The head over a map that looks everywhere like one place; of a linear head, places average to the model's logits."""
    size = 18 * (16 if "vit" in name else 32)
    kwargs = {"img_size": size} if "vit" in name else {}
    model = classifier(name, 7, **MODELS[name], **kwargs)
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        features = model.forward_features(images)
        logits = place_logits(model, features)
        assert logits.shape == (2, 18, 18, 7)
        alike = features.clone()
        if features.ndim == 3:
            alike[:, 1:] = features[:, 1 + 2 * 18 + 5, None]
        else:
            alike[:] = features[:, :, 2:3, 5:6]
        assert torch.allclose(model.forward_head(alike), logits[:, 2, 5], atol=1e-4)
        assert (logits[:, 2, 5] - logits[:, 5, 2]).abs().max() > 0.01  # rows and columns differ
        if name in ("test_resnet", "test_nfnet"):
            assert torch.allclose(model(images), logits.mean((1, 2)), atol=1e-4)


def test_a_set_holds_the_top_classes_of_its_whole_images(reference: Path, folder: Path) -> None:
    """Held against a plain forward of timm's model, place by place; images are 80 x 60, squashed to a square."""
    opened = TicketSet.open(str(reference))
    model = timm.create_model("test_resnet", num_classes=CLASSES, checkpoint_path=str(folder / "test_resnet.safetensors")).eval()  # fmt: skip
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[c]).view(3, 1, 1) for c in ("mean", "std"))
    for sample in opened.stream("val"):
        pixels = render_pixels(decode(sample.image), np.array([[0, 0, 60, 80, 0]]), 576)[0]
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        with torch.inference_mode():
            features = model.forward_features(image[None])[0]
            logits = torch.stack([model.fc(place) for place in features.flatten(1).T]).view(18, 18, CLASSES)
        found = sample.token_labels
        assert found.dtype == np.uint16 and found.shape == (2, 3, 18, 18)
        shares, order = logits.softmax(-1).sort(dim=-1, descending=True)
        assert np.abs(token_labels.probabilities(found) - shares.movedim(-1, 0).numpy()).max() < 2e-4
        sure = (shares[..., :-1] - shares[..., 1:]).min(-1).values > 1e-3  # elsewhere rounding may decide
        assert sure.float().mean() > 0.9
        assert (found[1] == order.movedim(-1, 0).numpy())[:, sure.numpy()].all()


def test_the_members_bytes() -> None:
    shares = np.array([[[0.75, 1.0]], [[0.25, 0.0]]], np.float32)  # T = 2, one row of two columns
    classes = np.array([[[1, 300]], [[0, 65535]]])
    data = token_labels.encode(shares, classes)
    assert b"'<u2', 'fortran_order': False, 'shape': (2, 2, 1, 2)" in data
    assert data[128:] == bytes.fromhex("ffbf ffff 0040 0000 0100 2c01 0000 ffff")
    found = token_labels.decode(data, (2, 2, 1, 2), 65536, "here")
    assert np.allclose(token_labels.probabilities(found), shares, atol=1e-5)
    assert len("x" * MAX_KEY_BYTES + "." + fmt.TOKEN_LABELS) <= 100


def test_equal_logits_go_to_the_lower_class() -> None:
    model = classifier("test_resnet", 6)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 1.0]))
    labeler = miner.token_labels.Labeler("x", model, 2, 64, (), (), torch.device("cpu"), False)
    shares, classes = labeler.label(torch.randn(1, 3, 64, 64))
    assert classes[0, :, 0, 0].tolist() == [1, 3, 0, 2, 4] and shares.shape == (1, 5, 2, 2)


def test_exif_frame_is_the_boxes(photos: Path, tmp_path: Path, flags: list[object]) -> None:
    """--exif apply: the map is of the upright image."""
    from PIL import Image

    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cat")):
            path = tmp_path / "data" / split / name / "a.jpg"
            write_image(path, number)
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by a quarter
            Image.open(path).save(path, exif=exif, quality=95)
    found = {}
    for exif in ("apply", "ignore"):
        out = tmp_path / exif
        mine("--data", tmp_path / "data", "--out", out, "--exif", exif, "--method", "center", "--views", 1, *flags)
        found[exif] = next(TicketSet.open(str(out)).stream("val"))
    sample = found["apply"]
    labeler = build_labeler("test_resnet", str(flags[3]), NAMES, "cpu", amp=False)
    pixels = render_pixels(decode(sample.image, "apply"), np.array([[0, 0, 80, 60, 0]]), 576)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (labeler.mean, labeler.std))
    shares, _ = labeler.label((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert np.abs(shares[0].numpy() - token_labels.probabilities(sample.token_labels)).max() < 2e-4
    assert (sample.token_labels != found["ignore"].token_labels).mean() > 0.1


@pytest.mark.parametrize("name", ["test_nfnet", "test_convnext"])
def test_other_models_mine_as_well(center_set: Path, tmp_path: Path, folder: Path, name: str) -> None:
    out, weights = tmp_path / "labels", folder / f"{name}.safetensors"
    link = ("--data", center_set, "--images", "link", "--method", "none", "--split", "val", "--out", out)
    assert f"18 x 18 places, by {name} at 576 px" in mine(*link, "--token-labels", name, "--token-label-weights", weights).output  # fmt: skip
    assert "sound" in inspect("verify", out, "--deep").output


def test_a_labeler_of_another_size_has_as_many_places_as_its_stride_gives(center_set, tmp_path, flags) -> None:
    out = tmp_path / "labels"
    link = ("--data", center_set, "--images", "link", "--method", "none", "--split", "val", "--out", out)
    assert "4 x 4 places, by test_resnet at 128 px" in mine(*link, *flags, "--token-label-size", 128).output
    assert json.loads((out / "plan.json").read_bytes())["common"]["token_labels"]["input_size"] == 128
    assert "sound" in inspect("verify", out, "--deep").output


# --- the format


def test_sets_without_token_labels_do_not_speak_of_them(center_set: Path) -> None:
    manifest = json.loads((center_set / "manifest.json").read_bytes())
    assert "token_labels" not in manifest and fmt.TOKEN_LABELS not in manifest["members"]
    assert "token_labels" not in json.loads((center_set / "plan.json").read_bytes())["common"]


def test_a_set_with_them_says_so(reference: Path) -> None:
    for name in ("manifest.json", "plan.json", "train-000000.json"):
        assert json.loads((reference / name).read_bytes())["format"] == [1, 3]
    manifest = json.loads((reference / "manifest.json").read_bytes())
    assert manifest["members"][fmt.TOKEN_LABELS] == {"dtype": "uint16", "shape": [2, 3, 18, 18]}
    said = manifest["token_labels"]
    assert (said["model"], said["input_size"], said["grid"], said["dtype"]) == ("test_resnet", 576, [18, 18], "float32")
    assert len(said["state"]) == 64 and said["batch_size"] == 2


def test_tickets_are_the_same_with_and_without(arguments: list[object], reference: Path, tmp_path: Path) -> None:
    mine(*arguments[:-4], "--out", tmp_path)
    plain = [(s.key, s.views.tobytes(), s.rankings.tobytes()) for s in TicketSet.open(str(tmp_path)).stream("train")]
    assert plain == [(s.key, s.views.tobytes(), s.rankings.tobytes()) for s in TicketSet.open(str(reference)).stream("train")]  # fmt: skip


def test_a_set_of_ranked_views_has_them_too(arguments: list[object], reference: Path, tmp_path: Path) -> None:
    """They are of the whole image, which is not kept; and they stand before the views."""
    mine(*arguments, "--out", tmp_path / "set", "--images", "ranked")
    assert "sound" in inspect("verify", tmp_path / "set", "--deep").output
    photos, views = (TicketSet.open(str(each)).stream("train") for each in (reference, tmp_path / "set"))
    for photo, ranked in zip(photos, views, strict=True):
        assert ranked.key == photo.key and np.array_equal(ranked.token_labels, photo.token_labels)
        assert ranked.render(1, 64).shape == (64, 64, 3)
    assert json.loads((tmp_path / "set/manifest.json").read_bytes())["format"] == [1, 3]


# --- the run


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(arguments: list[object], reference: Path, tmp_path: Path, workers: int) -> None:
    mine(*arguments, "--out", tmp_path, "-j", workers)
    assert contents(tmp_path) == contents(reference)


def test_a_resumed_run_gives_the_same_bytes(arguments: list[object], reference: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "set"))
    for name in ("manifest.json", "train-000001.json", "train-000003.tar", "train-000003.json"):
        (out / name).unlink()
    assert "resuming: 3 of 5" in mine(*arguments, "--out", out).output
    assert contents(out) == contents(reference)


def test_ranks_give_the_same_bytes(
    arguments: list[object], reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        mine(*arguments, "--out", tmp_path)
    assert contents(tmp_path) == contents(reference)


def test_batches_do_not_cross_shards(arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """27 images in shards of 6, 6, 6, 3 and 6 at two a batch: the only short batch is the fourth shard's last."""
    sizes = []
    real = miner.token_labels.Labeler.label

    def counting(self: object, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(images))
        return real(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(miner.token_labels.Labeler, "label", counting)
    mine(*arguments, "--out", tmp_path)
    assert sizes == [2] * 9 + [2, 1] + [2] * 3


def test_another_model_is_another_plan(arguments: list[object], reference: Path, tmp_path: Path, folder: Path) -> None:
    out = Path(shutil.copytree(reference, tmp_path / "set"))
    other = save_other(tmp_path)
    assert "token_labels.state: " in mine(*arguments, "--token-label-weights", other, "--out", out, code=1).output
    assert "token_labels: {" in mine(*arguments[:-4], "--out", out, code=1).output


def save_other(root: Path) -> Path:
    torch.manual_seed(2)
    save_file(dict(timm.create_model("test_resnet", num_classes=CLASSES).state_dict()), root / "other.safetensors")
    return root / "other.safetensors"


# --- links


def test_a_link_may_hold_token_labels_alone(pair: Path, center_set: Path) -> None:
    opened = TicketSet.open(str(pair / "labels"))
    assert set(opened.manifest.members) == {fmt.LABEL, fmt.TOKEN_LABELS} and opened.k == 0
    base = list(TicketSet.open(str(pair / "base")).stream("train"))
    for own, theirs in zip(opened.stream("train"), base, strict=True):
        assert (own.key, own.image, own.label) == (theirs.key, theirs.image, theirs.label)
        assert own.token_labels.shape == (2, 3, 18, 18) and own.tickets.shape == (3, 0)
    extra = sum(p.stat().st_size for p in (pair / "labels").glob("*.tar")) / 27
    assert extra < 8192
    for flag in ((), ("--deep",)):
        assert "sound" in inspect("verify", pair / "labels", *flag).output


def test_rows_join_tickets_and_labels_of_one_base(pair: Path) -> None:
    labels = TicketSet.open(str(pair / "labels"), images=False)
    expected = {s.key: s.token_labels for s in TicketSet.open(str(pair / "labels")).stream("train")}
    for name in ("base", "tickets"):
        opened = TicketSet.open(str(pair / name))
        rows = Rows(opened, "train", token_labels=labels)
        plain = Rows(opened, "train")
        assert len(rows) == len(plain) == 21 and rows.skipped == 0
        for position in np.random.default_rng(0).permutation(21).tolist():
            sample, without = rows.read(*rows.locate(position)), plain.read(*plain.locate(position))
            assert np.array_equal(sample.token_labels, expected[sample.key]) and without.token_labels is None
            assert (sample.rankings == without.rankings).all()
            assert rows.image_sizes[position].tolist() == list(decode(sample.image).shape[:2])
            assert (sample.key, sample.image, sample.label) == (without.key, without.image, without.label)


def test_labels_of_a_base_are_its_links_too(reference: Path, tmp_path: Path) -> None:
    mine("--data", reference, "--images", "link", "--method", "random", "--out", tmp_path / "link")
    opened = TicketSet.open(str(tmp_path / "link"))
    assert opened.manifest.token_labels is None
    base = {s.key: s.token_labels for s in TicketSet.open(str(reference)).stream("val")}
    assert all(np.array_equal(s.token_labels, base[s.key]) for s in opened.stream("val"))
    rows = Rows(opened, "val")
    assert all(np.array_equal(s.token_labels, base[s.key]) for s in (rows.read(0, i) for i in range(6)))
    assert "in " + str(reference) in inspect("info", tmp_path / "link").output


def test_a_sample_without_labels_is_skipped_and_counted(photos: Path, tmp_path: Path, flags: list[object]) -> None:
    """An image of the base that can no longer be read when the labels are mined."""
    mine("--data", photos, "--out", tmp_path / "base", "--method", "center", "--views", 1)
    opened = TicketSet.open(str(tmp_path / "base"))
    row = opened.table("val").to_pylist()[2]
    tar = tmp_path / "base" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    start = row["offset"] + 512 * 3  # the image, behind its label
    data[start : start + 400] = bytes(400)
    tar.write_bytes(data)
    link = ("--data", tmp_path / "base", "--images", "link", "--method", "none", "--out", tmp_path / "labels")
    mine(*link, *flags, "--max-failures", 0.5)
    labels = TicketSet.open(str(tmp_path / "labels"))
    rows = Rows(opened, "val", token_labels=labels)
    assert len(rows) == 5 and rows.skipped == 1 and row["key"] not in rows.keys.to_pylist()


@pytest.mark.parametrize("case", ["without", "another base", "alone"])
def test_what_rows_refuse(pair: Path, reference: Path, case: str) -> None:
    base, labels, other = (TicketSet.open(str(p)) for p in (pair / "base", pair / "labels", reference))
    if case == "without":
        with pytest.raises(TicketSetError, match="base: expected a set with token labels, got one without"):
            Rows(base, "train", token_labels=base)
    elif case == "another base":
        expected = f"images of set {other.base_id[:12]}, expected those of {base.base_id[:12]}"
        with pytest.raises(TicketSetError, match=expected):
            Rows(base, "train", token_labels=other)
    else:
        with pytest.raises(TicketSetError, match="expected a set with tickets, got one of token labels alone"):
            Rows(labels, "train")


# --- inspection


def test_info_and_show(reference: Path, pair: Path) -> None:
    assert re.search(r"token labels +top 3 at 18 x 18 places, test_resnet at 576 px", inspect("info", reference).output)
    output = inspect("info", pair / "labels").output
    assert "none: token labels alone" in output and "top 3 at 18 x 18" in output
    sample = next(TicketSet.open(str(reference)).stream("val"))
    best = token_labels.probabilities(sample.token_labels)[0, 9, 9]
    name = ("ant", "bee", "cat")[sample.token_labels[1, 0, 9, 9]]
    for folder in (reference, pair / "labels"):
        assert f"{name} {best:.3f}, " in inspect("show", folder, sample.key, "--split", "val").output
    content = json.loads(inspect("show", reference, sample.key, "--json").output)
    assert content["center_classes"][0] == [name, pytest.approx(best, abs=1e-4)]


def test_inspection_of_tickets_refuses_labels_alone(pair: Path, photos: Path, tmp_path: Path) -> None:
    labels = pair / "labels"
    key = TicketSet.open(str(labels)).ok_keys("val-000000")[0]
    for words in (
        ("sheet", labels, "-o", tmp_path / "a.png"),
        ("show", labels, key, "-o", tmp_path / "a.png"),
        ("stats", labels),
        ("explore", labels, "-o", tmp_path / "a.html"),
        ("explore", pair / "tickets", labels, "-o", tmp_path / "a.html"),
        ("diff", labels, pair / "tickets"),
        ("diff", pair / "tickets", labels),
        ("score", labels, "--masks", photos),
    ):
        line = inspect(*words, code=1).output
        assert line == f"Error: {labels}: expected a set with tickets, got one of token labels alone\n", words


# --- verify


@pytest.fixture
def damaged(pair: Path, tmp_path: Path) -> Path:
    shutil.copytree(pair / "base", tmp_path / "base")
    return Path(shutil.copytree(pair / "labels", tmp_path / "labels"))


def test_a_sound_copy_passes(damaged: Path) -> None:
    assert "sound" in lines(damaged, "--deep", code=0)


def damage(out: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change the first val sample's labels in place, and let JSON and manifest agree with the new tar."""
    tar = out / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x93NUMPY") + 128
    array = np.frombuffer(data, "<u2", 2 * 3 * 18 * 18, start).reshape(2, 3, 18, 18).copy()
    change(array)
    data[start : start + array.nbytes] = array.tobytes()
    tar.write_bytes(data)
    refresh_tar(out, "val-000000")


CHANGES: dict[str, Callable[[np.ndarray], object]] = {
    "expected classes below 3, got 9": lambda a: a.__setitem__((1, 2, 4, 5), 9),
    "a class stands twice": lambda a: a.__setitem__((1, slice(None), 4, 5), 1),
    "expected falling probabilities": lambda a: a.__setitem__((0, slice(None), 4, 5), (100, 200, 50)),
    "probabilities of a place sum to 1.5": lambda a: a.__setitem__((0, slice(None), 4, 5), (40000, 30000, 30000)),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_verify_finds_what_labels_cannot_be(damaged: Path, expected: str) -> None:
    damage(damaged, CHANGES[expected])
    assert re.search(rf"val-000000\.tar: \S+: token labels: .*{expected}", lines(damaged, "--deep"))


@pytest.mark.parametrize(
    "before, after", [(b"(2, 3, 18, 18)", b"(3, 2, 18, 18)"), (b"'<u2'", b"'<i2'"), (b".labels.npy", b".labelz.npy")]
)
def test_verify_finds_another_shape_dtype_or_name(damaged: Path, before: bytes, after: bytes) -> None:
    tar = damaged / "val-000000.tar"
    data = tar.read_bytes().replace(before, after, 1)
    if b"label" in before:  # a tar header has a checksum
        at = data.index(after) // 512 * 512
        header = data[at : at + 512]
        total = sum(header[:148]) + 8 * 32 + sum(header[156:])
        data = data[: at + 148] + b"%06o\0 " % total + data[at + 156 :]
    tar.write_bytes(data)
    refresh_tar(damaged, "val-000000")
    assert re.search(r"val-000000\.tar: \S+: expected token labels", lines(damaged, "--deep"))


def test_verify_holds_the_manifest_against_the_plan(damaged: Path) -> None:
    numbers = itertools.count()

    def refresh(change: Callable[[dict], object]) -> str:
        folder = damaged.parent / f"changed-{next(numbers)}"
        shutil.copytree(damaged, folder)

        def edit(manifest: dict) -> None:
            change(manifest)
            manifest["digest"] = fmt.manifest_digest(manifest)

        edit_json(folder / "manifest.json", edit)
        return lines(folder)

    wrong = refresh(lambda m: m["members"][fmt.TOKEN_LABELS].update(shape=[2, 4, 18, 18]))
    assert "labels.npy: shape: expected [2, 3, 18, 18], got [2, 4, 18, 18]" in wrong
    assert "members have token labels, or lack them" in refresh(lambda m: m["members"].pop(fmt.TOKEN_LABELS))
    assert "token labels without their model" in refresh(lambda m: m.pop("token_labels"))
    assert "expected one above 0 where there are rankings" in refresh(lambda m: m["members"].update({fmt.RANKING: {}}))


# --- refusals


def refused(*words: object, code: int = 1) -> str:
    output = mine(*words, code=code).output
    assert code == 2 or output.startswith("Error: ") and output.count("\n") == 1, output
    return output


def test_the_models_classes_must_be_the_sets(photos: Path, tmp_path: Path, folder: Path) -> None:
    words = ("--data", photos, "--out", tmp_path / "x", "--method", "center", "--token-labels", "test_resnet")
    line = refused(*words, "--token-label-weights", folder / "five.safetensors")
    assert "five.safetensors: expected a classifier of the set's 3 classes, got one of 5" in line
    assert not (tmp_path / "x").exists()


def test_pretrained_weights_of_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm would draw a fresh classifier for 3 classes; its labels would mean nothing."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: real(name, **kwargs))
    with pytest.raises(
        TicketSetError, match="test_resnet: expected a classifier of the set's 3 classes, got one of 1000"
    ):
        build_labeler("test_resnet", None, NAMES[:3], "cpu", amp=False)


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("test_vit", {}),  # class token
        ("test_vit", {"global_pool": "max"}),
        ("test_vit", {"global_pool": "map", "class_token": False}),
        ("test_vit", {"global_pool": "avg", "pool_include_prefix": True}),
        ("test_resnet", {"global_pool": "max"}),
        ("test_resnet", {"global_pool": "avgmax"}),
    ],
)
def test_a_head_that_is_no_mean_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, kwargs: dict) -> None:
    size = {"img_size": 64} if "vit" in name else {}
    model = classifier(name, **kwargs, **size)
    monkeypatch.setattr("miner.models.build_classifier", lambda *_: (model, 64))
    with pytest.raises(TicketSetError, match=f"`token_labels` {name}: expected a classifier with a head over the mean"):
        build_labeler(name, None, NAMES, "cpu", amp=False)


def test_a_head_that_is_a_mean_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kwargs in MODELS.items():
        size = {"img_size": 64} if "vit" in name else {}
        model = classifier(name, **kwargs, **size)
        monkeypatch.setattr("miner.models.build_classifier", lambda *_, model=model: (model, 64))
        labeler = build_labeler(name, None, NAMES, "cpu", amp=False)
        assert labeler.side == (4 if "vit" in name else 2)
        shares, classes = dataclasses.replace(labeler, amp=True).label(torch.randn(1, 3, 64, 64))
        assert shares.dtype == torch.float32 and classes.shape == (1, 3, labeler.side, labeler.side)


def test_bad_words_are_refused_in_one_line(center_set: Path, photos: Path, tmp_path: Path, flags: list[object]) -> None:
    link = ("--data", center_set, "--images", "link", "--out", tmp_path / "x")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    for words, expected in [
        ((*link, "--method", "none"), "expected --token-labels and --images link"),
        (("--data", center_set, "--out", tmp_path / "x", "--method", "none", *flags), "expected --token-labels and --images link"),
        ((*link, "--method", "none", *flags, "--tokens", 4), "--tokens: --method none mines no tickets"),
        ((*link, "--method", "none", *flags, "--keep-rate", 0.5), "--keep-rate: --method none mines no tickets"),
        ((*link, "--method", "none", *flags, "--weights", "w.pth"), "--weights: --method none uses no model"),
        ((*link, "--method", "random", "--amp"), "--amp: --method random uses no model"),
        ((*link, "--method", "none", "--token-labels", "test_resnett"), "expected a timm model"),
        ((*link, "--method", "none", "--token-labels", "test_resnet", "--token-label-weights", tmp_path / "none.pth"), "no such file"),
        ((*link, "--method", "none", "--token-labels", "test_resnet", "--token-label-weights", tmp_path / "bad.pth"), "not a loadable checkpoint"),
        ((*link, "--method", "none", "--token-labels", "test_nfnet", "--token-label-weights", flags[3]), "expected a classifier"),
    ]:  # fmt: skip
        assert expected in refused(*words), words
    assert not (tmp_path / "x").exists()
    for name, value in (("--token-label-weights", "w.pth"), ("--token-label-size", 96)):
        assert f"{name}: expected --token-labels NAME" in refused(*link, name, value, code=2)
    small = refused(*link, "--method", "none", *flags, "--token-label-size", 32)  # one place is no map
    assert "over the mean of a square feature map" in small


def test_unlabeled_images_have_no_classes(photos: Path, tmp_path: Path, flags: list[object]) -> None:
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((photos / "val").rglob("*.*"))):
        shutil.copy(path, tmp_path / "flat" / f"{i}{path.suffix}")
    line = refused("--data", tmp_path / "flat", "--out", tmp_path / "x", "--method", "center", *flags)
    assert "expected a set of 2 to 65536 classes, got 0" in line


def test_weights_with_nan_stop_the_run(center_set: Path, tmp_path: Path) -> None:
    model = classifier("test_resnet")
    model.layer4[0].conv1.weight.data[0] = float("nan")
    save_file(dict(model.state_dict()), tmp_path / "nan.safetensors")
    link = ("--data", center_set, "--images", "link", "--method", "none", "--out", tmp_path / "x")
    words = (*link, "--token-labels", "test_resnet", "--token-label-weights", tmp_path / "nan.safetensors")
    assert "Error: --token-labels: expected finite probabilities, got 972" in mine(*words, code=1).output
