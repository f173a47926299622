"""Small labeled inputs whose files hold no pictures (listing never decodes), and what is listed and read of them."""

import csv
import io
import pickle
import tarfile

import fsspec
import pytest

from miner import sources
from miner.plan import make_plan
from miner.settings import Geometry, Inputs, Output
from shards.errors import TicketSetError
from shards.schema import SelectorIdentity

BY_CENTER = SelectorIdentity(
    method="center", model=None, state=None, keep_rate=None, counts=(8,), blocks=(), input_size=None, mean=(), std=(),
    dtype="float32", compiled=False, code=None,
)  # fmt: skip


def write_tree(root, *paths):
    """Files whose contents are their paths; listing never decodes. A path that ends in / is a folder."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(path.encode("utf-8", "surrogateescape"))
    return root


def write_tar(path, members):
    """A tar of {name: contents}; `path` may be a memory:// URL."""
    with fsspec.open(str(path), "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count, **members):
    """Tar members of `count` WebDataset samples; {} in a member's text is the sample's number."""
    out = {}
    for i in range(first, first + count):
        for extension, text in (members or {"cls": "{}", "jpg": "picture {}"}).items():
            out[f"{i:04d}.{extension.replace('_', '.')}"] = text.replace("{}", str(i)).encode()
    return out


def labels(source, split="train"):
    """source path -> class name"""
    columns = (source.splits[split][c].to_pylist() for c in ("source", "label"))
    return {path: None if label is None else source.classes[label] for path, label in zip(*columns, strict=True)}


def keys(source, split="train"):
    return source.splits[split]["key"].to_pylist()


def rows(source, split="train"):
    """(key, source, label, size, container, offset) of every input"""
    return [tuple(row.values()) for row in source.splits[split].to_pylist()]


def read_all(source, split="train"):
    """source path -> bytes; a copy that was pickled after files were opened must read the same."""
    found = {row["source"]: source.read(row)[0] for row in source.splits[split].to_pylist()}
    copy = pickle.loads(pickle.dumps(source))
    assert {row["source"]: copy.read(row)[0] for row in copy.splits[split].to_pylist()} == found
    return found


def plan(source, shard_size=4):
    output, geometry = Output("out", shard_size=shard_size), Geometry(img_size=64, views=1)
    return make_plan(source, Inputs(source.spec), output, geometry, {"selector": BY_CENTER}, 8)


def open_source(data, splits=(), seed=0, **others):
    return sources.open_source(Inputs(str(data), tuple(splits), **others), seed)


def refusal(*arguments, **options):
    with pytest.raises(TicketSetError) as error:
        open_source(*arguments, **options)
    return str(error.value)


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)
