"""A tar file as a source sees it: its members by their headers, whatever kind of member they are.

tarfile reads the headers; on top of it no member is passed over. Links are followed inside the archive,
sparse members are laid out, archives joined by `cat` are read on, and what has no bytes to give is a
member with a reason. Nothing is unpacked, and a forged header can neither loop nor fill the memory.
"""

import bisect
import contextlib
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from miner.sources.source import JUNK_NOTE, Tally, check_size, is_junk, spelled
from shards import storage
from shards.errors import ImageError, TicketSetError, first_line

MAX_HEADER = 1 << 20  # bytes of one member's headers: long names, PAX records, the map of a sparse file
MAX_LINKS = 40  # followed one after another, as Linux does
JOINED = "{count} tars hold several archives joined in one file, and all are read (first: {first})"
TRAILING = "{count} tars hold bytes behind their end mark that are no members and are not read (first: {first})"
REPLACED = "{count} members were appended again under a name that was there; the last one counts (first: {first})"
_PACKERS = {b"\x1f\x8b": "gzip", b"BZh91AY&SY": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
_UNPACKERS = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
_ENDINGS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".tbz2": "bzip2", ".xz": "xz", ".txz": "xz", ".zst": "zstd"}
_KINDS = {
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}
# Sparse files of other writers, which tarfile takes for plain ones.
_OTHER_SPARSE = ("GNU.sparse.", "SCHILY.realsize", "SUN.holesdata")

Pieces = list[tuple[int, int]]  # of a sparse file: (place in it, bytes) of all that is not zeros


@dataclass(slots=True)
class Member:
    """A member that is no folder.

    Attributes:
        name: as the tar spells it; bytes that are no UTF-8 are surrogates.
        header: where its headers begin.
        offset, size: of its data; of a sparse member, where the stored pieces begin and the bytes of the whole.
        odd: None for a plain run of bytes, the pieces of a sparse member, or why there are no bytes to read.
        target: of a link that `Archive.follow` has not followed yet, the name that it leads to.
        symbolic: its target may also come after it.
    """

    name: str
    header: int
    offset: int
    size: int
    odd: Pieces | str | None = None
    target: str | None = None
    symbolic: bool = False


class Archive:
    """One tar, or several joined, in an open file.

    Args:
        file: seekable, at any position.
        where: names it in errors.
        tally: takes what a person should know of it.
    """

    def __init__(self, file: BinaryIO, where: str, tally: Tally) -> None:
        self.file, self._where, self._tally = file, where, tally
        self._targets: set[str] = set()

    def __iter__(self) -> Iterator[Member]:
        """Members in the order of the file, one at a time and without keeping them; hidden ones are left out.

        Raises:
            TicketSetError: compressed, cut off, or with a header that is none.
        """
        for member in self._scan(self._tally):
            name = member.name.strip("/")
            if any(map(is_junk, name.split("/"))):
                self._tally.add(JUNK_NOTE, f"{self._where}: {spelled(name)}")
            else:
                yield member

    def follow(self, members: Iterable[Member]) -> None:
        """Give those of `members` that are links the data they lead to, or the reason why there is none.

        Costs one more pass over the headers, and only where there are links. As in unpacking, a hard link
        means the last member of that name before it, a symbolic link the last of all.
        """
        links = [member for member in members if member.target is not None]
        known: dict[str, list[Member]] = {}
        for member in self._scan(Tally()) if links else ():
            if _normal(member.name) in self._targets:
                known.setdefault(_normal(member.name), []).append(member)
        for link in links:
            end: Member | None = link
            for _ in range(MAX_LINKS):
                if end is None or end.target is None:
                    break
                named = known.get(end.target, [])
                before = len(named) if end.symbolic else bisect.bisect_left(named, end.header, key=lambda m: m.header)
                end = named[before - 1] if before else None
            if end is None:
                link.odd = f"is a link to {spelled(link.target or '')}, which is not in its tar"
            elif end.target is not None:
                link.odd = (
                    f"is a link to {spelled(link.target or '')}, and that to another, more than {MAX_LINKS} times"
                )
            elif isinstance(end.odd, str):
                link.odd = end.odd
            else:
                link.offset, link.size, link.odd = end.offset, end.size, end.odd
            link.target = None

    def read(self, member: Member) -> bytes:
        """The bytes of a member whose links were followed.

        Raises:
            ImageError: it has none.
        """
        return member_bytes(self._read_at, member.offset, member.size, member.odd, self._where, member.name)

    def _read_at(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(size)

    def _scan(self, tally: Tally) -> Iterator[Member]:
        """All members; the end mark of one archive may be followed by another."""
        size = self.file.seek(0, 2)
        self._refuse_compressed()
        self.file.seek(0)
        headers = _Headers(self.file)
        end, joined = 0, 1
        with self._readable():
            tar = tarfile.TarFile(fileobj=headers, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        while True:
            with self._readable():
                info = tar.next()
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header it saw
                headers.left = MAX_HEADER
            if info is None:
                another = self._behind_end_mark(tar.offset, tally)
                if another is None:
                    break
                tar.offset, tar.pax_headers, joined = another, {}, joined + 1
                continue
            if info.size < 0 or not end <= info.offset < info.offset_data <= tar.offset:
                raise self._broken(f"{spelled(info.name)} at {info.offset} has a header of impossible numbers")
            if tar.offset > size:
                raise self._broken(
                    f"unexpected end of data: {spelled(info.name)} at {info.offset} reaches to {tar.offset},"
                    f" the file to {size}"
                )
            end = tar.offset
            if not info.isdir():
                member = _member(info, end)
                if member.target is not None:
                    self._targets.add(member.target)
                yield member
        if joined > 1:
            tally.add(JOINED, f"{self._where}: {joined} archives")

    def _behind_end_mark(self, position: int, tally: Tally) -> int | None:
        """Where another archive begins; tarfile takes a broken header, and a cut, for an end mark too."""
        block = self._read_at(position, tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):
            got = "something else" if len(block) == tarfile.BLOCKSIZE else "the end of the file"
            raise self._broken(f"expected a member or the end mark at {position}, got {got}")
        while block and not block.strip(b"\0"):
            position += len(block)
            block = self.file.read(1 << 20)
        if not block:
            return None
        position += (len(block) - len(block.lstrip(b"\0"))) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        try:
            tarfile.TarInfo.frombuf(self._read_at(position, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError, IndexError):
            tally.add(TRAILING, f"{self._where}: at {position}")
            return None
        return position

    def _refuse_compressed(self) -> None:
        start = self._read_at(0, 10)
        packer = next((packer for magic, packer in _PACKERS.items() if start.startswith(magic)), None)
        if packer:
            raise compressed(self._where, packer)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """tarfile raises whatever a forged header makes it trip over."""
        try:
            yield
        except Exception as error:
            raise self._broken(first_line(error)) from None

    def _broken(self, why: str) -> TicketSetError:
        return TicketSetError(f"{self._where}: not a readable tar: {why}")


@contextlib.contextmanager
def open_archive(url: str, tally: Tally) -> Iterator[Archive]:
    """A tar opened for listing, local or remote.

    Raises:
        TicketSetError: it is not there, cannot be opened, or is no file.
    """
    try:
        file = storage.open_file(url)
    except FileNotFoundError:
        raise TicketSetError(f"{url}: no such file") from None
    except OSError as error:
        raise TicketSetError(f"{url}: not a readable tar: {error.strerror or error}") from None
    with file:
        yield Archive(file, url, tally)


def member_bytes(
    read: Callable[[int, int], bytes], offset: int, size: int, odd: Pieces | str | None, tar: str, name: str
) -> bytes:
    """The bytes of a member.

    Args:
        read: (offset, size) -> bytes of the tar.
        offset, size, odd: as in Member.
        tar, name: for the error.
    Raises:
        ImageError: it has none, or too many.
        OSError: the tar ends inside it.
    """
    if isinstance(odd, str):
        raise ImageError(odd)
    check_size(size)
    parts = []
    for _, count in [(0, size)] if odd is None else odd:
        parts.append(read(offset, count))
        if len(parts[-1]) != count:
            raise OSError(f"{posixpath.basename(tar)} ends inside {spelled(name)}")
        offset += count
    if odd is None:
        return parts[0]
    whole = bytearray(size)
    for (start, count), part in zip(odd, parts, strict=True):
        whole[start : start + count] = part
    return bytes(whole)


def compressed(where: str, packer: str) -> TicketSetError:
    """The refusal of a compressed tar: nothing in it can be reached by its offset."""
    return TicketSetError(f"{where}: is compressed ({packer}): unpack it first, e.g. {_UNPACKERS[packer]} FILE")


def packer_of(path: str) -> str | None:
    """What a tar of such a name is compressed by."""
    stem, ending = posixpath.splitext(path.lower())
    return _ENDINGS.get(ending) if ending.startswith(".t") or stem.endswith(".tar") else None


class _Headers:
    """The file as tarfile sees it: what one member's headers may take is bounded."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.left = file, MAX_HEADER
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"a header at {self.tell()} of more than {MAX_HEADER} bytes")
        return self._file.read(size)


def _member(info: tarfile.TarInfo, end: int) -> Member:
    member = Member(info.name, info.offset, info.offset_data, info.size)
    if info.issparse():
        member.odd = _pieces(info, end - info.offset_data)
    elif any(key.startswith(_OTHER_SPARSE) for key in info.pax_headers):
        member.odd = "is a sparse file of a kind that is not known here"
    elif info.islnk():
        member.target = _normal(info.linkname)
    elif info.issym():
        member.target, member.symbolic = _normal(posixpath.join(posixpath.dirname(info.name), info.linkname)), True
    elif not info.isreg():
        member.odd = f"expected a plain file, got {_KINDS.get(info.type, f'a member of type {info.type!r}')}"
    return member


def _pieces(info: tarfile.TarInfo, stored: int) -> Pieces | str:
    """The map of a sparse member, if it fits the file and what is stored of it."""
    found: Any = info.sparse
    pieces: Pieces = [(start, count) for start, count in found if count]
    last = 0
    for start, count in pieces:
        if count < 0 or start < last:
            break
        last = start + count
    else:
        if last <= info.size and sum(count for _, count in pieces) <= stored:
            return pieces
    return "is a sparse file whose map does not fit it"


def _normal(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))
