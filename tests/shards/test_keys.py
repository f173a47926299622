"""Keys: safe as tar names, told apart, and recovered by webdataset from a member's name."""

import io
import os
import random
import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shards.keys import KEY_PATTERN, MAX_KEY_BYTES, key_of, natural_order, natural_sorted, unique_keys

LITERAL = {
    "train/ant/ant_0.jpg": "train/ant/ant_0",
    "img.1.jpg": "img%2E1",
    "v1.0/img.jpeg": "v1%2E0/img",
    "a b/c-d.JPEG": "a%20b/c-d",
    "été/ñ.png": "%C3%A9t%C3%A9/%C3%B1",
    "100%.png": "100%25",
    "猫.webp": "%E7%8C%AB",
    "noext": "noext",
    ".hidden": "%2Ehidden",
    "../../etc/passwd": "%2E%2E/%2E%2E/etc/passwd",
    "/etc/passwd.png": "etc/passwd",
    "a\\b\n.png": "a%5Cb%0A",
    "undecodable\udcff.png": "undecodable%FF",  # how Python spells a file name that is no UTF-8
}
LONG = ["n01440764/" + "x" * 100 + ".jpg", "n01440764/" + "x" * 101 + ".jpg", "é" * 40 + ".png", "." * 99, "a" * 89]


@pytest.mark.parametrize("path", LITERAL)
def test_key_is_the_path_without_extension_and_with_odd_bytes_escaped(path):
    assert key_of(path) == LITERAL[path]


def test_long_names_keep_their_head_and_end_in_a_hash_of_the_whole():
    keys = [key_of(path) for path in LONG]
    assert keys[0] == "n01440764/" + "x" * 61 + "-64b76c666b3e5b05"
    assert keys[2] == "%C3%A9" * 11 + "%C3-ae97029ca71dbf5d"
    assert len(set(keys)) == len(LONG)
    assert all(len(key) <= MAX_KEY_BYTES for key in keys)
    assert all(re.fullmatch(r"(?:[A-Za-z0-9_/-]|%[0-9A-F]{2})+", key) for key in keys), "an escape was cut in two"


def test_a_name_at_the_limit_is_kept_as_it_is():
    assert key_of("a" * MAX_KEY_BYTES + ".png") == "a" * MAX_KEY_BYTES
    assert len(key_of("a" * MAX_KEY_BYTES) + ".ranking.npy") == 100  # what a plain tar header holds


def test_the_longest_key_costs_one_header_block_only():
    name = key_of(LONG[0]) + ".ranking.npy"
    assert len(tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT)) == 512
    assert len(tarfile.TarInfo(name + "x").tobuf(tarfile.PAX_FORMAT)) > 512  # one byte more is no plain header


@pytest.mark.parametrize("path", ["../../up.png", "/abs.png", "a/../../up.png", "..", "C:\\up.png"])
def test_a_hostile_name_extracts_inside_the_folder(path, tmp_path):
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(key_of(path) + ".cls"), io.BytesIO())
    archive.seek(0)
    inside = tmp_path / "inside"
    with tarfile.open(fileobj=archive) as tar:
        tar.extractall(inside, filter="fully_trusted")  # nothing but the key keeps it inside
    assert [p.resolve().is_relative_to(inside.resolve()) for p in tmp_path.rglob("*.cls")] == [True]


@pytest.mark.parametrize("path", [*LITERAL, *LONG])
def test_webdataset_recovers_the_key_from_a_member_name(path):
    key = key_of(path)
    for member in ("ranking.npy", "views.npy", "jpg", "cls"):
        assert base_plus_ext(f"{key}.{member}") == (key, member)


def test_webdataset_would_lose_a_raw_dotted_name():
    """The control: what the escapes are for."""
    assert base_plus_ext("img.1.ranking.npy") == ("img", "1.ranking.npy")
    assert base_plus_ext("img.1.jpg")[0] == base_plus_ext("img.2.jpg")[0] == "img"


def test_equal_keys_get_numbers_in_the_order_given():
    assert unique_keys(["a.gif", "a.jpg", "a.png", "b.png"]) == (["a", "a-1", "a-2", "b"], ["a.jpg", "a.png"])


def test_a_number_never_takes_the_key_of_another_input():
    assert unique_keys(["a.jpg", "a.png", "a-1.jpg"])[0] == ["a", "a-2", "a-1"]
    assert unique_keys(["a-1.jpg", "a.gif", "a.jpg", "a.png"])[0] == ["a-1", "a", "a-2", "a-3"]
    assert unique_keys(["a.jpg", "a.png", "a-1.jpg", "a-1.png"])[0] == ["a", "a-2", "a-1", "a-1-1"]


def test_equal_long_keys_stay_different_and_short():
    keys, renamed = unique_keys(["a" * 200 + ".jpg", "a" * 200 + ".png", "a" * 200 + ".webp"])
    assert len(set(keys)) == 3 and len(renamed) == 2
    assert max(map(len, keys)) <= MAX_KEY_BYTES


def test_natural_order_counts_numbers():
    assert natural_sorted(["img10.jpg", "img2.jpg", "img02.jpg", "a/9", "a/10", "A"]) == [
        "A", "a/9", "a/10", "img02.jpg", "img2.jpg", "img10.jpg",
    ]  # fmt: skip
    assert sorted(["img10.jpg", "img2.jpg"]) == ["img10.jpg", "img2.jpg"]  # plain order does not


def test_natural_order_is_that_of_the_numbers():
    """Against the plain way to say it, over names of digits with zeros ahead, other scripts' digits, and text."""

    def by_int(text):
        parts = re.split(r"(\d+)", text)
        return [(1, int(part), part) if i % 2 else (0, 0, part) for i, part in enumerate(parts)]

    pick = random.Random(0)
    names = ["".join(pick.choices(["a", "B", "/", ".", "0", "00", "1", "2", "9", "10", "٣", "１"], k=pick.randrange(1, 7)))
             for _ in range(3000)]  # fmt: skip
    assert sorted(names, key=lambda n: (natural_order(n), n)) == sorted(names, key=lambda n: (by_int(n), n))


def test_more_digits_than_int_takes_are_sorted():
    names = ["1" + "0" * 5000, "9" * 5000, "0" * 6000 + "7", "8"]
    with pytest.raises(ValueError, match="4300"):
        int(names[0])
    assert natural_sorted(names) == [names[2], names[3], names[1], names[0]]


# Whatever a file may be called: bytes without / and NUL.
NAMES = st.binary(min_size=1, max_size=120).map(lambda b: b.translate(None, b"/\0")).filter(lambda b: b.strip(b"."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: os.fsdecode(b"/".join(names)))
ALIKE = st.from_regex(r"(a|b/)?img(\.| |-1)?[01]?(-[12])?\.(jpg|png)", fullmatch=True)  # often of one key


@given(st.sets(PATHS | ALIKE, max_size=30))
@settings(deadline=None, derandomize=True)
def test_any_paths_have_valid_keys_that_differ(paths):
    ordered = natural_sorted(paths)
    keys, renamed = unique_keys(ordered)
    assert len(keys) == len(set(keys)) == len(paths)
    for path, key in zip(ordered, keys, strict=True):
        assert re.fullmatch(KEY_PATTERN, key) and (path in renamed or key == key_of(path))
        name = base_plus_ext(f"{key}.ranking.npy")
        assert name == (key, "ranking.npy")  # webdataset finds it again
    assert unique_keys(ordered) == (keys, renamed)
