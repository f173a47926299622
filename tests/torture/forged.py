"""Forged sets: whatever the files of a set hold, every command and library call ends in one line or in a result."""

import copy
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from watch import Case, Watch

from shards import format as fmt
from shards.reader import TicketSet
from shards.rows import Rows
from shards.verify import verify

Mutation = Callable[[random.Random, Path], str]

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 255, 10**9, 2**31, 2**63, 10**15, 10**30, -(10**18), 0.5, 1e308, -0.0,
    "", ".", "..", "../victim/train", "/etc/passwd", "ftp://127.0.0.1:9/x", "s3://bucket/x", "a::b", "pipe:id",
    "a\nb", "\x1b[2J\x1b]0;title\x07", "\u202egnp", "\ud800", "\x9b31m", "x" * 10_000, "0" * 64, "train", "link",
    [], {}, [[]], [0] * 1000, {"a": {"b": None}}, [None], ["a"], [4, 4], [1, 1], [9, 9],
]  # fmt: skip


def _one(rng: random.Random, folder: Path, pattern: str) -> Path:
    return rng.choice(sorted(path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()))


def change_json(rng: random.Random, folder: Path) -> str:
    """One to three values somewhere in one JSON file become something hostile, or another value of the same file."""
    path = _one(rng, folder, "*.json")
    content = json.loads(path.read_bytes())
    said = []
    for _ in range(rng.randint(1, 3)):
        places = list(_places(content))
        owner, name = rng.choice(places)
        what = rng.randint(0, 9)
        if what == 0 and isinstance(owner, dict):
            del owner[name]
            value: Any = "nothing"
        elif what == 1 and isinstance(owner, dict):
            value = rng.choice(HOSTILE[16:34])
            owner[value] = owner.pop(name)
        else:
            other, other_name = rng.choice(places)
            value = copy.deepcopy(
                rng.choice(HOSTILE) if what < 8 else other[other_name] if other_name in _names(other) else 0
            )
            owner[name] = value
        said.append(f"{name}={str(value)[:40]!r}")
    path.write_bytes(json.dumps(content).encode())
    return f"{path.name}: {', '.join(said)}"


def _names(owner: Any) -> Any:
    return owner if isinstance(owner, dict) else range(len(owner))


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in list(items):
        yield value, name
        yield from _places(item)


def change_bytes(rng: random.Random, folder: Path) -> str:
    """Bits flipped, bytes cut, zeroed, doubled, or another file's."""
    path = _one(rng, folder, "**/*")
    data = bytearray(path.read_bytes())
    what = rng.choice(["flip", "flip", "flips", "cut", "zero", "insert", "double", "empty", "other"])
    at = rng.randrange(len(data)) if data else 0
    if what == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif what == "flips" and data:
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif what == "cut":
        del data[at:]
    elif what == "zero":
        data[at : at + 600] = bytes(len(data[at : at + 600]))
    elif what == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 700))
    elif what == "double":
        data = data + data
    elif what == "empty":
        data.clear()
    else:
        data = bytearray(_one(rng, folder, "**/*").read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {what} at {at}"


def change_index(rng: random.Random, folder: Path) -> str:
    """A cell, a column or a type of an index."""
    path = _one(rng, folder, "index/*.parquet")
    try:
        table = pq.read_table(path)
    except Exception:  # it was damaged before
        return "index: none"
    field = rng.choice(table.schema)
    at, rows = table.schema.get_field_index(field.name), len(table)
    what = rng.choice(["cell", "cell", "cell", "type", "drop", "rename", "rows", "none", "nested"])
    if what == "cell" and rows:
        values = table[field.name].to_pylist()
        pool = [
            None,
            -1,
            0,
            7,
            512,
            2**31 - 1,
            "",
            "../x",
            "a\x1b[2J",
            "ok",
            "failed",
            "k" * 5000,
            b"",
            0.5,
            float("nan"),
            True,
        ]
        values[rng.randrange(rows)] = rng.choice([*pool, rng.choice(values)])
        try:
            table = table.set_column(at, field, pa.array(values, field.type))
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            what = "no cell"
    elif what == "type":
        new = rng.choice(
            [pa.string(), pa.int64(), pa.float32(), pa.bool_(), pa.binary(), pa.null(), pa.timestamp("ns")]
        )
        table = table.set_column(at, field.name, pa.nulls(rows, new))
    elif what == "drop":
        table = table.remove_column(at)
    elif what == "rename":
        table = table.rename_columns(
            [rng.choice(["key", "x\x1b[2J", "label"]) if n == field.name else n for n in table.schema.names]
        )
    elif what == "rows":
        table = pa.concat_tables([table] * rng.choice([2, 50]))
    elif what == "nested":
        table = table.set_column(at, field.name, pa.array([[1, 2]] * rows))
    else:
        table = table.slice(0, 0)
    pq.write_table(table, path)
    return f"{path.name}: {what} in {field.name}"


def change_member(rng: random.Random, folder: Path) -> str:
    """An array or an image in a tar becomes another of the same length; headers keep their checksum where they can."""
    path = _one(rng, folder, "*.tar")
    data = bytearray(path.read_bytes())
    starts = [i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"]
    if not starts:
        return "tar: none"
    at = rng.choice(starts)
    header, what = data[at : at + 512], rng.choice(["header", "header", "npy", "npy", "content", "drop"])
    digits = bytes(header[124:135])
    size = min(int(digits, 8), len(data) - at) if digits.isdigit() and b"8" not in digits and b"9" not in digits else 0
    if what == "header":
        place, value = rng.choice(
            [(124, b"-0000001000"), (124, b"77777777777"), (124, b"0000000000x"), (156, b"2"), (156, b"x"), (0, b"../../x"),
             (0, b"\x1b[2J"), (345, b"/etc"), (124, b"\x80" + bytes(10)), (124, b"00000000001")]
        )  # fmt: skip
        header[place : place + len(value)] = value
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        data[at : at + 512] = header
    elif what == "npy" and (npy := data.find(b"\x93NUMPY", at)) >= 0:
        old, new = rng.choice([(b"'|u1'", b"'|S1'"), (b"'<i4'", b"'<f4'"), (b"(", b"["), (b"16", b"-1"), (b"False", b"True "),
                               (b"'|u1'", b"'|O1'"), (b", 5", b", 9"), (b"\x01\x00v", b"\x03\x00v"), (b"3", b"9")])  # fmt: skip
        head = data[npy : npy + 128]
        data[npy : npy + 128] = head.replace(old, new)[:128].ljust(128)
        for _ in range(rng.choice([0, 5])):
            data[min(len(data) - 1, npy + 128 + rng.randrange(60))] = rng.randrange(256)
    elif what == "content":
        data[at + 512 : at + 512 + size] = rng.randbytes(size)
    else:
        del data[at : at + 512 + -(-size // 512) * 512]
    path.write_bytes(data)
    return f"{path.name}: {what} at {at}"


def change_ranked(rng: random.Random, folder: Path) -> str:
    """Of a set of ranked views a table or a JPEG, at its weak places; of another set any member."""
    path = _one(rng, folder, "*.tar")
    data = bytearray(path.read_bytes())
    starts = [found.end() for found in re.finditer(rb"\xff\xd8\xff\xe0", data)]
    if not starts or b".ranked.bin\0" not in data:
        return change_member(rng, folder)
    start = rng.choice(starts)  # of a view's header
    what = rng.choice(["table", "table", "frame", "segment", "tables", "scan", "marker", "end"])
    marker = rng.choice([b"\xff\xc0", b"\xff\xdd", b"\xff\xda", b"\xff\xdb", b"\xff\xc4"])
    value = rng.choice(
        [
            b"\0",
            b"\1",
            b"\x7f",
            b"\xff",
            b"\xff\xff",
            b"\xff\xc2",
            b"\xff\xd9",
            b"\xff\xd8",
            bytes([rng.randrange(256)]),
        ]
    )
    if what == "table":
        table = data.rfind(b".ranked.bin\0", 0, start)
        at = 512 * (table // 512 + 1) + 4 * rng.randrange(16)
        old = int.from_bytes(data[at : at + 4], "little")
        new = rng.choice([0, 1, old + 1, old - 1, old + 2, 2 * old, 1 << 31, (1 << 32) - 1, len(data)]) % (1 << 32)
        value = new.to_bytes(4, "little")
    elif what == "frame":
        at = data.index(b"\xff\xc0", start) + rng.randrange(19)
    elif what == "segment":
        at = data.find(marker, start) + rng.randrange(6)
    elif what == "tables":
        at = start + rng.randrange(600)
    else:
        scan = data.find(b"\xff\xda", start) + 14
        found = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd9]", data[scan : scan + 8000])]
        at = scan + (rng.randrange(4000) if what == "scan" or not found else rng.choice(found) + rng.randrange(2))
    value = value[: max(0, len(data) - at)]
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return f"{path.name}: ranked {what} at {at}"


def change_files(rng: random.Random, folder: Path) -> str:
    """A file becomes a FIFO, a device, a folder, a link to itself, or nothing."""
    path = _one(rng, folder, "**/*")
    what = rng.choice(["fifo", "zero", "folder", "loop", "gone", "dangling", "unlisted"])
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "dangling":
        path.symlink_to("nowhere")
    elif what == "unlisted":
        (folder / "index" / f"{path.name}\x1b[2J.tmp").write_bytes(b"")
    return f"{path.name}: {what}"


MUTATIONS: list[Mutation] = [
    change_json,
    change_json,
    change_bytes,
    change_index,
    change_member,
    change_member,
    change_ranked,
    change_ranked,
    change_files,
]


def seal(folder: Path) -> None:
    """Make the hashes agree with what is there, as far as it can be read: what a forger does."""
    if any(not path.is_file() for path in folder.rglob("*") if not path.is_dir()):
        return  # a FIFO would wait for ever
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for path in folder.glob("*-0*.json"):
            stats = json.loads(path.read_bytes())
            for member, name in (("tar", f"{path.stem}.tar"), ("parquet", f"index/{path.stem}.parquet")):
                data = (folder / name).read_bytes() if (folder / name).stat().st_size < 1 << 24 else b""
                stats[member] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            path.write_bytes(fmt.canonical_json(stats))
        plan = (folder / "plan.json").read_bytes()
        manifest["plan"] = {"bytes": len(plan), "sha256": hashlib.sha256(plan).hexdigest()}
        manifest["digest"] = fmt.manifest_digest(manifest)
        (folder / "manifest.json").write_bytes(fmt.canonical_json(manifest))
    except Exception:  # what is damaged beyond that stays as it is
        return


def library(folder: Path) -> None:
    """A person's own loop, which has no command to catch its errors."""
    opened = TicketSet.open(str(folder))
    verify(opened, deep=True)
    for split in opened.splits:
        for sample in opened.stream(split):
            assert (np.sort(sample.rankings, axis=1) == np.arange(sample.rankings.shape[1])).all(), "no permutation"
            assert sample.label is None or 0 <= sample.label < len(opened.classes), "no label"
            if sample.ranked is None:
                assert sample.render(0, 16).shape == (16, 16, 3)
                continue
            mosaic = sample.ranked.mosaic
            for tokens in {1, sample.k, mosaic.tokens}:
                assert sample.ranked.patches(0, tokens).shape == (tokens, mosaic.patch, mosaic.patch, 3)
            assert min(sample.ranked.statistics(0).high) >= 0
        if opened.has_tickets:
            rows = Rows(opened, split)
            for shard, size in enumerate(rows.sizes):
                for row in range(size):
                    rows.read(shard, row)


def run(sets: dict[str, Path], work: Path, watch: Watch, rng: random.Random) -> Case:
    """Forge one set and try one use of it."""
    kind = rng.choice(sorted(sets))
    place = work / "case"
    shutil.copytree(sets[kind].parent, place, symlinks=True)  # a link's base lies beside it
    folder = place / sets[kind].name
    mutations = [rng.choice(MUTATIONS) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
    said = [mutate(rng, folder) for mutate in sorted(mutations, key=MUTATIONS.index)]  # files last: they go
    sealed = rng.random() < 0.6
    if sealed:
        seal(folder)
    out, picture = str(place / "out"), str(place / "x.png")
    set_ = str(folder)
    key = "train/ant/ant_0"
    uses: dict[str, Any] = {
        "info": ("shards.inspect.cli", ["info", set_]),
        "info --json": ("shards.inspect.cli", ["info", set_, "--json"]),
        "ls": ("shards.inspect.cli", ["ls", set_, "-n", "0"]),
        "show": ("shards.inspect.cli", ["show", set_, key, "-o", picture]),
        "sheet": ("shards.inspect.cli", ["sheet", set_, "-o", picture]),
        "stats": ("shards.inspect.cli", ["stats", set_, "-o", picture]),
        "verify": ("shards.inspect.cli", ["verify", set_]),
        "verify --deep": ("shards.inspect.cli", ["verify", set_, "--deep"]),
        "diff": ("shards.inspect.cli", ["diff", set_, str(sets["plain"])]),
        "mine link": ("miner.cli", ["--data", set_, "--out", out, "--images", "link", "--method", "random", "-j", "1"]),
        "mine copy": ("miner.cli", ["--data", set_, "--out", out, "--method", "center", "-j", "1"]),
        "mine ranked": ("miner.cli", ["--data", set_, "--out", out, "--images", "ranked", "-j", "1"]),
        "mine into": ("miner.cli", ["--data", str(place / "photos"), "--out", set_, "--method", "center", "--img-size", "64",
                                    "--views", "3", "--shard-size", "10", "-j", "1"]),
        "library": library,
        "train": ("trainer.cli", ["--shards", set_, "--model", "test_vit", "--epochs", "1", "-b", "4", "-j", "0", "--warmup-epochs",
                                  "0", "--repeats", "2", "--output", out, "--experiment", "x", "--model-kwargs", "depth=1"]),
    }  # fmt: skip
    use = rng.choice([*uses, "library", "verify --deep"])
    title = f"{kind}{' sealed' if sealed else ''}, {use}: {'; '.join(said)}"
    action = uses[use]
    if callable(action):
        return watch.call(title, use, lambda: action(folder), place)
    return watch.command(title, use, *action, place)


def make_sets(root: Path) -> dict[str, Path]:
    """Sound sets to be forged: plain, linked, of ranked views, and of the best of these alone."""
    from conftest import mine, write_image

    for number in range(15):
        name = ("ant", "bee", "cat")[number % 3]
        split = "train" if number < 12 else "val"
        write_image(root / "photos" / split / name / f"{name}_{number // 3}.jpg", number)
    common = ["--method", "center", "--views", "3", "--shard-size", "10"]
    plain, link = root / "plain" / "set", root / "link" / "set"
    mine("--data", root / "photos", "--out", plain, *common)
    shutil.copytree(root / "photos", root / "plain" / "photos")
    shutil.copytree(plain, root / "link" / "base")
    mine("--data", root / "link" / "base", "--out", link, "--images", "link", "--method", "random")
    ranked, cut = root / "ranked" / "set", root / "cut" / "set"
    mine("--data", root / "photos", "--out", ranked, *common, "--images", "ranked")
    mine("--data", root / "photos", "--out", cut, *common, "--images", "ranked", "--tokens", 6, "--store-tokens", 8)
    for each in (ranked, cut):
        shutil.copytree(root / "photos", each.parent / "photos")
    return {"plain": plain, "link": link, "ranked": ranked, "cut": cut}
