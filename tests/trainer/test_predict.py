"""datalth-predict: what it says of photos, what of folders it leaves out, what it refuses."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from conftest import SELECTOR, write_image
from trainer.predict import cli
from training import predict, train

pytestmark = pytest.mark.slow  # trains a student


@pytest.fixture(scope="module")
def run(tickets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, so that the best one is the last, which final.json is of."""
    output = tmp_path_factory.mktemp("output")
    train(tickets, output, "run", "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.005)
    return output / "run"


def rows_of(run: Path, *flags: object, output: Path, code: int = 0) -> list[dict[str, str]]:
    predict(run, *flags, "-o", output, code=code)
    return list(csv.DictReader(output.read_text(encoding="utf-8").splitlines()))


def test_probabilities_are_those_of_plain_timm(run, photos, tmp_path):
    rows = rows_of(run, photos / "val", "--top", 3, "-b", 4, output=tmp_path / "a.csv")
    paths = sorted((photos / "val").rglob("*.*"))
    assert [row["file"] for row in rows[::3]] == [*map(str, paths)]
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    model = timm.create_model(f"local-dir:{run}", checkpoint_path=run / "model_best.safetensors").eval()
    view = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        shares = model(torch.stack([view(Image.open(path).convert("RGB")) for path in paths])).softmax(1)
    names = model.pretrained_cfg["label_names"]
    for row in rows:
        expected = shares[paths.index(Path(row["file"])), names.index(row["label"])].item()
        assert float(row["probability"]) == pytest.approx(expected, abs=2e-6)
    assert {row["patches"] for row in rows} == {"all"} and all(not row["error"] for row in rows)


@pytest.mark.parametrize("patch", [16, 8], ids=["patches of the set", "half as large, at half the size"])
def test_tickets_are_those_of_the_runs_own_validation(run, tickets, photos, weights, tmp_path, patch):
    """Mined by the same selector, with the run's K: the answers and the loss that the run has logged."""
    if patch != 16:
        small = ["--model-kwargs", f"patch_size={patch}", "--epochs", 1, "--warmup-epochs", 0, "--lr", 0.005]
        train(tickets, tmp_path, "other", *small)
        run = tmp_path / "other"
        assert json.loads((run / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 32, 32]
    picked = ["--tickets", SELECTOR, "--weights", weights]
    rows = rows_of(run, photos / "val", "--top", 3, *picked, output=tmp_path / "a.csv")
    on_tickets = [row for row in rows if row["patches"] == "8"]
    likeliest = {
        f"val/{Path(row['file']).parent.name}/{Path(row['file']).stem}": row["label"] for row in on_tickets[::3]
    }
    table = pq.read_table(run / "predictions.parquet")
    names = ["ant", "bee", "cat"]
    assert likeliest == {
        k: names[n] for k, n in zip(table["key"].to_pylist(), table["tickets"].to_pylist(), strict=True)
    }
    own = [float(row["probability"]) for row in on_tickets if row["label"] == Path(row["file"]).parent.name]
    reported = json.loads((run / "final.json").read_text())["results"]["tickets"]["loss"]
    assert len(own) == 6 and -np.log(own).mean() == pytest.approx(reported, abs=1e-5)
    said = predict(run, photos / "val", *picked, "--tokens", 5)
    assert "on tickets the class is the same as on all patches for " in said.stderr and " of 6 photos" in said.stderr
    head, first, second, *_ = said.stdout.splitlines()
    assert head.split() == ["file", "patches", "label", "probability"]
    assert first.split()[1] == "all" and second.split()[1] == "5"


def test_folders_are_walked_as_mining_walks_them(run, tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(["img10.jpg", "img2.jpg", "below/deep/one.PNG", "train/a.png", ".hidden/b.png"]):
        write_image(folder / name, number)
    (folder / "below" / "notes.txt").write_text("no photo")
    (folder / "Thumbs.db").write_bytes(b"")
    os.symlink(folder, folder / "again")
    shutil.copy(folder / "img2.jpg", tmp_path / "copy.data")  # named by itself, it need not end as a photo
    result = predict(run, tmp_path / "copy.data", folder, folder / "img10.jpg", "-o", tmp_path / "a.csv")
    rows = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    expected = ["below/deep/one.PNG", "img2.jpg", "img10.jpg", "train/a.png"]
    assert [row["file"] for row in rows] == [f"{tmp_path}/copy.data", *(f"{folder}/{name}" for name in expected)]
    for note in (".txt 1", "2 hidden or system files", "1 links to folders are not followed"):
        assert note in result.stderr


def test_a_photo_that_cannot_be_read_is_a_row_and_the_exit_code(run, photos, tmp_path):
    folder = shutil.copytree(photos / "val" / "ant", tmp_path / "photos")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    os.symlink("nowhere", folder / "lost.png")
    result = predict(run, folder, "-o", tmp_path / "a.csv", "-b", 1, code=1)
    good_1, good_2, bad, lost = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert good_1["label"] and good_2["label"] and not bad["label"] and not lost["probability"]
    assert "not an image" in bad["error"] and lost["error"] == "cannot be read: No such file or directory"
    assert "2 of 4 photos have no class (first: " in result.stderr and "not an image" in result.stdout
    (folder / "ant_0.jpg").unlink(), (folder / "ant_1.jpg").unlink()
    assert "2 of 2 photos have no class" in predict(run, folder, "--method", "center", code=1).stderr


def test_odd_pixels_and_orientation_are_read_as_mining_reads_them(run, tmp_path):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (4, 5, 3), np.uint8))
    image = small.resize((80, 60), Image.Resampling.BICUBIC).quantize(32).convert("RGB")
    folder = tmp_path / "photos"
    folder.mkdir()
    image.save(folder / "plain.png")
    image.quantize(32).save(folder / "palette.png")
    image.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    gray = np.asarray(image.convert("L"))
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 256).save(folder / "gray16.png")

    def found(run: Path) -> dict[str, list[tuple[str, str]]]:
        shares: dict[str, list[tuple[str, str]]] = {}
        for row in rows_of(run, folder, "--top", 3, output=tmp_path / "a.csv"):
            shares.setdefault(Path(row["file"]).stem, []).append((row["label"], row["probability"]))
        return shares

    ignored = found(run)
    assert ignored["plain"] == ignored["palette"] == ignored["alpha"] and ignored["gray"] == ignored["gray16"]
    assert ignored["turned"] != ignored["plain"]
    upright = shutil.copytree(run, tmp_path / "upright")
    edit(upright, lambda config: config["views"].update(exif="apply"))
    applied = found(upright)
    assert applied["turned"] == applied["plain"] == ignored["plain"]


def edit(run: Path, change) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))


def test_a_model_of_another_folder_is_refused(run, photos, tmp_path):
    stranger = shutil.copytree(run, tmp_path / "stranger")
    edit(stranger, lambda config: config.update(architecture=f"local-dir:{run}"))
    assert "config.json: architecture: expected the name of a timm model" in predict(stranger, photos, code=1).stderr
    (stranger / "config.json").unlink()
    assert "whose first tested epoch is over, found no config.json" in predict(stranger, photos, code=1).stderr
    said = predict(run, photos, "--tickets", f"local-dir:{stranger}", code=1).stderr
    assert "expected the folder of a run with its config.json, found none" in said


def test_a_run_of_an_older_version_predicts_but_has_no_tickets(run, photos, tmp_path):
    older = shutil.copytree(run, tmp_path / "older")
    edit(older, lambda config: config.pop("views"))
    assert rows_of(older, photos, output=tmp_path / "a.csv") == rows_of(run, photos, output=tmp_path / "b.csv")
    assert "--tickets: this run does not say" in predict(older, photos, "--method", "center", code=1).stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(architecture="hf-hub:somebody/model"), "architecture: expected the name of a timm model, got hf-hub:somebody/model"),
        (lambda c: c["model_args"].update(checkpoint_path="/etc/passwd"), "expected arguments of a model, got checkpoint_path"),
        (lambda c: c["model_args"].update(depth=3), "model_best.safetensors: do not fit VisionTransformer of depth 3"),
        (lambda c: c["label_names"].append("dog"), "expected a classifier of the 4 classes of config.json, got 3"),
        (lambda c: c["pretrained_cfg"].update(crop_pct=0), "crop_pct: expected a number from 0.01 to 1, got 0"),
        (lambda c: c["views"].update(exif="perhaps"), "exif: expected one of ignore, apply"),
        (lambda c: c.pop("label_names"), "lacks the field 'label_names'"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_itself_is_refused_in_a_line(run, photos, tmp_path, change, says):
    copy = shutil.copytree(run, tmp_path / "run")
    edit(copy, change)
    result = predict(copy, photos, code=1)
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


def test_what_is_missing_is_named(run, photos, tmp_path):
    assert "expected the folder of a run" in predict(tmp_path, photos, code=1).stderr
    assert "none: expected a photo or a folder" in predict(run, tmp_path / "none", code=1).stderr
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    stderr = predict(run, tmp_path / "empty", code=1).stderr
    assert "empty: expected photos, found none (" in stderr and ".txt 1)" in stderr
    assert "expected a file that ends in .csv" in predict(run, photos, "-o", tmp_path / "a.json", code=2).stderr
    copy = shutil.copytree(run, tmp_path / "run")
    best = copy / "model_best.safetensors"
    data = bytearray(best.read_bytes())
    data[-1] ^= 1
    best.write_bytes(data)
    assert "model_best.safetensors: damaged" in predict(copy, photos, code=1).stderr
    best.unlink()
    assert "found no model_best.safetensors" in predict(copy, photos, code=1).stderr


def test_a_run_on_resized_views_has_no_tickets(tickets, photos, tmp_path):
    train(tickets, tmp_path, "run", "--resize-to-tokens", "--tokens", 9, "--epochs", 1, "--warmup-epochs", 0)
    assert "resized" not in predict(tmp_path / "run", photos / "val").output
    output = predict(tmp_path / "run", photos, "--method", "center", code=1).output
    assert "--tickets: this run was trained on whole views at a smaller size" in output


def test_a_long_wait_is_told_in_lines_elsewhere_than_on_a_terminal(run, photos, monkeypatch):
    monkeypatch.setattr(cli, "LOG_SECONDS", -1)
    said = predict(run, photos / "train", "-b", 10).stderr.splitlines()
    assert [line.partition(" ")[0] for line in said] == ["10/21", "20/21", "21/21"]
    assert all("photos/s" in line or "s/photo" in line for line in said)


def test_a_table_of_many_photos_is_cut_where_a_file_has_them_all(run, photos, tmp_path):
    assert len(predict(run, photos / "train").stdout.splitlines()) == 1 + 21
    stdout = predict(run, photos / "train", "-o", tmp_path / "a.csv").stdout
    assert stdout.count("train/") == 20 and "a.csv: 21 photos (the first 20 above)" in stdout
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 21


def test_true_masks_are_of_mining_alone(run, photos):
    assert "--method masks: needs true masks" in predict(run, photos, "--method", "masks", code=2).stderr
    assert "no such option" in predict(run, photos, "--masks", photos, code=2).stderr.lower()


def test_help_needs_no_torch():
    code = "import sys, trainer.predict.cli; print({'torch', 'timm', 'pyarrow', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
