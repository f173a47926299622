"""datalth-weights info, verify and diff: what they say, draw and import."""

import io
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.numpy import save

import made
from made import HEADS, SHAPES, made_masks, made_plan, made_start, made_ticket
from trainer.weights import plot
from trainer.weights.cli import main
from trainer.weights.compare import overlap
from trainer.weights.ticket import MANIFEST, PLAN, START, WeightTicket

QKV = "blocks.0.attn.qkv.weight"


def weights(*arguments: object, code: int = 0) -> Result:
    """Run datalth-weights in this process; assert its exit code, and that an error is one line."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, result.output + "".join(map(str, result.exc_info or ()))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of seeds 0 and 1: w0 and w1; read-only."""
    root = tmp_path_factory.mktemp("made")
    for seed in (0, 1):
        made_ticket(root / f"w{seed}", seed=seed)
    return root


# -- info --


def test_info_says_what_a_ticket_is(folder):
    lines = weights("info", folder / "w0").output.splitlines()
    opened = WeightTicket.open(folder / "w0")
    assert lines[0] == (
        "imp, sparsity 0.75 in 2 levels (global), of test_vit, seed 0, start at epoch 0;"
        f" data set abababababab, ticket {opened.level().ticket_id[:12]}, group {opened.plan.group_id[:12]}"
    )
    rows = [line.split() for line in lines]
    count = opened.level().tensors[QKV]
    assert [QKV, "24", "x", "8", str(count), f"{count / 192:.3f}"] in rows
    assert ["all", "161", "0.250"] in rows
    assert [
        "level",
        "sparsity",
        "kept",
        "top-1",
        "(all)",
        "top-1",
        "(tickets)",
        "updates",
        "GMACs",
        "in",
        "theory",
    ] in rows
    assert ["2", "0.750", "161", "of", "644", "80.000", "78.000", "200", "0.438", "of", "1"] in rows
    assert "make nothing faster" in lines[-1]


def test_info_of_levels_that_were_not_trained(tmp_path, monkeypatch):
    usual = made._level
    monkeypatch.setattr(made, "_level", lambda *arguments: replace(usual(*arguments), results=None))
    made_ticket(tmp_path / "w", method="random", levels=1, heads={})
    output = weights("info", tmp_path / "w", "-o", tmp_path / "w.png").output
    assert "top-1" not in output and "random, sparsity 0.75 in 1 level (global)" in output
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.size == (1300, 460)  # no panel of heads


def test_info_lists_blocks_in_natural_order(tmp_path):
    shapes = {f"blocks.{i}.mlp.fc1.weight": (4, 4) for i in range(12)}
    made_ticket(tmp_path / "w", prunable=shapes, heads={})
    lines = weights("info", tmp_path / "w").output.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("blocks")] == list(shapes)


def test_json_is_the_files(folder):
    content = json.loads(weights("info", folder / "w0", "--json").output)
    for name, file in (("plan", PLAN), ("manifest", MANIFEST)):
        assert content[name] == json.loads((folder / "w0" / file).read_text())


# -- the picture --


def test_the_picture_is_a_png_and_the_same_in_two_processes(folder, tmp_path):
    weights("info", folder / "w0", "-o", tmp_path / "a.png")
    code = f"from trainer.weights.cli import main; main(['info', {str(folder / 'w0')!r}, '-o', {str(tmp_path / 'b.png')!r}])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    weights("info", folder / "w1", "-o", tmp_path / "c.png")
    one, two, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == two != other
    with Image.open(io.BytesIO(one)) as picture:
        assert picture.size == (1700, 460) and picture.format == "PNG"


def test_layers_are_blocks_and_kinds_by_depth():
    shapes = {f"blocks.{i}.attn.qkv.weight": (6, 2) for i in range(11)} | {
        "layer1.0.downsample.0.weight": (2, 2), "stages.1.blocks.2.conv.weight": (2, 2), "mixer.weight": (2, 2),
    }  # fmt: skip
    places = {name: plot._place(name) for name in shapes}
    assert places["blocks.10.attn.qkv.weight"] == ("blocks.10", "attn.qkv")
    assert places["layer1.0.downsample.0.weight"] == ("layer1.0", "downsample.0")
    assert places["stages.1.blocks.2.conv.weight"] == ("stages.1.blocks.2", "conv")
    assert places["mixer.weight"] == ("mixer", "others")
    assert plot._short(["stages.1.blocks.2", "blocks.3", "layer1.0", "mixer"]) == ["1.2", "3", "1.0", "mixer"]


def test_shares_of_layers_and_heads(tmp_path):
    """Rows of qkv are (q, k, v) x heads x head_dim: here only head 1 of v is kept, and half of head 0 of k."""
    plan = made_plan(levels=1)
    kept = {name: np.zeros(shape, bool) for name, shape in plan.prunable.items()}
    kept[QKV][20:24] = True  # D = 8, two heads of 4 rows: v is rows 16 to 23
    kept[QKV][8:12, :4] = True
    opened = made_ticket(tmp_path / "w", [kept], levels=1)
    names, shares = plot.head_shares(opened)
    assert names == list(HEADS)
    assert shares[0].tolist() == [[0, 0], [0.5, 0], [0, 1]] and not shares[1].any()
    blocks, kinds = plot.layers(opened)
    assert blocks == ["blocks.0", "blocks.1"]
    assert kinds["attn.qkv"] == {"blocks.0": 0.25, "blocks.1": 0.0} and list(kinds["mlp.fc1"].values()) == [0, 0]


def test_heads_that_differ_or_do_not_fit(tmp_path):
    shapes = {"blocks.0.qkv.weight": (6, 2), "blocks.1.qkv.weight": (12, 2), "blocks.2.qkv.weight": (7, 2)}
    heads = {"blocks.0.qkv.weight": 1, "blocks.1.qkv.weight": 2, "blocks.2.qkv.weight": 2, "elsewhere.weight": 2}
    opened = made_ticket(tmp_path / "w", prunable=shapes, heads=heads)
    names, shares = plot.head_shares(opened)
    assert names == ["blocks.0.qkv.weight", "blocks.1.qkv.weight"] and shares.shape == (2, 3, 2)
    assert np.isnan(shares[0, :, 1]).all() and not np.isnan(shares[0, :, 0]).any() and not np.isnan(shares[1]).any()
    plot.draw(opened)


def test_a_picture_of_nothing_kept(tmp_path):
    nothing = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    with Image.open(io.BytesIO(plot.draw(made_ticket(tmp_path / "w", [nothing, nothing])))) as picture:
        assert picture.size == (1700, 460)


def test_a_picture_that_cannot_be_written_is_refused_before_the_work(folder, tmp_path):
    assert (
        "expected a file that ends in .png" in weights("info", folder / "w0", "-o", tmp_path / "w.jpg", code=2).output
    )
    assert "no such folder" in weights("info", folder / "w0", "-o", tmp_path / "none" / "w.png", code=2).output


# -- verify --


def test_verify_says_sound_or_what_is_wrong(folder, tmp_path):
    assert f"{folder / 'w0'}: sound (2 levels, 8 tensors, 644 weights, " in weights("verify", folder / "w0").output
    copy = tmp_path / "w"
    shutil.copytree(folder / "w0", copy)
    for name in (START, "masks-01.safetensors"):
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
    first, second, last = weights("verify", copy, code=1).output.splitlines()
    assert first.startswith("masks-01.safetensors: expected sha256 ") and second.startswith(
        "start.safetensors: expected sha256 "
    )
    assert last.startswith(f"{copy}: 2 problems (")
    found = json.loads(weights("verify", copy, "--json", code=1).output)
    assert found == {"folder": str(copy), "levels": 2, "problems": [first, second]}


def test_names_with_escape_codes_are_shown_and_do_not_act(folder, tmp_path):
    name = "a\u202eb.weight"  # turns the direction of writing; JSON may hold it
    made_ticket(tmp_path / "w", prunable={name: (4, 4)}, heads={}, arguments={"model": "\x1b[31mred", "set_id": 3})
    for command in (["info", "w", "-o", "w.png"], ["diff", "w", "w"]):
        output = weights(*(tmp_path / word if word[0] == "w" else word for word in command)).output
        assert "a\\u202eb.weight" in output and "\x1b" not in output and "\u202e" not in output
    assert "of \\x1b[31mred, " in weights("info", tmp_path / "w").output
    (tmp_path / "w" / "masks-\x1b[2J").write_bytes(b"")
    assert "masks-\\x1b[2J: not one of this" in weights("verify", tmp_path / "w", code=1).output


@pytest.mark.parametrize("command", ["info", "verify", "diff"])
def test_what_is_no_ticket_is_one_line(folder, tmp_path, command):
    def line(path: Path) -> str:
        result = weights(command, path, *([folder / "w0"] if command == "diff" else []), code=1)
        (said,) = result.output.splitlines()
        assert said.startswith("Error: ") and "Traceback" not in said
        return said

    copy = tmp_path / "w"
    assert "expected a weight ticket, found no plan.json" in line(copy)
    shutil.copytree(folder / "w0", copy)
    weights(command, copy, *([folder / "w0"] if command == "diff" else []))  # the control
    (copy / MANIFEST).write_bytes(b"[" * 100_000)
    assert "nested too deeply" in line(copy)
    (copy / MANIFEST).unlink()
    assert "not finished" in line(copy)


def test_a_mask_file_of_a_huge_header_is_one_line(folder, tmp_path):
    """The command line's own, of a file whose size is right."""
    copy = tmp_path / "w"
    shutil.copytree(folder / "w0", copy)
    data = bytearray((copy / "masks-02.safetensors").read_bytes())
    data[:8] = struct.pack("<Q", 1 << 62)
    (copy / "masks-02.safetensors").write_bytes(data)
    said = weights("diff", copy, folder / "w0", code=1).output.splitlines()
    assert len(said) == 1 and "masks-02.safetensors: expected sha256" in said[0]


# -- diff --


def test_figures_of_two_masks(tmp_path):
    """Of 10 weights W1 keeps 0 to 3, W2 2 to 6; of the other tensor both keep the same 2 of 4."""
    shapes = {"a.weight": (2, 5), "b.weight": (4,)}
    tickets = []
    for name, first, last in (("w1", 0, 4), ("w2", 2, 7)):
        flat = np.zeros(10, bool)
        flat[first:last] = True
        masks = {"a.weight": flat.reshape(2, 5), "b.weight": np.array([1, 0, 1, 0], bool)}
        tickets.append(made_ticket(tmp_path / name, [masks], prunable=shapes, heads={}, levels=1))
    found = overlap(*tickets)
    assert found["levels"] == [1, 1]
    assert found["tensors"]["a.weight"] == {
        "prunable": 10, "kept": [4, 5], "both": 2, "overlap": 2 / 4, "jaccard": 2 / 7, "hamming": 5 / 10,
        "overlap_by_chance": 2 / 4, "jaccard_by_chance": 2 / 7, "hamming_by_chance": 5 / 10,  # 4 * 5 / 10 = 2 in common
    }  # fmt: skip
    b = found["tensors"]["b.weight"]
    assert (b["overlap"], b["jaccard"], b["hamming"]) == (1, 1, 0)
    assert (b["overlap_by_chance"], b["jaccard_by_chance"], b["hamming_by_chance"]) == (1 / 2, 1 / 3, 2 / 4)
    total = found["total"]
    assert (total["prunable"], total["kept"], total["both"]) == (14, [6, 7], 4)
    assert (total["overlap"], total["jaccard"], total["hamming"]) == (4 / 6, 4 / 9, 5 / 14)
    # In common by chance: 4 * 5 / 10 + 2 * 2 / 4 = 3, tensor by tensor, so that densities of layers are no agreement.
    assert (total["overlap_by_chance"], total["jaccard_by_chance"], total["hamming_by_chance"]) == (
        3 / 6,
        3 / 10,
        7 / 14,
    )


def test_chance_is_what_random_masks_show(tmp_path):
    """And the same mask is far from it."""
    shapes = {f"blocks.{i}.mlp.fc1.weight": (100, 100) for i in range(4)}
    one, two = (made_ticket(tmp_path / f"w{seed}", prunable=shapes, heads={}, seed=seed) for seed in (0, 1))
    total = overlap(one, two)["total"]
    for figure in ("overlap", "jaccard", "hamming"):
        assert total[figure] == pytest.approx(total[f"{figure}_by_chance"], abs=0.01)
    same = overlap(one, one)["total"]
    assert (same["overlap"], same["jaccard"], same["hamming"]) == (1, 1, 0) and same["overlap_by_chance"] < 0.3


def test_nothing_kept_has_no_overlap(tmp_path):
    nothing = {name: np.zeros(shape, bool) for name, shape in SHAPES.items()}
    opened = made_ticket(tmp_path / "w", [made_masks(made_plan())[0], nothing])
    assert overlap(opened, opened)["total"]["overlap"] is None
    assert weights("diff", opened.path, opened.path).output.splitlines()[-1].split()[3:] == ["-"] * 4 + ["0.000"] * 2


def test_diff_prints_a_row_a_tensor_and_all(folder):
    lines = weights("diff", folder / "w0", folder / "w1").output.splitlines()
    assert lines[0] == f"W1: {folder / 'w0'}, imp at level 2 of 2, seed 0"
    assert lines[1] == f"W2: {folder / 'w1'}, imp at level 2 of 2, seed 1"
    found = json.loads(weights("diff", folder / "w0", folder / "w1", "--json").output)
    total = found["total"]
    shares = [total[f"{kind}{suffix}"] for kind in ("overlap", "jaccard", "hamming") for suffix in ("", "_by_chance")]
    assert lines[-1].split() == ["all", "161", "161", *(f"{share:.3f}" for share in shares)]
    assert len(lines) == 4 + len(SHAPES) + 1
    level_one = json.loads(weights("diff", folder / "w0", folder / "w1", "--level", 1, "--json").output)
    assert level_one["levels"] == [1, 1] and level_one["total"]["kept"] == [322, 322]
    assert (
        "expected a level from 1 to 2, got 3"
        in weights("diff", folder / "w0", folder / "w1", "--level", 3, code=1).output
    )


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({**SHAPES, QKV: (8, 24)}, f"{QKV}: [24, 8] there, [8, 24] here (plan.json)"),
        ({**SHAPES, "a.weight": (2, 2)}, "a.weight: none there, [2, 2] here (plan.json)"),
        ({QKV: (24, 8)}, "blocks.0.attn.proj.weight: [8, 8] there, none here (plan.json)"),
    ],
)  # fmt: skip
def test_diff_refuses_other_shapes_in_one_line(folder, tmp_path, shapes, says):
    made_ticket(tmp_path / "w", prunable=shapes, heads={})
    result = weights("diff", folder / "w0", tmp_path / "w", code=1)
    (line,) = result.output.splitlines()
    assert (
        line.startswith(f"Error: {tmp_path / 'w'}: expected the prunable tensors of {folder / 'w0'}: ") and says in line
    )


# -- what it imports --


@pytest.mark.slow
def test_no_command_imports_torch(folder, tmp_path):
    """In one fresh process; the negative control is the trainer's own module."""
    runs = [
        ["--help"], ["info", "--help"], ["info", str(folder / "w0"), "-o", str(tmp_path / "w.png")],
        ["verify", str(folder / "w0")], ["diff", str(folder / "w0"), str(folder / "w1")],
    ]  # fmt: skip
    code = f"""
import sys
from click.testing import CliRunner
from trainer.weights.cli import main
assert "numpy" not in sys.modules  # --help is quick
for arguments in {runs!r}:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
assert not {{"torch", "timm"}} & set(sys.modules)
import trainer.engine
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_start_weights_that_are_not_finite_are_shown(tmp_path):
    start = made_start(made_plan())
    start[QKV][0, 0] = np.nan
    made_ticket(tmp_path / "w", start=start)
    output = weights("verify", tmp_path / "w", code=1).output
    assert f"start.safetensors: {QKV}: expected finite numbers, got 1 others\n" in output
    (tmp_path / "w" / START).write_bytes(save(made_start(made_plan())))  # sound, but not what the manifest says
    assert "expected sha256" in weights("verify", tmp_path / "w", code=1).output
