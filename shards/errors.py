"""Errors a person is meant to read: one line saying what, where, expected, got."""


class TicketSetError(ValueError):
    """A ticket set, a source or an argument is not what it should be; the command line prints it and exits 1."""


class ImageError(ValueError):
    """One input image cannot be used; the reason goes into its row of the index."""


def first_line(error: Exception) -> str:
    """What an error of a library says, as part of a line of ours; its class where it says nothing."""
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]
