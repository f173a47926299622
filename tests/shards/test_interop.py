"""The same folder read by webdataset, timm's wds/ and pyarrow.dataset, and the shape open_clip expects."""

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch
import webdataset
from PIL import Image
from timm.data import create_dataset, create_loader

from shards.reader import TicketSet
from shards.sample import Sample


def ours(folder: Path, split: str) -> list[Sample]:
    return list(TicketSet.open(str(folder)).stream(split))


def fingerprint(image: bytes) -> bytes:
    """Decoded pixels, by which an image is known that lost its name."""
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB")).tobytes()


def shards(folder: Path, split: str) -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]


def test_webdataset_reads_every_sample_and_member(center_set: Path) -> None:
    for split, count in (("train", 21), ("val", 6)):
        read = list(webdataset.WebDataset(shards(center_set, split), shardshuffle=False))
        assert len(read) == count
        for theirs, sample in zip(read, ours(center_set, split), strict=True):
            kind = "png" if sample.image[:4] == b"\x89PNG" else "jpg"
            assert {k for k in theirs if not k.startswith("__")} == {kind, "cls", "ranking.npy", "views.npy"}
            assert theirs["__key__"] == sample.key
            assert theirs[kind] == sample.image
            assert int(theirs["cls"]) == sample.label
            assert np.array_equal(np.load(io.BytesIO(theirs["ranking.npy"])), sample.rankings)
            assert np.array_equal(np.load(io.BytesIO(theirs["views.npy"])), sample.views)


def test_webdataset_reads_ranked_views_with_their_sample(ranked_set: Path) -> None:
    """Members of one key are one sample to it, in whichever order; the views stand last in the tar."""
    for split, count in (("train", 21), ("val", 6)):
        read = list(webdataset.WebDataset(shards(ranked_set, split), shardshuffle=False))
        assert len(read) == count
        for theirs, sample in zip(read, ours(ranked_set, split), strict=True):
            names = [name for name in theirs if not name.startswith("__")]
            assert names == ["cls", "ranking.npy", "views.npy", "ranked.bin"]
            assert sample.ranked is not None and theirs["ranked.bin"] == sample.ranked.data()
            assert theirs["__key__"] == sample.key and int(theirs["cls"]) == sample.label
            assert np.array_equal(np.load(io.BytesIO(theirs["ranking.npy"])), sample.rankings)


def test_webdataset_decodes_what_it_knows(center_set: Path) -> None:
    dataset = webdataset.WebDataset(shards(center_set, "val"), shardshuffle=False).decode("rgb8")
    dataset = dataset.to_tuple("jpg;png", "cls", "ranking.npy", "views.npy")
    for (pixels, label, ranking, views), sample in zip(dataset, ours(center_set, "val"), strict=True):
        assert pixels.shape == (60, 80, 3) and label == sample.label
        assert np.array_equal(ranking, sample.rankings) and np.array_equal(views, sample.views)


def timm_dataset(folder: Path, split: str, **options: Any) -> Any:
    return create_dataset("wds/", root=str(folder), split=split, **options)


def test_timm_reads_the_images_with_their_labels(center_set: Path) -> None:
    for split, count in (("train", 21), ("val", 6)):
        dataset = timm_dataset(center_set, split)
        assert len(dataset) == count
        theirs = [(np.asarray(image).tobytes(), label) for image, label in dataset]
        assert theirs == [(fingerprint(s.image), s.label) for s in ours(center_set, split)]
    assert len({label for _, label in theirs}) == 3


def test_timm_trains_on_the_set_as_on_any_other(center_set: Path) -> None:
    labels = {fingerprint(s.image): s.label for s in ours(center_set, "train")}
    dataset = timm_dataset(center_set, "train", is_training=True, batch_size=7)
    assert len(dataset) == 21
    theirs = [(np.asarray(image).tobytes(), label) for image, label in dataset]
    assert len(theirs) == 21
    assert Counter(theirs) == Counter(labels.items())


def test_timms_loader_brings_every_label(center_set: Path) -> None:
    dataset = timm_dataset(center_set, "val", batch_size=4)
    loader = create_loader(
        dataset, (3, 32, 32), batch_size=4, num_workers=0, use_prefetcher=False, device=torch.device("cpu")
    )
    batches = list(loader)
    assert [tuple(images.shape) for images, _ in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    labels = [int(label) for _, batch in batches for label in batch]
    assert labels == [s.label for s in ours(center_set, "val")]


def test_pyarrow_reads_the_index_as_one_table(center_set: Path) -> None:
    table = pyarrow.dataset.dataset(center_set / "index").to_table()
    opened = TicketSet.open(str(center_set))
    rows = [row for split in ("train", "val") for row in opened.table(split).drop_columns("shard").to_pylist()]
    assert sorted(table.to_pylist(), key=lambda row: row["key"]) == sorted(rows, key=lambda row: row["key"])
    val = pyarrow.dataset.field("source") < "train/z"
    assert pyarrow.dataset.dataset(center_set / "index").count_rows(filter=val) == 21


def test_open_clip_finds_the_size_of_every_tar(center_set: Path) -> None:
    # open_clip sums sizes.json over the base names of the shards it was given.
    sizes = json.loads((center_set / "sizes.json").read_bytes())
    expected = {"train-000000.tar": 10, "train-000001.tar": 10, "train-000002.tar": 1, "val-000000.tar": 6}
    assert sizes == expected
    assert sum(int(sizes[os.path.basename(shard)]) for shard in shards(center_set, "train")) == 21


def test_timms_info_lists_the_shards_of_each_split(center_set: Path) -> None:
    info = json.loads((center_set / "_info.json").read_bytes())["splits"]
    assert info["val"] == {"name": "val", "num_samples": 6, "filenames": ["val-000000.tar"], "shard_lengths": [6]}
    assert info["train"]["shard_lengths"] == [10, 10, 1]
    with pytest.raises(RuntimeError, match="split test not found"):
        timm_dataset(center_set, "test")
