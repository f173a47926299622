"""The folder of a weight ticket: what is written is read again, and what is damaged or made up is refused in one line."""

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save
from test_readme import ROOT, blocks

from made import HEADS, SHAPES, made_masks, made_plan, made_start, made_ticket
from shards.errors import TicketSetError
from trainer.weights import ticket as tickets
from trainer.weights.ticket import MANIFEST, PLAN, START, WeightPlan, WeightTicket, masks_name
from trainer.weights.verify import verify

QKV, FC1 = "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"
Content = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only; copy it to change it."""
    return made_ticket(tmp_path_factory.mktemp("sound") / "w").path


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "w"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(TicketSetError) as caught:
        action()
    line = str(caught.value)
    assert "\n" not in line
    return line


def change_json(path: Path, change: Callable[[Content], object]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def change_plan(path: Path, change: Callable[[Content], object]) -> None:
    """A forger's change: all ids are those of the changed plan, the manifest's too."""
    change_json(path / PLAN, change)
    content = json.loads((path / PLAN).read_bytes())
    content["group_id"], content["plan_id"] = tickets._identities(content)
    (path / PLAN).write_text(json.dumps(content))
    change_manifest(path, lambda said: said.update(group_id=content["group_id"], plan_id=content["plan_id"]))


def change_manifest(path: Path, change: Callable[[Content], object]) -> None:
    """A forger's change: the digest is that of the changed manifest."""
    change_json(path / MANIFEST, change)
    manifest = tickets.WeightManifest.parse(json.loads((path / MANIFEST).read_bytes()), "")
    tickets.write_manifest(path, manifest)


def replace_file(path: Path, name: str, data: bytes) -> None:
    """A forger's change: the manifest says the file's new size, sum and ticket ids, so that only its content is wrong."""
    (path / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def change(said: Content) -> None:
        for level in said["levels"][1:]:
            level["masks"] = record if masks_name(level["level"]) == name else level["masks"]
        said["start"] = record if name == START else said["start"]
        for level in said["levels"][1:]:
            both = level["masks"]["sha256"] + said["start"]["sha256"]
            level["ticket_id"] = hashlib.sha256(both.encode()).hexdigest()

    change_manifest(path, change)


def mask_file(kept: dict[str, np.ndarray], /, level: int = 2, **changes: Any) -> bytes:
    """A mask file; `changes` replace fields of what its metadata says of the first layer's qkv."""
    tensors: Content = {name: {"shape": list(mask.shape), "kept": int(mask.sum())} for name, mask in kept.items()}
    tensors[QKV].update(changes)
    packed = {name: np.packbits(mask.ravel(), bitorder="little") for name, mask in kept.items()}
    return save(packed, {"masks": json.dumps({"level": level, "tensors": tensors})})


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file that is a header alone."""
    return struct.pack("<Q", len(text) if length is None else length) + text


# -- what is written is read again --


def test_what_is_written_is_read_again(sound):
    opened, plan = WeightTicket.open(sound), made_plan()
    assert opened.plan == plan == tickets.read_plan(sound)
    assert opened.levels == 2 and opened.level() == opened.level(2) == opened.manifest.levels[2]
    for level, expected in enumerate(made_masks(plan), 1):
        for found in (opened.kept(level), tickets.read_masks(sound, level, plan)):
            assert list(found) == sorted(SHAPES)
            for name, mask in expected.items():
                assert found[name].dtype == bool and np.array_equal(found[name], mask)
    assert opened.kept().keys() == opened.kept(2).keys()
    assert opened.start_bytes() == (sound / START).read_bytes()
    start = load(opened.start_bytes())
    assert start.keys() == {*SHAPES, "head.weight", "head.bias"}
    assert all(np.array_equal(start[name], weights) for name, weights in made_start(plan).items())
    assert tickets.file_record(sound / START) == opened.manifest.start
    assert verify(opened) == []


def test_bits_are_where_the_format_says(tmp_path):
    """Weight i of the row-major tensor is bit i % 8 of byte i // 8; unused last bits are 0."""
    plan = made_plan(prunable={"a.weight": (3, 3)}, heads={}, levels=1)
    kept = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], bool)  # weights 0, 4 and 8
    record = tickets.write_masks(tmp_path, 1, {"a.weight": kept})
    data = (tmp_path / "masks-01.safetensors").read_bytes()
    assert load(data)["a.weight"].tolist() == [0b00010001, 0b00000001]
    length = struct.unpack_from("<Q", data)[0]
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert metadata == {"masks": '{"level": 1, "tensors": {"a.weight": {"kept": 3, "shape": [3, 3]}}}'}
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert np.array_equal(tickets.read_masks(tmp_path, 1, plan)["a.weight"], kept)


def test_the_lines_of_format_md_read_a_ticket(tmp_path):
    opened = made_ticket(tmp_path / "W", levels=1)
    (lines,) = [block for block in blocks(ROOT / "docs" / "FORMAT.md") if block[0] == "import json, numpy as np"]
    code = [line for line in lines if line and not line.startswith(("import ", "from "))]
    assert len(code) == 4 and not any(word in line for line in lines for word in ("trainer", "shards.", "datalth"))
    program = "\n".join([*lines, "from safetensors.numpy import save_file", "save_file(weights, 'found.safetensors')"])
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found, start, kept = load_file(tmp_path / "found.safetensors"), made_start(opened.plan), opened.kept(1)
    assert found.keys() == start.keys()
    for name, dense in start.items():
        expected = np.where(kept[name], dense, np.float32(0)) if name in kept else dense
        assert found[name].tobytes() == expected.tobytes()  # +0.0 too
    assert not np.array_equal(found[QKV], start[QKV])  # the control


def test_two_processes_write_the_same_bytes(sound, tmp_path):
    """Of masks, ids and all else; the negative control is another seed."""
    code = "import sys, made, pathlib; made.made_ticket(pathlib.Path(sys.argv[1]), seed=int(sys.argv[2]))"
    for seed in (0, 1):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / str(seed)), str(seed)], check=True, cwd=Path(__file__).parent
        )
    same, other = ({f.name: f.read_bytes() for f in (tmp_path / seed).iterdir()} for seed in "01")
    ours = {f.name: f.read_bytes() for f in sound.iterdir()}
    assert ours == same and ours.keys() == other.keys()
    assert not any(ours[name] == other[name] for name in ours)


def test_ids_with_and_without_the_seed():
    one, two, shorter = made_plan(), made_plan(seed=1), made_plan(sparsity=0.5)
    assert one.group_id == two.group_id != shorter.group_id
    assert len({one.plan_id, two.plan_id, shorter.plan_id, one.group_id}) == 4
    assert one.identities() == (one.group_id, one.plan_id)
    assert made_plan(prunable=dict(reversed(SHAPES.items()))).to_json() == one.to_json()  # their order is none


def test_the_digest_is_of_all_but_the_timing(sound, copy):
    change_json(copy / MANIFEST, lambda said: said.update(timing={"seconds": 99.0}))
    assert verify(WeightTicket.open(copy)) == []
    change_json(copy / MANIFEST, lambda said: said["levels"][1].update(updates=101))
    assert verify(WeightTicket.open(copy)) == ["manifest.json: not as it was written: its digest is of other contents"]


def test_levels_are_named(sound):
    opened = WeightTicket.open(sound)
    for number in (0, 3, -1):
        assert refusal(lambda n=number: opened.level(n)).endswith(f"expected a level from 1 to 2, got {number}")
    with pytest.raises(FileNotFoundError):
        tickets.read_masks(sound, 3, opened.plan)


# -- the plan --


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"), ("method", "dir/own.py:score"), ("method", "own.py"), ("method", "a\x1b.py:f"), ("sparsity", 0.0),
        ("sparsity", 1.0), ("sparsity", -0.5), ("levels", 0), ("levels", 2.0), ("levels", True), ("scope", "block"),
        ("rewind_epochs", -1), ("prunable", {}), ("prunable", {"a": []}), ("prunable", {"a": [-3, 4]}),
        ("prunable", {"a": [1 << 33, 1 << 33]}), ("prunable", {"a\x1b[2J": [3]}), ("heads", {"a": 0}), ("seed", -1),
        ("score_sha256", "ab" * 32), ("classes", "ab"), ("mining", [1]), ("arguments", None),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_is_refused(field, value):
    made_plan()  # the control
    assert field in refusal(lambda: made_plan(**{field: value}))


def test_a_users_score_has_its_files_sum():
    assert made_plan(method="own:score", score_sha256="ab" * 32).method == "own:score"
    assert "score_sha256" in refusal(lambda: made_plan(method="own:score"))


# -- versions --


def test_fields_of_a_newer_minor_version_are_kept_and_not_read(copy):
    change_plan(copy, lambda said: said.update(format=[1, 7], news={"a": 1}))
    change_manifest(copy, lambda said: (said.update(format=[1, 7], news=[2]), said["levels"][1].update(more=3)))
    (copy / "news.bin").write_bytes(b"?")
    opened = WeightTicket.open(copy)
    assert verify(opened) == [] and opened.plan.others == {"news": {"a": 1}}
    assert opened.plan.plan_id != made_plan().plan_id


@pytest.mark.parametrize("name", [PLAN, MANIFEST])
def test_a_newer_major_version_is_refused(copy, name):
    change_json(copy / name, lambda said: said.update(format=[2, 0]))
    line = refusal(lambda: WeightTicket.open(copy))
    assert f"{name}: format 2.0, but this datalth reads up to 1.x; upgrade datalth" in line


# -- no ticket, or not a whole one --


def test_what_is_no_finished_ticket(copy, center_set, tmp_path):
    def opened(path: Path) -> str:
        return refusal(lambda: WeightTicket.open(path))

    (copy / MANIFEST).unlink()
    assert "this weight ticket is not finished (no manifest.json)" in opened(copy)
    assert opened(tmp_path / "nowhere").endswith("expected a weight ticket, found no plan.json")
    assert opened(copy / START).endswith("expected a weight ticket, found no plan.json")
    assert opened(center_set).endswith("expected a weight ticket, found a ticket set of patches")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(center_set / "plan.json", unfinished)
    assert opened(unfinished).endswith("plan.json: expected the plan of a weight ticket")
    assert tickets.read_plan(tmp_path) is None


@pytest.mark.parametrize("name", [PLAN, MANIFEST, START, "masks-01.safetensors", "masks-02.safetensors"])
def test_cut_and_missing_files_are_refused_when_opened(copy, name):
    WeightTicket.open(copy)  # the control
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    line = refusal(lambda: WeightTicket.open(copy))
    said = "not readable as JSON" if name.endswith("json") else f"expected {len(data)} bytes, got {len(data) // 2}"
    assert f"{name}: {said}" in line
    (copy / name).unlink()
    line = refusal(lambda: WeightTicket.open(copy))
    assert name in line and ("missing" in line or "not finished" in line or "found no" in line)


@pytest.mark.parametrize("name", [PLAN, MANIFEST, START, "masks-01.safetensors", "masks-02.safetensors"])
def test_a_flipped_bit_is_found_wherever_it_is(copy, name):
    """Of every file but for the timing, which nothing compares."""
    data = (copy / name).read_bytes()
    # Twenty places, from the first byte on, and the last.
    for place in {*range(0, len(data), len(data) // 20 + 1), len(data) - 1}:
        if name == MANIFEST and data[:place].count(b'"timing"') and b"}" not in data[data.index(b'"timing"') : place]:
            continue
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        (copy / name).write_bytes(flipped)
        try:
            problems = verify(WeightTicket.open(copy))
        except TicketSetError as error:
            problems = [str(error)]
        assert problems, place
        assert not any("\n" in problem for problem in problems)
    (copy / name).write_bytes(data)
    assert verify(WeightTicket.open(copy)) == []  # the control


def test_every_damaged_file_is_named(copy):
    """Files are looked at one by one: the first that is wrong does not hide the next."""
    for name in (START, "masks-01.safetensors"):
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
    (copy / "masks-02.safetensors").unlink()
    problems = verify(WeightTicket.read(copy))
    assert [problem.split(": ")[0] for problem in problems] == ["masks-01.safetensors", "masks-02.safetensors", START]
    assert "missing" in problems[1] and "expected sha256" in problems[0]


def test_links_are_files_and_other_things_are_not(copy, tmp_path):
    (copy / START).rename(tmp_path / "elsewhere")
    (copy / START).symlink_to(tmp_path / "elsewhere")
    assert verify(WeightTicket.open(copy)) == []
    (copy / START).unlink()
    (copy / START).mkdir()
    assert "expected a plain file, got a folder" in refusal(lambda: WeightTicket.open(copy))


def test_files_that_are_not_the_tickets_own(copy):
    (copy / "masks-03.safetensors").write_bytes(b"")
    (copy / "start.safetensors.77-0a1b2c.tmp").write_bytes(b"")
    (copy / "level-00").mkdir()  # an ordinary run folder
    problems = [
        f"{name}: not one of this ticket's files"
        for name in ("masks-03.safetensors", "start.safetensors.77-0a1b2c.tmp")
    ]
    assert verify(WeightTicket.open(copy)) == problems


# -- a manifest that does not go with the rest --


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(plan_id="ab" * 32), "of another plan: expected plan_id"),
        (lambda s: s["levels"].pop(), "expected levels 0 to 2 (plan.json), got [0, 1]"),
        (lambda s: s["levels"].reverse(), "expected levels 0 to 2 (plan.json), got [2, 1, 0]"),
        (lambda s: s["levels"][1].update(masks=None), "level 1: expected masks and ticket_id from level 1 on"),
        (lambda s: s["levels"][0].update(ticket_id="ab" * 32), "level 0: expected masks and ticket_id from level 1 on"),
        (lambda s: s["levels"][1]["tensors"].pop(QKV), "level 1: its tensors are not those of plan.json"),
        (lambda s: s["levels"][1].update(kept=5), "level 1: expected 322 of 644 weights kept"),
        (lambda s: s["levels"][0].update(kept=5), "level 0: expected 644 of 644 weights kept"),
        (lambda s: s["levels"][1].update(prunable=0), "got 322 of 0"),
        (lambda s: s["levels"][1].update(kept=-1), "levels[1]: kept: expected a whole number from 0"),
        (lambda s: s["levels"][1]["tensors"].update({QKV: -1}), f"levels[1]: tensors: {QKV}: expected a whole number from 0"),
        (lambda s: s["levels"][1].update(updates=-1), "updates: expected a whole number from 0"),
        (lambda s: s["levels"][1].update(results={"tickets": 101}), "results: tickets: expected a number from 0 to 100"),
        (lambda s: s["levels"][1].update(results={"all\x1b": 1}), "results: name: expected 1 to 300 characters"),
        (lambda s: s["levels"][1].update(gmacs="1"), "gmacs: expected a number"),
        (lambda s: s["start"].update(bytes=-1), "start: bytes: expected a whole number from 0"),
        (lambda s: s["start"].update(sha256="../x"), "start: sha256: expected 64 hex digits"),
        (lambda s: s.update(levels={}), "levels: expected a list"),
        (lambda s: s.pop("start"), "lacks the field 'start'"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_is_refused(copy, change, says):
    change_json(copy / MANIFEST, change)
    assert says in refusal(lambda: WeightTicket.open(copy))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.update(group_id="ab" * 32), "manifest.json: expected group_id"),
        (lambda s: s["levels"][1].update(ticket_id="ab" * 32), "manifest.json: level 1: its ticket_id is not that of"),
        (lambda s: s["levels"][1].update(sparsity=0.6), "manifest.json: level 1: expected sparsity 0.6, got 322 of 644"),
        (lambda s: s["levels"][2].update(sparsity=0.7505), "manifest.json: level 2: expected sparsity 0.75 (plan.json), got"),
    ],
)  # fmt: skip
def test_verify_finds_ids_and_sparsities_that_do_not_fit(copy, change, says):
    change_manifest(copy, change)
    (problem,) = verify(WeightTicket.open(copy))
    assert problem.startswith(says)


def test_verify_finds_a_plan_that_its_ids_are_not_of(copy):
    change_json(copy / PLAN, lambda said: said.update(scope="layer"))
    problems = verify(WeightTicket.open(copy))
    assert [problem.split(" ")[4] for problem in problems] == ["group_id", "plan_id"]


# -- masks: whatever they hold, the manifest vouches for it --


def wrong_masks() -> dict[str, tuple[bytes, str]]:
    """What is wrong -> (bytes of the second level's mask file, what is said of it)."""
    kept = made_masks(made_plan())[1]
    bits = {name: np.packbits(mask.ravel(), bitorder="little") for name, mask in kept.items()}
    said = {
        "masks": json.dumps(
            {"level": 2, "tensors": {n: {"shape": m.shape, "kept": int(m.sum())} for n, m in kept.items()}}
        )
    }
    beyond = {**bits, FC1: bits[FC1] | np.array([0, 0, 0, 0, 2], np.uint8)}  # weight 33 of 33
    revived = {**kept, QKV: np.ones_like(kept[QKV])}
    other = {name.replace("blocks", "layers"): mask for name, mask in kept.items()}
    more = {**bits, "head.weight": np.zeros(2, np.uint8)}
    return {
        "another level": (mask_file(kept, level=1), "expected level 2, got 1"),
        "another model": (
            save(bits | {"z": bits[QKV]}, {"masks": mask_file_said(other)}),
            "of another model: it and plan.json do not both have 'z'",
        ),
        "one tensor more": (save(more, said), "of another model: it and plan.json do not both have 'head.weight'"),
        "one tensor less": (
            save({name: part for name, part in bits.items() if name != QKV}, said),
            f"of another model: it and plan.json do not both have {QKV!r}",
        ),
        "a foreign shape": (mask_file(kept, shape=[8, 24]), f"{QKV}: expected shape [24, 8] (plan.json), got [8, 24]"),
        "a wrong count": (mask_file(kept, kept=55), f"{QKV}: says 55 weights kept, its bits 54"),
        "a negative count": (mask_file(kept, kept=-1), "kept: expected a whole number from 0"),
        "a count that the manifest has not": (mask_file(revived), f"{QKV}: expected 54 weights kept, got 192"),
        "unused bits": (save(beyond, said), f"{FC1}: expected unused bits 0 at its end"),
        "too few bytes": (save({**bits, QKV: bits[QKV][:-1]}, said), f"{QKV}: expected 24 bytes, got uint8 [23]"),
        "another type": (save({**bits, QKV: kept[QKV].ravel()[:24]}, said), f"{QKV}: expected 24 bytes, got bool [24]"),
        "no metadata": (save(bits), "it has no metadata 'masks'"),
        "metadata that is none": (save(bits, {"masks": "[" * 100_000}), "masks: not readable as JSON: nested too deeply"),
        "metadata of another kind": (save(bits, {"masks": "[]"}), "masks: expected names and values, got list"),
        "metadata without tensors": (save(bits, {"masks": '{"level": 2}'}), "lacks the field 'tensors'"),
        "half a character": (
            header(b'{"__metadata__":{"masks":"\\ud800"}}'), "not readable as",
        ),
        "an escape code for a name": (
            save({"a\x1b[2J": bits[QKV]}, said), "do not both have 'a\\x1b[2J'",
        ),
        "no safetensors": (b"PK\x03\x04" * 100, "not readable as safetensors: a header of"),
        "nothing": (b"", "not readable as safetensors: a header of 0 bytes"),
        "a header beyond the file": (header(b"{}", 1 << 40), "not readable as safetensors: a header of 1099511627776 bytes"),
        "a header beyond any number": (b"\xff" * 64, "a header of 18446744073709551615 bytes"),
        "a header beyond the bound": (header(b" " * (11 << 20)), f"a header of {11 << 20} bytes"),
        "a deep header": (header(b"[" * 200_000), "header: not readable as JSON: nested too deeply"),
        "a header of no object": (header(b"[1]"), "header: expected names and values, got list"),
        "a shape beyond any memory": (
            header(b'{"a":{"dtype":"U8","shape":[4611686018427387904,16],"data_offsets":[0,0]}}'),
            "not readable as safetensors",
        ),
        "a type that numpy lacks": (
            header(b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}') + b"\0\0",
            "expected types that numpy has, got 'BF16'",
        ),
    }  # fmt: skip


def mask_file_said(kept: dict[str, np.ndarray]) -> str:
    tensors = {name: {"shape": mask.shape, "kept": int(mask.sum())} for name, mask in kept.items()}
    return json.dumps({"level": 2, "tensors": tensors})


WRONG = wrong_masks()


@pytest.mark.parametrize("what", WRONG)
def test_masks_that_are_none_are_refused(copy, what):
    data, says = WRONG[what]
    replace_file(copy, masks_name(2), data)
    opened = WeightTicket.open(copy)  # sizes and sums are right
    assert opened.kept(1)  # the control
    line = refusal(lambda: opened.kept(2))
    assert says in line and len(line) < 500
    (problem,) = verify(opened)
    assert problem.startswith("masks-02.safetensors: ") and says in problem


def test_masks_that_the_metadata_of_a_newer_minor_version_says_more_of(copy):
    kept = made_masks(made_plan())[1]
    replace_file(copy, masks_name(2), mask_file(kept, blocks=[1, 2]))
    opened = WeightTicket.open(copy)
    assert verify(opened) == [] and np.array_equal(opened.kept(2)[QKV], kept[QKV])


def test_a_level_that_keeps_what_the_one_before_removed_is_found(tmp_path):
    one, two = made_masks(made_plan())
    assert verify(made_ticket(tmp_path / "nested", [one, two])) == []  # the control
    place = tuple(np.argwhere(~one[QKV])[0]), tuple(np.argwhere(two[QKV])[0])
    two[QKV][place[0]], two[QKV][place[1]] = True, False  # as many as before
    problems = verify(made_ticket(tmp_path / "revived", [one, two]))
    assert problems == [f"masks-02.safetensors: {QKV}: keeps 1 weights that a level before removed"]


# -- start weights --


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop(QKV), f"lacks {QKV}"),
        (lambda s: s.update({QKV: s[QKV].T.copy()}), f"{QKV}: expected shape [24, 8] (plan.json), got [8, 24]"),
        (lambda s: s[QKV].__setitem__((0, 0), np.nan), f"{QKV}: expected finite numbers, got 1 others"),
        (lambda s: s["head.bias"].fill(np.inf), "head.bias: expected finite numbers, got 2 others"),
    ],
)  # fmt: skip
def test_verify_finds_start_weights_that_do_not_fit(copy, change, says):
    start = made_start(made_plan())
    change(start)
    replace_file(copy, START, save(start))
    assert verify(WeightTicket.open(copy)) == [f"start.safetensors: {says}"]


def test_verify_finds_start_weights_that_are_none(copy):
    replace_file(copy, START, b"\x80\x04pickle")
    (problem,) = verify(WeightTicket.open(copy))
    assert problem.startswith("start.safetensors: not readable as safetensors")


# -- bounds --


def test_json_beyond_the_bound_is_not_read(copy, monkeypatch):
    monkeypatch.setattr(tickets, "MAX_JSON_BYTES", 100)
    size = (copy / MANIFEST).stat().st_size
    line = refusal(lambda: WeightTicket.open(copy))
    assert f"manifest.json: expected at most 100 bytes, got {size} or more" in line


def test_masks_beyond_the_bound_are_not_read(copy, monkeypatch):
    opened = WeightTicket.open(copy)
    monkeypatch.setattr(tickets, "MAX_MASKS_BYTES", 100)
    assert "expected at most 100 bytes" in refusal(lambda: opened.kept(1))


@pytest.mark.parametrize("name", [PLAN, MANIFEST])
@pytest.mark.parametrize(
    "data",
    [b"[" * 100_000, b"[]", b"\xff\xfe", b'{"format": [1, 0]', b'{"a": NaN}', b'{"seed": ' + b"9" * 5000 + b"}", b""],
)
def test_json_that_is_none_is_one_line(copy, name, data):
    (copy / name).write_bytes(data)
    assert name in refusal(lambda: WeightTicket.open(copy))


def test_the_plan_is_exactly_what_will_be_read(tmp_path):
    plan = made_plan(heads=HEADS)
    tickets.write_plan(tmp_path, plan)
    assert tickets.read_plan(tmp_path) == plan and isinstance(plan, WeightPlan)
    assert plan.arguments["drop_blocks"] == [1, 2]  # JSON has no tuples
