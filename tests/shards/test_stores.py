"""Reading from an object store: moto, and faults before it."""

import fsspec
import pytest

from shards import storage


def test_smoke(s3, faults):
    fs, path = fsspec.core.url_to_fs(s3)
    fs.pipe_file(f"{path}/a/b", b"x" * 100000)
    faults.plan(503, "GET", "a/b", times=2)
    faults.plan("cut", "GET", "a/b", times=1)
    assert storage.read_bytes(f"{s3}/a/b") == b"x" * 100000
    assert faults.count("GET") == 4
    with pytest.raises(FileExistsError):
        fs.pipe_file(f"{path}/a/b", b"y", mode="create")
