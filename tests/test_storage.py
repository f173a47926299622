"""Where bytes are: whose fault an error is, plain files alone, remote stores that fail in every way they can."""

import errno

import pytest

from shards.errors import first_line, is_machine_error


@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EDQUOT", "ENOTCONN", "ESTALE", "ETIMEDOUT"])
def test_what_would_meet_any_file_is_the_machines_error(name):
    assert is_machine_error(OSError(getattr(errno, name), "said by the system", "photo.jpg"))


@pytest.mark.parametrize("name", ["ENOENT", "EACCES", "EISDIR", "ELOOP", "ENAMETOOLONG", "EIO", "EINVAL", "ENOTDIR"])
def test_what_one_file_says_is_not(name):
    assert not is_machine_error(OSError(getattr(errno, name), "said by the system", "photo.jpg"))


def test_memory_is_the_machines_and_a_decoders_error_is_not():
    assert is_machine_error(MemoryError())
    assert not is_machine_error(OSError("image file is truncated"))
    assert not is_machine_error(ValueError("no OSError at all"))


def test_an_error_that_says_nothing_goes_by_its_class():
    assert first_line(KeyError()) == first_line(ValueError(" \n")).replace("Value", "Key") == "KeyError"
    assert first_line(OSError("first\nsecond")) == "first"
