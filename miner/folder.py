"""The folder that a ticket set is mined into: whether it may be, what is done in it, what is removed from it."""

import contextlib
import os
from pathlib import Path

from miner.settings import Fleet, Output
from shards import format as fmt
from shards.errors import TicketSetError


def check_ranks(output: Output, fleet: Fleet, world: int) -> None:
    """Refuse what several ranks, `world` of them, would undo for each other.

    Raises:
        TicketSetError: see above.
    """
    if world == 1:
        return
    if fleet.ray is not None:
        raise TicketSetError("`ray` under torchrun: Ray starts the workers; run the command once, without torchrun")
    if output.overwrite:
        raise TicketSetError(
            "`overwrite` under torchrun: ranks would remove each other's work; remove the folder first"
        )
    if output.retry_failed:
        raise TicketSetError(
            "`retry_failed` under torchrun: a rank could finalize what another takes back; run it once without torchrun"
            " and stop it, then run torchrun without the flag"
        )


def check_target(out: str, data: str) -> None:
    """Refuse an output folder that is none of ours.

    Raises:
        TicketSetError: it holds something that is no ticket set, or lies inside the data.
    """
    if "://" in out:
        raise TicketSetError(
            f"`out` {out}: expected a local folder (shards are renamed when whole); upload it afterwards"
        )
    folder = Path(out)
    if folder.is_file():
        raise TicketSetError(f"`out` {out}: expected a folder, got a file")
    roots = [data, os.path.join(os.environ.get("DATALTH_DATA", data), data)]
    if any(os.path.isdir(root) and folder.resolve().is_relative_to(Path(root).resolve()) for root in roots):
        raise TicketSetError(f"`out` {out}: lies inside `data` {data}; its shards would be taken for images")
    names = sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") if folder.is_dir() else []
    if "__init__.py" in names:
        raise TicketSetError(
            f"`out` {out}: this is Python source code (it holds __init__.py); run in a work folder, or name another `out`"
        )
    if names and fmt.PLAN not in names:
        raise TicketSetError(f"`out` {out}: holds other files (first: {names[0]}); give an empty or new folder")
    if names:
        from shards.writer import read_plan  # imports pyarrow

        try:
            read_plan(folder)
        except TicketSetError as error:
            raise TicketSetError(
                f"{folder / fmt.PLAN}: not readable as a plan ({error}); empty the folder yourself, or give another `out`"
            ) from None


def remove_set(folder: Path) -> None:
    """Remove a ticket set's own files, the manifest first; anything else in the folder stays."""
    number = "-" + "[0-9]" * 6
    remove_temporary(folder)
    shards = [f"*{number}.json", f"*{number}.tar", f"{fmt.INDEX}/*{number}.parquet"]
    for pattern in [fmt.MANIFEST, fmt.TIMM_INFO, fmt.OPEN_CLIP_SIZES, *shards]:
        for path in folder.glob(pattern):
            path.unlink()
    with contextlib.suppress(OSError):  # not there, or not empty
        (folder / fmt.INDEX).rmdir()
    (folder / fmt.PLAN).unlink(missing_ok=True)  # last: until then the folder is known to be ours


def remove_temporary(folder: Path) -> None:
    """Remove what killed runs left; nobody else may be writing."""
    for stale in [*folder.glob("*.tmp"), *(folder / fmt.INDEX).glob("*.tmp")]:
        stale.unlink(missing_ok=True)
