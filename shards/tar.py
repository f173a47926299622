"""Samples in a tar: written by webdataset's TarWriter, read by offset.

A sample's members lie next to each other, so one read of (offset, bytes) from the index brings all of them, and every
sample is within reach. tarfile would read header after header.
"""

import re
import zlib
from typing import Any

from shards import format as fmt
from shards.errors import TicketSetError

BLOCK = 512
# From byte 124 on: size, time, checksum, and the type of a plain file.
_NUMBERS = re.compile(rb"([0-7]{11})\0.{12}([0-7]{6})\0 [0\0]", re.DOTALL)


class SampleTarWriter:
    """Appends samples to anything with `write(bytes)`; equal samples give equal bytes (mtime 0, members sorted, ranked views last)."""

    def __init__(self, file: Any) -> None:
        from webdataset import TarWriter  # imports torch

        # encoder=False: members are bytes already, images must not be encoded again. An integer mtime
        # keeps the headers plain; the default, a float, would add 1024 bytes a member.
        self._tar = TarWriter(file, encoder=False, mtime=0)

    def write(self, key: str, members: dict[str, bytes]) -> tuple[int, int]:
        """Append one sample; returns its (offset, bytes) in the tar, headers and padding included."""
        offset = self._tar.tarstream.offset
        for last in (False, True):  # TarWriter sorts what it is given; to readers, one key is one sample
            some = {member: data for member, data in members.items() if (member == fmt.RANKED) == last}
            if some:
                self._tar.write({"__key__": key, **some})
        return offset, self._tar.tarstream.offset - offset

    def close(self) -> None:
        """Write the end-of-archive blocks; the file itself stays open."""
        self._tar.close()


def split_members(data: bytes, key: str, where: str) -> dict[str, bytes]:
    """The members of one sample from the bytes of its extent.

    Returns:
        name after `KEY.` -> contents
    Raises:
        TicketSetError: the bytes are not tar members of this key (a truncated or exchanged tar, or another's index).
    """
    return {name: data[start : start + size] for name, (start, size) in member_places(data, key, where).items()}


def member_places(data: bytes, key: str, where: str, whole: int | None = None) -> dict[str, tuple[int, int]]:
    """Where the members of one sample lie.

    Args:
        data: of its extent, from the beginning.
        key: of the sample.
        where: for errors.
        whole: bytes of the extent, where `data` is only a part of it: the last member may then end outside `data`.
    Returns:
        name after `KEY.` -> (first byte, bytes)
    Raises:
        TicketSetError: as `split_members`.
    """
    members: dict[str, tuple[int, int]] = {}
    position = 0
    while position < len(data):
        header = data[position : position + BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        size = _member_size(header)
        start = position + BLOCK
        if size is None or not name.startswith(key + ".") or start + size > (whole or len(data)):
            damaged = " with a header that is damaged, or of no plain file" if size is None and name else ""
            raise TicketSetError(f"{where}: expected a member of {key}, got {name[:100] or 'nothing'!r}{damaged}")
        member = name[len(key) + 1 :]
        if member in members:
            raise TicketSetError(f"{where}: {key}: expected each member once, got {member!r} twice")
        members[member] = start, size
        position = start + -(-size // BLOCK) * BLOCK
    return members


def _member_size(header: bytes) -> int | None:
    """Bytes of a plain file's member; None where it is none or the header's checksum is wrong.

    The two numbers are octal digits and nothing else: int() alone would take a sign, and a member of negative size leads
    back to where it began.
    """
    found = _NUMBERS.match(header, 124)
    if found is None:
        return None
    size, checksum = found.groups()
    # The checksum, a sum of bytes, is taken as if its own eight were spaces. The low half of Adler's is 1 + that sum modulo
    # a prime, in a tenth of the time that Python sums 512 bytes.
    found_sum = zlib.adler32(b" " * 8, zlib.adler32(header[156:], zlib.adler32(header[:148]))) & 0xFFFF
    return int(size, 8) if found_sum == (1 + int(checksum, 8)) % 65521 else None
