"""Object stores and other servers, by fsspec: what is particular to its clients. `remote_file` reads from them.

Whatever a client raises becomes one line with the URL. What may pass (a store that is too busy, a connection that breaks, a
body that is cut) is tried again here, after what a client tries by itself.
"""

import contextlib
import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from shards.errors import StoreFailed, TicketSetError, first_line
from shards.signals import Signals

T = TypeVar("T")
WAITS = (0.2, 0.8)  # seconds before a second and a third try, give or take a half
# Listings are never kept, or what another process puts would not be there. Others may hand this on, as sftp does to ssh.
OBJECT_STORES = frozenset(["s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"])
_PASSING_STATUS = frozenset([408, 429, 500, 502, 503, 504])
_PASSING_ERRNO = frozenset(
    [errno.EBUSY, errno.EREMOTEIO, errno.EIO, errno.EPIPE]  # the first two are s3fs's words for 503 and 500
    + [errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH]
)
_PASSING_CLASSES = frozenset(  # or bases: the clients' own, of which none is installed for sure, and Python's
    ["ConnectionError", "TimeoutError", "HTTPClientError", "IncompleteRead", "FlexibleChecksumError"]  # botocore
    + ["ClientConnectionError", "ClientPayloadError"]  # aiohttp
    + ["ChecksumError", "ServiceRequestError", "ServiceResponseError", "TransportError"]  # gcsfs, azure, httpx
)


@contextlib.contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Whatever a store's client raises, as one line with the URL; a file that is not there stays FileNotFoundError."""
    try:
        yield
    except (TicketSetError, MemoryError):
        raise
    except ImportError as error:
        raise TicketSetError(f"{url}: {_missing_package(error)}") from None
    except Exception as error:  # each client has classes of its own, and none of them is installed for sure
        missing = isinstance(error, FileNotFoundError)
        if missing and not _is_hidden_refusal(url, error.__cause__):
            raise
        reason = error.__cause__ if missing and error.__cause__ else error
        kind = StoreFailed if _may_pass(error) else TicketSetError
        raise kind(f"{url}: {first_line(reason)}") from None


def _missing_package(error: ImportError) -> str:
    said, package = first_line(error), getattr(error.__cause__, "name", None)
    # The module that is missing is mostly, but not always, called as its package.
    return f"needs {package}: pip install {package}" if package and package in said else said


def _is_hidden_refusal(url: str, cause: BaseException | None) -> bool:
    """fsspec's HTTP says "not found" of a server that is down or forbids, too: the cause tells them apart."""
    if cause is None or isinstance(cause, FileNotFoundError) or not url.startswith(("http://", "https://")):
        return False
    return getattr(cause, "status", None) not in (404, 410)


def retry(url: str, call: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    """What a call gives that may be made twice; made again where it fails by what may pass.

    Args:
        url: what it is about, for the error.

    Raises:
        FileNotFoundError: the file is not there.
        TicketSetError: anything else that a client raises.
    """
    signals = Signals()
    with remote_errors(url), signals.untorn():  # fsspec waits for its own thread by what is not to be torn
        for wait in WAITS:
            try:
                return call(*arguments, **keywords)
            except Exception as error:
                if not _may_pass(error):
                    raise
            time.sleep(wait * random.uniform(0.5, 1.5))  # so that many clients do not come back at once
            signals.check()
        return call(*arguments, **keywords)


def _may_pass(error: BaseException) -> bool:
    """Whether it is of the moment: not of a file that is not there, of rights, or of how something was asked."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # see `_is_hidden_refusal`
        error = error.__cause__
    status = next(
        (s for name in ("status", "status_code", "code") if isinstance(s := getattr(error, name, None), int)), None
    )
    if status is not None:
        return status in _PASSING_STATUS
    names = {kind.__name__ for kind in type(error).__mro__}
    return getattr(error, "errno", None) in _PASSING_ERRNO or not names.isdisjoint(_PASSING_CLASSES)


def is_object_store(url: str) -> bool:
    """Whether it is one of those that everybody means by it: any part of a file can be read, and listings cost."""
    return url.partition("://")[0] in OBJECT_STORES


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it. Its listings are fresh: a set may have been finished meanwhile.

    It is of this process and, unless its client is asynchronous, of this thread: ask again in another.

    Raises:
        TicketSetError: fsspec does not know the protocol, lacks the package for it, or cannot log in.
    """
    with remote_errors(url), Signals().untorn():  # it may start fsspec's thread, and log in
        import fsspec

        if url.startswith(("gs://", "gcs://")):
            # gcsfs would ask what kind of bucket it is, over a protocol that emulators and closed networks let time out.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints tracebacks of what is one line here
        fs, path = fsspec.core.url_to_fs(url, **({"use_listings_cache": False} if is_object_store(url) else {}))
        fs.invalidate_cache()  # fsspec keeps its instances
        return fs, path


def list_names(url: str) -> list[str]:
    """Names directly inside a folder, sorted; empty where there is none."""
    fs, path = filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        found = (name.rstrip("/") for name in retry(url, fs.ls, path, detail=False))
        # Some tools put an empty object in place of a folder, which is then in its own listing.
        return sorted(name.rpartition("/")[2] for name in found if name != path.rstrip("/"))
    return []


def glob(url: str) -> list[str]:
    """The URLs that a pattern matches, sorted."""
    fs, path = filesystem(url)

    def look() -> list[str]:
        found = sorted(fs.glob(path))
        if not found:  # fsspec passes over what it cannot list; this says why
            fs.ls(re.split(r"[*[]", path)[0].rpartition("/")[0], detail=False)
        return [fs.unstrip_protocol(name) for name in found]

    with contextlib.suppress(FileNotFoundError):
        return retry(url, look)
    return []
