"""Images in an object store are mined as those on a disk: folders by one listing, tars by their offsets."""

import json
import pickle
import shutil

import pytest

from conftest import contents, mine
from inputs import open_source, read_all, refusal, rows, write_tar, write_tree
from miner.sources.listings import Listing
from servers import upload
from shards import remote
from shards.errors import TicketSetError

MANY = ["train/ant/1.jpg", "train/ant/deep/er/2.JPG", "train/bee/10.png", "train/bee/9.png", "train/bee/notes.txt",
        "train/loose.jpg", "train/.hidden.jpg", "train/@eaDir/x.jpg", "val/bee/1.jpg", "docs/read.me"]  # fmt: skip


def compared(local, far, **options):
    """A folder as a source, and the same one in a store: rows, classes, notes and bytes."""
    one, other = open_source(local, **options), open_source(far, **options)
    assert other.classes == one.classes and other.splits.keys() == one.splits.keys()
    for split in one.splits:
        assert rows(other, split) == rows(one, split)
        assert read_all(other, split) == read_all(one, split)
    assert [note.replace(far, str(local)) for note in other.notes] == one.notes
    assert (other.own_val, other.in_order) == (one.own_val, one.in_order)
    return other


@pytest.mark.parametrize(
    "paths",
    [MANY, ["b/1.jpg", "a/2.jpg", "a/x y+%.jpg", "ü/ß.jpg"], ["1.jpg", "2.jpg", "3.txt"], ["validation/a/1.jpg"]],
    ids=["splits", "classes", "flat", "val alone"],
)
def test_a_folder_in_a_store_is_the_folder_on_a_disk(s3, tmp_path, paths):
    compared(write_tree(tmp_path / "photos", *paths), upload(tmp_path / "photos", f"{s3}/some/photos"))


def test_it_is_listed_once_and_an_image_is_one_request(s3, faults, tmp_path):
    write_tree(tmp_path / "photos", *MANY)
    far = upload(tmp_path / "photos", f"{s3}/photos")
    faults.clear()
    source = open_source(far)
    assert faults.count("LIST", "delimiter=&") == 1
    assert faults.count("GET") == 0
    faults.clear()
    read_all(source)  # twice
    assert faults.count("GET") == len(faults.requests) == 2 * 4


def test_what_is_wrong_with_a_folder_is_said_as_of_a_local_one(s3, tmp_path):
    for number, paths in enumerate((["train/a/1.txt"], ["train/a/1.jpg", "val/b/1.jpg"], ["set/train/a/1.jpg", "set/val/a/1.jpg"],
                                    ["photos.tar.gz"], ["train/a/1.jpg", "Training/a/1.jpg"])):  # fmt: skip
        write_tree(tmp_path / f"{number}/photos", *paths)
        far = upload(tmp_path / f"{number}/photos", f"{s3}/{number}/photos")
        assert refusal(far).replace(far, "DIR") == refusal(tmp_path / f"{number}/photos").replace(
            str(tmp_path / f"{number}/photos"), "DIR"
        )
    assert refusal(f"{s3}/nowhere").startswith(f"`data` {s3}/nowhere: nothing is there; expected one of")
    assert "bucket-that-is-none" in refusal("s3://bucket-that-is-none/photos")


def test_markers_of_folders_and_names_with_empty_parts(s3, tmp_path):
    """Consoles of stores put an empty object `ant/`; a key may hold // as well."""
    fs, path = remote.filesystem(f"{s3}/photos")
    for key in ("train/ant/1.jpg", "train/bee/", "train/ant//2.jpg", "train/ant", "/train/ant/3.jpg"):
        fs.call_s3("put_object", Bucket=path.split("/")[0], Key=f"photos/{key}", Body=b"x")
    source = open_source(f"{s3}/photos/", val_share=0)
    assert [row[1] for row in rows(source)] == ["train/ant/1.jpg"] and source.classes == ["ant", "bee"]
    assert any("2 objects are left out: a folder in their names is called nothing" in note for note in source.notes)
    assert any("1 of 2 classes hold no images (first: bee)" in note for note in source.notes)


def test_an_image_that_changed_is_read_as_it_is_now(s3, tmp_path):
    write_tree(tmp_path / "photos", "a/1.jpg", "b/1.jpg", "b/2.jpg")
    source = open_source(upload(tmp_path / "photos", f"{s3}/photos"), val_share=0)
    fs, path = remote.filesystem(f"{s3}/photos")
    fs.pipe_file(f"{path}/a/1.jpg", b"longer than before")
    fs.pipe_file(f"{path}/b/1.jpg", b"less")
    fs.rm_file(f"{path}/b/2.jpg")
    first, second, third = source.splits["train"].to_pylist()
    assert source.read(first)[0] == b"longer than before" and source.read(second)[0] == b"less"
    with pytest.raises(FileNotFoundError):  # a failed row, as of a disk
        source.read(third)


def test_a_store_that_fails_is_no_image_that_fails(s3, faults, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    far = upload(photos, f"{s3}/photos")
    faults.plan(503, "GET", "bee_1", times=2)
    mine("--data", far, "--out", tmp_path / "mended", "--method", "center", "--views", 1)
    assert json.loads((tmp_path / "mended/manifest.json").read_bytes())["splits"]["train"]["failed"] == 0
    faults.plan(503, "GET", "cat_1")
    output = mine("--data", far, "--out", tmp_path / "out", "--method", "center", "--views", 1, code=1).output
    assert f"{far}/train/cat/cat_1.jpg: [Errno 16] SlowDown" in output.splitlines()[-1]


def test_the_listing_stays_behind_when_a_source_is_sent(s3, tmp_path):
    write_tree(tmp_path / "photos", *(f"class/{'long' * 20}{i}.jpg" for i in range(100)))
    source = open_source(upload(tmp_path / "photos", f"{s3}/photos"))
    assert len(pickle.dumps(source.read)) < 1000


def test_a_set_of_a_remote_folder_is_the_one_of_the_local_folder(s3, photos, tmp_path, center_set):
    far = upload(photos, f"{s3}/photos")
    mine("--data", far, "--out", tmp_path / "set", "--method", "center", "--views", 3, "--shard-size", 10)
    assert contents(tmp_path / "set") == contents(center_set)


def test_tars_in_a_store(s3, faults, photos, tmp_path):
    """By a pattern, by braces, and as a folder that holds nothing else; the same images whichever. They come twice: to be
    listed, and to be mined, however many threads read."""
    for number in range(3):
        members = {
            f"{number}{path.stem}.{path.suffix[1:] if kind == 'image' else kind}": path.read_bytes()
            if kind == "image"
            else b"0"
            for path in sorted((photos / "train/ant").iterdir())
            for kind in ("image", "cls")
        }
        write_tar(tmp_path / f"train-{number}.tar", members)
    upload(tmp_path, f"{s3}/tars")
    sizes = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    local = open_source(f"{tmp_path}/train-*.tar")
    for spec in ("tars/train-*.tar", "tars/train-{0..2}.tar", "tars"):
        source = open_source(f"{s3}/{spec}")
        assert read_all(source) == read_all(local) and len(source.splits["train"]) == len(local.splits["train"])
    faults.clear()
    mine("--data", f"{s3}/tars/*.tar", "--out", tmp_path / "far", "--method", "center", "--views", 1, "--shard-size", 7)
    assert (faults.count("GET"), faults.bytes("GET")) == (2 * 3, 2 * sizes)
    mine("--data", f"{s3}/tars", "--out", tmp_path / "folder", "--method", "center", "--views", 1, "--shard-size", 7)
    tars = [sorted(path.read_bytes() for path in (tmp_path / name).glob("*.tar")) for name in ("far", "folder")]
    assert tars[0] == tars[1]


def test_a_ticket_set_in_a_store_is_mined_from(s3, center_set, tmp_path):
    far = upload(center_set, f"{s3}/sets/base")
    mine("--data", far, "--out", tmp_path / "copy", "--method", "random")
    shutil.copytree(center_set, tmp_path / "sets/base")
    mine("--data", tmp_path / "sets/base", "--out", tmp_path / "local", "--method", "random")
    tars = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.tar")} for name in ("copy", "local")]
    assert tars[0] == tars[1] != {}
    (tmp_path / "unfinished").mkdir()
    shutil.copy(center_set / "plan.json", tmp_path / "unfinished")
    assert "not finished" in refusal(upload(tmp_path / "unfinished", f"{s3}/unfinished"))


@pytest.mark.parametrize("said", [b"{}", b'{"images": [], "labels": [1], "notes": {}}', b'{"images": [[1]]}'])
def test_a_listing_that_is_none_is_one_line(said):
    with pytest.raises(TicketSetError, match="listings/a.json: expected the listing of a tar; remove it"):
        Listing.parse(said, "listings/a.json")
