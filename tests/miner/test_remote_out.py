"""Mining into an object store: the bytes of a local set, whatever goes wrong on the way."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fsspec
import pytest

from conftest import contents, inspect, mine
from servers import FaultServer, upload
from shards import remote, store
from shards.reader import TicketSet

pytestmark = pytest.mark.slow
CENTER = ["--method", "center", "--views", "3", "--shard-size", "10"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What s3fs would try again by itself is left to us, and nobody waits."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(remote, "WAITS", (0, 0))


def downloaded(url: str, folder: Path) -> dict[str, bytes]:
    """What `contents` gives of a folder of the store."""
    fs, path = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    shutil.rmtree(folder, ignore_errors=True)
    for name in fs.find(path):
        (folder / name.removeprefix(f"{path}/")).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.removeprefix(f"{path}/")).write_bytes(fs.cat_file(name))
    return contents(folder)


def test_a_store_gets_the_bytes_of_a_folder_and_is_resumed_and_replaced(s3, photos, center_set, tmp_path):
    out, fs = f"{s3}/sets/center", fsspec.filesystem("s3", skip_instance_cache=True)
    mine("--data", photos, "--out", out, *CENTER)
    assert downloaded(out, tmp_path / "first") == contents(center_set)
    assert "sound" in inspect("verify", out, "--deep").output
    for name in ("manifest.json", "train-000001.json", "index/train-000001.parquet"):
        fs.rm_file(f"{out}/{name}")
    assert "resuming: 3 of 4 shards are done" in mine("--data", photos, "--out", out, *CENTER).output
    assert downloaded(out, tmp_path / "resumed") == contents(center_set)
    said = mine("--data", photos, "--out", out, *CENTER, "--seed", 1, code=1).output
    assert said.startswith("Error: s3://") and "seed: 0 there, 1 here" in said and said.count("\n") == 1
    mine("--data", photos, "--out", out, *CENTER, "--seed", 1, "--overwrite")
    mine("--data", photos, "--out", tmp_path / "other", *CENTER, "--seed", 1)
    assert downloaded(out, tmp_path / "replaced") == contents(tmp_path / "other")


@pytest.mark.long
def test_links_across_stores(s3, photos, center_set, tmp_path):
    base = upload(center_set, f"{s3}/deep/base")
    link = ["--images", "link", "--method", "random"]
    mine("--data", center_set, *link, "--out", tmp_path / "link")
    tickets = {name: data for name, data in contents(tmp_path / "link").items() if name.endswith((".tar", ".parquet"))}
    # Beside its base, relative to it; elsewhere by --base, as the command says at its end.
    mine("--data", base, *link, "--out", f"{s3}/link")
    assert TicketSet.open(f"{s3}/link").manifest.base.path == "../deep/base"
    said = mine("--data", base, *link, "--out", tmp_path / "here").output
    assert f"--base {base}" in said
    inspect("verify", tmp_path / "here", "--base", base, "--deep")
    said = mine("--data", center_set, *link, "--out", f"{s3}/far").output
    assert f"--base {center_set}" in said
    assert "expected a place on" in inspect("verify", f"{s3}/far", code=1).output
    inspect("verify", f"{s3}/far", "--base", center_set, "--deep")
    for url in (f"{s3}/link", f"{s3}/far"):
        found = downloaded(url, tmp_path / "got")
        assert {name: found[name] for name in tickets} == tickets


FAULTS = [
    (503, "PUT", r"train-000000\.tar"),
    (500, "PUT", r"train-000000\.parquet"),
    ("reset", "PUT", r"train-000001\.json"),
    ("lost", "PUT", r"train-000001\.tar"),
    ("lost", "PUT", r"plan\.json"),
    ("lost", "PUT", r"val-000000\.json"),
    ("lost", "PUT", r"manifest\.json"),
    (409, "PUT", r"plan\.json"),
    (503, "LIST", ""),
    ("cut", "GET", r"plan\.json"),
]


@pytest.mark.parametrize("elastic", [False, True])
def test_what_passes_is_mended(s3, faults: FaultServer, photos, center_set, tmp_path, elastic):
    """A lost answer most of all: what was put is then found by the next try, and is ours."""
    for fault in FAULTS:
        faults.plan(*fault, times=1)
    if elastic:
        faults.plan("lost", "PUT", r"claims/.*\.a1", times=2)
    mine("--data", photos, "--out", f"{s3}/set", *CENTER, *["--elastic"] * elastic)
    assert not any(fault.times for fault in faults.faults)
    faults.clear()
    assert downloaded(f"{s3}/set", tmp_path / "got") == contents(center_set)


@pytest.mark.long
@pytest.mark.parametrize("path", [r"train-000001\.tar", r"index/train-000001", r"train-000001\.json", r"manifest"])
def test_a_store_that_fails_for_ever_is_one_line_and_loses_nothing(s3, faults, photos, center_set, tmp_path, path):
    faults.plan(503, "PUT", path)
    said = mine("--data", photos, "--out", f"{s3}/set", *CENTER, code=1).output.splitlines()[-1]
    assert said.startswith(f"Error: {s3}/set/") and "SlowDown" in said
    faults.clear()
    assert "not finished" in inspect("info", f"{s3}/set", code=1).output
    mine("--data", photos, "--out", f"{s3}/set", *CENTER)
    assert downloaded(f"{s3}/set", tmp_path / "got") == contents(center_set)


def test_a_bucket_that_is_not_there(s3, photos):
    said = mine("--data", photos, "--out", "s3://no-such-bucket/set", *CENTER, code=1).output.splitlines()[-1]
    assert said == "Error: s3://no-such-bucket/set/plan.json: cannot be written: The specified bucket does not exist"


@pytest.mark.long
def test_a_store_that_fails_is_no_broken_plan(s3, faults, photos, center_set):
    """Nobody is to remove a set for it."""
    out = upload(center_set, f"{s3}/set")
    faults.plan(503, "GET", r"plan\.json")
    said = mine("--data", photos, "--out", out, *CENTER, code=1).output
    assert said.startswith(f"Error: {out}/plan.json: ") and "SlowDown" in said and "readable" not in said


@pytest.mark.long
def test_a_full_disk_is_that_of_temporary_files(s3, photos, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.tar.SampleTarWriter.write", full)
    said = mine("--data", photos, "--out", f"{s3}/set", *CENTER, code=1).output.splitlines()[-1]
    assert said.startswith(f"Error: {tempfile.gettempdir()}: No space left on device")


@pytest.mark.long
def test_the_object_that_stands_for_an_empty_folder_is_in_nobodys_way(s3, photos):
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file(f"{s3}/set/", b"")
    mine("--data", photos, "--out", f"{s3}/set", *CENTER)


@pytest.mark.long
def test_a_store_that_ignores_conditions_is_refused_for_several_writers_alone(s3, photos, monkeypatch):
    kept = store.RemoteStore._put
    monkeypatch.setattr(store.RemoteStore, "_put", lambda self, name, data, expected: kept(self, name, data, store.ANY))
    said = mine("--data", photos, "--out", f"{s3}/set", *CENTER, "--elastic", code=1).output.splitlines()[-1]
    assert "ignores conditional writes" in said and "a single datalth-mine can write it" in said
    mine("--data", photos, "--out", f"{s3}/set", *CENTER)
    inspect("verify", f"{s3}/set", "--deep")


def test_workers_list_each_remote_tar_once(s3, faults, photos, tmp_path):
    """To list a tar is to read it through: who comes later takes what was listed, and finds the same."""
    mine("--data", photos, "--out", tmp_path / "tars", *CENTER)
    for number, tar in enumerate(sorted((tmp_path / "tars").glob("*.tar"))):
        tar.rename(tmp_path / f"tars/{tar.name[:5].rstrip('-')}-part-{number}.tar")
    for rest in [*(tmp_path / "tars").glob("*.json"), *(tmp_path / "tars/index").iterdir()]:
        rest.unlink()
    upload(tmp_path / "tars", f"{s3}/tars")
    command = ["--data", f"{s3}/tars/*.tar", *CENTER, "--max-failures", 0]
    mine(*command, "--out", f"{s3}/one")
    faults.clear()
    # A method that cannot be imported stops a worker when it has listed.
    mine(*command, "--out", f"{s3}/two", "--elastic", "--method", "nothing:here", code=1)
    listed = faults.bytes("GET", r"part-.*tar")
    assert listed > 0 and len(fsspec.filesystem("s3").ls(f"{s3}/two/listings")) == 4
    faults.clear()
    mine(*command, "--out", f"{s3}/two", "--elastic", "--method", "nothing:here", code=1)
    assert faults.bytes("GET", r"part-.*tar") == 0
    mine(*command, "--out", f"{s3}/two", "--elastic")
    assert downloaded(f"{s3}/two", tmp_path / "two") == downloaded(f"{s3}/one", tmp_path / "one")
    assert not fsspec.filesystem("s3", skip_instance_cache=True).exists(f"{s3}/two/listings")


@pytest.mark.long
def test_a_process_killed_while_it_puts_is_resumed(s3, photos, center_set, tmp_path):
    command = [sys.executable, "-m", "miner.cli", "--data", photos, "--out", f"{s3}/set", *CENTER, "--img-size", 64]
    die = "import os, sys, shards.store as s; put = s.RemoteStore._put; s.RemoteStore._put = lambda self, name, *rest:"
    die += " os._exit(9) if name == 'index/train-000001.parquet' else put(self, name, *rest);"
    die += " from miner.cli import main; main(sys.argv[1:])"
    killed = subprocess.run([sys.executable, "-c", die, *map(str, command[3:])], check=False, capture_output=True)
    assert killed.returncode == 9, killed.stderr
    mine("--data", photos, "--out", f"{s3}/set", *CENTER)
    assert downloaded(f"{s3}/set", tmp_path / "got") == contents(center_set)
