"""Errors a person is meant to read: one line saying what, where, expected, got."""

import errno

# Open files, memory, disk space, and the server of a network file system.
_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        *("EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ENOSPC", "EDQUOT"),
        *("ENOTCONN", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ETIMEDOUT", "ESTALE"),
    )
    if hasattr(errno, name)  # not every platform has all
)


class TicketSetError(ValueError):
    """A ticket set, a source or an argument is not what it should be; the command line prints it and exits 1."""


class StoreFailed(TicketSetError):
    """A store that is too busy, broken or out of reach for now: neither the set nor the command is to blame."""


class ImageError(ValueError):
    """One input image cannot be used; the reason goes into its row of the index."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, as part of a line of ours; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def is_machine_error(error: BaseException) -> bool:
    """Whether an error is the machine's and would meet any file: never a row of the data, the command stops.

    EIO is not among them: it is what a bad sector below one photo says. That photo is a failed row, which
    --retry-failed reads again; a disk that is dying fails so many that --max-failures stops the run.
    """
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _MACHINE)
