"""The folder that a ticket set is mined into: whether it may be, what is done in it, what is removed from it."""

import math
import os
import re
from pathlib import Path

from miner.settings import Fleet, Output
from shards import format as fmt
from shards import storage
from shards.errors import TicketSetError
from shards.schema import MAX_JSON_BYTES, parse_plan
from shards.store import Store, open_store


def check_alone(output: Output, fleet: Fleet, world: int) -> None:
    """Refuse what several workers, or ranks, `world` of them, would undo for each other.

    Raises:
        TicketSetError: see above.
    """
    if world == 1 and not fleet.elastic:
        return
    if fleet.ray is not None and world > 1:
        raise TicketSetError("`ray` under torchrun: Ray starts the workers; run the command once, without torchrun")
    how, without = ("`elastic`", "it") if fleet.elastic else ("under torchrun", "torchrun")
    if output.overwrite:
        raise TicketSetError(f"`overwrite` {how}: workers would remove each other's work; remove the folder first")
    if output.retry_failed:
        raise TicketSetError(
            f"`retry_failed` {how}: one could finalize what another takes back; run it once without {without} and stop"
            f" it, then run the others without the flag"
        )


def check_target(out: str, data: str) -> None:
    """Refuse an output folder that is none of ours.

    Raises:
        TicketSetError: it holds something that is no ticket set, or lies inside the data.
    """
    if _ALMOST_URL.match(out):
        raise TicketSetError(f"`out` {out}: expected two slashes behind the colon")
    store = open_store(out)
    if os.path.isfile(store.url):
        raise TicketSetError(f"`out` {out}: expected a folder, got a file")
    if _is_inside(store.url, data):
        raise TicketSetError(f"`out` {out}: lies inside `data` {data}; its shards would be taken for images")
    ours = (fmt.CLAIMS, fmt.LISTINGS)  # of workers that were stopped before there was a plan; some stores keep folders
    names = [name for name in storage.list_names(store.url) if not name.endswith(".tmp") and name not in ours]
    if "__init__.py" in names:
        raise TicketSetError(
            f"`out` {out}: this is Python source code (it holds __init__.py); run in a work folder, or name another `out`"
        )
    if names and fmt.PLAN not in names:
        raise TicketSetError(f"`out` {out}: holds other files (first: {names[0]}); give an empty or new folder")
    if names:
        found = store.read(fmt.PLAN, MAX_JSON_BYTES)  # a store that fails says nothing of the plan
        try:
            parse_plan(found, store.at(fmt.PLAN))
        except TicketSetError as error:
            raise TicketSetError(
                f"{store.at(fmt.PLAN)}: not readable as a plan ({error}); empty the folder yourself, or give another `out`"
            ) from None


def _is_inside(out: str, data: str) -> bool:
    data = storage.local(data)
    if storage.is_remote(out):
        return f"{out}/".startswith(f"{data.rstrip('/')}/")
    roots = [data, os.path.join(os.environ.get("DATALTH_DATA", data), data)]
    return any(os.path.isdir(root) and Path(out).resolve().is_relative_to(Path(root).resolve()) for root in roots)


_ALMOST_URL = re.compile(r"[a-z][a-z0-9+]+:/(?!/)")  # it would be a folder called s3:
_FOR_WORKERS = {
    fmt.CLAIMS: re.compile(r".*\.a[0-9]+(\.failed|\.dropped)?|lock", re.DOTALL),
    fmt.LISTINGS: re.compile(r"[0-9a-f]{32}\.json"),
}
_TEMPORARY = re.compile(r".*\.tmp|clock-[0-9a-f]{16}", re.DOTALL)  # what `Store.clock` puts lives for a moment
_SHARD_FILE = re.compile(r".*-[0-9]{6}\.(json|tar|parquet)", re.DOTALL)


def remove_set(store: Store) -> None:
    """Remove a ticket set's own files, the manifest first; anything else in the folder stays."""
    remove_temporary(store)
    store.remove([fmt.MANIFEST, fmt.TIMM_INFO, fmt.OPEN_CLIP_SIZES])
    shards = [name for name in store.entries() if _SHARD_FILE.fullmatch(name)]
    store.remove(name for name in shards if name.endswith(".json"))  # first: a shard whose JSON is there is done
    store.remove(name for name in shards if not name.endswith(".json"))
    store.remove(f"{fmt.INDEX}/{name}" for name in store.entries(fmt.INDEX) if _SHARD_FILE.fullmatch(name))
    remove_claims(store)
    store.remove([fmt.PLAN])  # last: until then the folder is known to be ours


def remove_claims(store: Store) -> None:
    """Remove what workers wrote for each other; there must be nothing left to do."""
    for folder, ours in _FOR_WORKERS.items():
        store.remove(f"{folder}/{name}" for name in store.entries(folder) if ours.fullmatch(name))


def remove_temporary(store: Store, before: float = math.inf) -> None:
    """Remove what killed runs left: what was not written to since a time of the store's clock, as by nobody who lives."""
    for folder in ("", fmt.INDEX, fmt.CLAIMS):
        found = store.entries(folder).items()
        stale = [name for name, entry in found if _TEMPORARY.fullmatch(name) and entry.modified < before]
        store.remove(f"{folder}/{name}" if folder else name for name in stale)
