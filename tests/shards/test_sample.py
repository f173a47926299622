"""The sample codec: what is encoded is what is decoded, through a tar and its index, whatever it is."""

import io
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import format as fmt
from shards.errors import TicketSetError
from shards.images import StoredImage
from shards.sample import Row, decode, decode_token_labels, encode_image, encode_tickets, encode_token_labels
from shards.schema import BaseLink, Counts, FileDigest, LabelerIdentity, Manifest, Member, SelectorIdentity, SplitStats
from shards.tar import SampleTarWriter, split_members
from shards.views import image_views

NUM_CLASSES = 7
SELECTOR = SelectorIdentity(
    method="m", model=None, state=None, keep_rate=None, counts=(), blocks=(), input_size=None, mean=(), std=(),
    dtype="float32", compiled=False, code=None,
)  # fmt: skip
LABELER = LabelerIdentity(
    model="m", state="0" * 64, input_size=8, grid=(2, 2), top=5, mean=(), std=(), dtype="float32", batch_size=1
)


def manifest(side: int, k: int, views: int) -> Manifest:
    """Of a set of side x side patches; `decode` looks at these fields alone."""
    counts = dict.fromkeys((field.name for field in fields(Counts) if field.name != "others"), 1)
    split = SplitStats(views=views, scale=(0.08, 1), ratio=(0.75, 1.33), hflip=0.5, **counts)
    return Manifest(
        format=fmt.FORMAT, kind=fmt.KIND, plan_id="0" * 64, set_id="0" * 64, plan=FileDigest(bytes=1, sha256="0" * 64),
        classes=tuple(f"class {i}" for i in range(NUM_CLASSES)), members={fmt.LABEL: Member()}, base=None,
        splits={"train": split}, totals=Counts(**counts), selector=SELECTOR, img_size=side, patch_size=1, grid=(side, side),
        k=k, exif="ignore", store_side=None, seed=0, token_labels=LABELER,
    )  # fmt: skip


@st.composite
def samples(draw):
    """(manifest, row, stored image, views, rankings)"""
    side, count = draw(st.sampled_from([1, 2, 4, 16, 17])), draw(st.integers(1, 5))  # 17 x 17 needs two bytes a patch
    n, width, height = side * side, draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    seed, key = draw(st.integers(0, 2**63 - 1)), draw(st.from_regex(r"[A-Za-z0-9_/%-]{1,88}", fullmatch=True))
    rankings = np.random.default_rng(seed).permuted(np.tile(np.arange(n), (count, 1)), axis=1)
    data, member = draw(st.binary(max_size=2000)), draw(st.sampled_from(fmt.IMAGE_MEMBERS))
    stored = StoredImage(data, member, width, height, width, height, draw(st.integers(1, 8)), draw(st.booleans()))
    row = Row(key, draw(st.none() | st.integers(0, NUM_CLASSES - 1)), height, width)
    views = image_views(seed, key, count, width, height)
    return manifest(side, draw(st.integers(1, n)), count), row, stored, views, rankings


def through_a_tar(key: str, members: dict[str, bytes]) -> dict[str, bytes]:
    """The members read back from the sample's extent, between two others."""
    out = io.BytesIO()
    writer = SampleTarWriter(out)
    writer.write("before", {"cls": b"1"})
    offset, size = writer.write(key, members)
    writer.write("behind", {"cls": b"1"})
    writer.close()
    return split_members(out.getvalue()[offset : offset + size], key, "here")


@given(samples())
@settings(deadline=None, derandomize=True)
def test_a_sample_comes_back_as_it_was(sample):
    said, row, stored, views, rankings = sample
    pictured, columns = encode_image(row.label, stored, inside=True)
    ranked, bitmap = encode_tickets(views, rankings, said.k)
    members = through_a_tar(row.key, pictured | ranked)
    found = decode(row, said, "train", members, members, None, "here")
    assert (found.key, found.image, found.label) == (row.key, stored.data, row.label)
    assert (found.size, found.k, found.exif, found.token_labels) == ((row.height, row.width), said.k, "ignore", None)
    assert np.array_equal(found.views, views) and np.array_equal(found.rankings, rankings)
    assert found.rankings.dtype == fmt.ranking_dtype(said.num_patches)
    assert np.flatnonzero(fmt.unpack_ticket(bitmap["ticket"], said.num_patches)).tolist() == sorted(found.tickets[0])
    assert (columns["label"], columns["width"], columns["height"]) == (row.label, row.width, row.height)
    assert columns["orientation"] == stored.orientation and columns["transcoded"] == stored.transcoded


@given(samples())
@settings(deadline=None, derandomize=True)
def test_a_linked_sample_takes_its_image_from_the_base(sample):
    said, row, stored, views, rankings = sample
    own = encode_image(row.label, stored, inside=False)[0] | encode_tickets(views, rankings, said.k)[0]
    assert stored.member not in own
    base = encode_image(row.label, stored, inside=True)[0]
    assert decode(row, said, "train", own, base, None, "here").image == stored.data
    linked = replace(said, base=BaseLink(set_id="0" * 64, path="../base"))
    assert decode(row, linked, "train", own, None, None, "here").image == b""  # opened without images
    with pytest.raises(TicketSetError, match="expected an image, a ranking and views"):
        decode(row, said, "train", own, own, None, "here")


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, derandomize=True)
def test_token_labels_come_back_to_half_a_unit(seed):
    rng = np.random.default_rng(seed)
    classes = np.argsort(rng.random((NUM_CLASSES, 2, 2)), axis=0)[:5]
    shares = -np.sort(-rng.dirichlet(np.ones(NUM_CLASSES), (2, 2)).transpose(2, 0, 1)[:5], axis=0)
    members = through_a_tar("a/b", encode_token_labels(shares, classes)[0])
    units, found = decode_token_labels(manifest(2, 1, 1), members, "here")
    assert np.array_equal(found, classes) and np.abs(units / 65535 - shares).max() <= 0.5 / 65535 + 1e-9


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("expected label 3", lambda m: m.update(cls=b"4")),
        ("expected label 3", lambda m: m.pop("cls")),
        ("expected an image, a ranking and views", lambda m: m.pop(fmt.RANKING)),
        ("expected an image, a ranking and views", lambda m: m.pop(fmt.VIEWS)),
        ("permutations of 4 patches", lambda m: m.update({fmt.RANKING: fmt.encode_npy(np.zeros((2, 4), np.uint8))})),
        ("expected uint8 rankings of 2 views", lambda m: m.update({fmt.RANKING: fmt.encode_npy(np.zeros((1, 4), np.uint8))})),
        ("view 0 is not inside the 20x30 image", lambda m: m.update({fmt.VIEWS: fmt.encode_npy(np.full((2, 5), 21, np.int32))})),
    ],
)  # fmt: skip
def test_what_manifest_and_row_do_not_say_is_refused(words, change):
    row, views = Row("a", 3, 30, 20), image_views(0, "a", 2, 20, 30)
    members = encode_image(3, StoredImage(b"jpg", "jpg", 20, 30, 20, 30, 1, False), inside=True)[0]
    members |= encode_tickets(views, np.tile(np.arange(4), (2, 1)), 2)[0]
    assert decode(row, manifest(2, 2, 2), "train", members, members, None, "here").label == 3
    change(members)
    with pytest.raises(TicketSetError, match=f"here: .*{words}"):
        decode(row, manifest(2, 2, 2), "train", members, members, None, "here")
