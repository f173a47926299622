"""Checking a ticket set against what it says of itself.

Fast: the plan, every shard's JSON and index, and the tars' sizes; the index is small, so it is hashed
in any case. Deep: every tar is hashed too, and every sample opened. A tar alone proves nothing: one
that was cut at a member's edge reads without an error.
"""

import functools
import hashlib
import reprlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from shards import checks, ranked, schema, storage, token_labels
from shards import format as fmt
from shards.errors import ImageError, TicketSetError, first_line
from shards.reader import SampleReader, TicketSet, rows_of
from shards.sample import Sample
from shards.views import canonical_view
from shards.writer import count, interop_files, set_id

HASH_BLOCK = 8 << 20
MAX_PROBLEMS = 1000
T = TypeVar("T")
Open = Callable[[str], storage.Ranges]


def verify(
    opened: TicketSet,
    deep: bool = False,
    on_shard: Callable[[str], None] = lambda name: None,
    base_too: bool = False,
) -> list[str]:
    """Everything that is wrong with a set, one line each; empty where it is sound.

    Whatever the files hold, this returns: a set is checked because it is not trusted. After MAX_PROBLEMS it stops.

    Args:
        opened: the set.
        deep: hash the tars, decode every image, and check every sample.
        on_shard: called after each shard, for the screen.
        base_too: check the base of a linked set as well. Without it, its tars' sizes are compared, and with `deep` the
            images that are read, but its tars are not hashed.
    """
    problems: list[str] = []
    for problem in _problems(opened, deep, on_shard, base_too):
        problems.append(problem)
        if len(problems) == MAX_PROBLEMS:
            problems.append(f"stopped after {MAX_PROBLEMS} problems")
            break
    return problems


def _problems(opened: TicketSet, deep: bool, on_shard: Callable[[str], None], base_too: bool) -> Iterator[str]:
    if opened.manifest.identity() != opened.manifest.digest:
        yield f"{fmt.MANIFEST}: not as it was written: its digest is of other contents"
    damaged = list(_check_file(opened, fmt.PLAN, opened.manifest.plan, hashed=True))
    yield from damaged
    plan = None
    if not damaged:
        plan, wrong = _read(opened, fmt.PLAN, schema.parse_plan)
        yield from wrong
    if plan is not None:
        yield from _check_plan(opened, plan)
    shards = []
    for split in opened.splits:
        keys: set[str] = set()
        for name in opened.shard_names(split):
            stats, found = _check_shard(opened, split, name, plan, keys)
            yield from found
            if opened.base is not None and not base_too:
                yield from _check_base(opened.base, name)
            if stats is not None:
                shards.append(stats)
                if deep and not found:
                    yield from _check_tar(opened, name, stats)
            on_shard(name)
    if len(shards) == sum(split.shards for split in opened.manifest.splits.values()):
        yield from _check_totals(opened, shards)
    yield from _strangers(opened)
    if opened.base is not None and base_too:
        yield from (f"base {opened.base.url}: {problem}" for problem in _problems(opened.base, deep, on_shard, False))


def _check_base(base: TicketSet, name: str) -> Iterator[str]:
    """The tar that a linked shard takes its images from, as the base's own JSON has it; its bytes are the base's matter."""
    stats, problems = _read(base, f"{name}.json", schema.parse_shard)
    if stats is not None:
        problems += _check_file(base, f"{name}.tar", stats.tar, hashed=False)
    yield from (f"base {base.url}: {problem}" for problem in problems)


def _read(opened: TicketSet, name: str, parse: Callable[[bytes, str], T]) -> tuple[T | None, list[str]]:
    """A JSON file's contents, or what is wrong with it."""
    try:
        return parse(storage.read_bytes(storage.join(opened.url, name), schema.MAX_JSON_BYTES), name), []
    except FileNotFoundError:
        return None, [f"{name}: missing"]
    except TicketSetError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"{name}: {error.strerror or first_line(error)}"]


def _in_words(opened: TicketSet, error: TicketSetError | OSError) -> str:
    """An error of reading, without the set's own place, which the reader of these lines knows."""
    text = (
        str(error) if isinstance(error, TicketSetError) else f"{error.filename}: {error.strerror or first_line(error)}"
    )
    return text.removeprefix(f"{opened.url}/")


def _check_plan(opened: TicketSet, plan: schema.Plan) -> Iterator[str]:
    manifest = opened.manifest
    for name, split in plan.splits.items():
        if split.identity(name, plan.common) != split.plan_id:
            yield f"{fmt.PLAN}: split {name} is not what its plan_id {split.plan_id[:12]} was made of"
    if not schema.plan_identity(plan.splits) == plan.plan_id == manifest.plan_id:
        yield f"{fmt.PLAN}: expected plan_id {manifest.plan_id[:12]} (manifest), got {plan.plan_id[:12]}"
    if fmt.digest(manifest.classes) != plan.common.classes:
        yield f"{fmt.MANIFEST}: its class names are not those of {fmt.PLAN}"
    if plan.splits.keys() != manifest.splits.keys():
        yield f"{fmt.MANIFEST}: its splits are {opened.splits}, but {fmt.PLAN} says {list(plan.splits)}"
        return
    for name, stats in manifest.splits.items():
        said, wanted = stats.to_json(), plan.splits[name].to_json()
        for field in ("shards", *stats.part(schema.SplitViews)):
            if said[field] != wanted[field]:
                yield f"{fmt.MANIFEST}: split {name}: {field} is {said[field]}, but {fmt.PLAN} says otherwise"
    said, wanted = manifest.to_json(), plan.common.to_json()
    for name in manifest.part(schema.Setting):
        if said.get(name) != wanted.get(name):
            found, planned = reprlib.repr(said.get(name)), reprlib.repr(wanted.get(name))
            yield f"{fmt.MANIFEST}: {name} is {found}, but {fmt.PLAN} says {planned}"
    if opened.has_token_labels != (plan.common.token_labels is not None):
        yield f"{fmt.MANIFEST}: its members have token labels, or lack them, against {fmt.PLAN}"


def _check_shard(
    opened: TicketSet, split: str, name: str, plan: schema.Plan | None, keys: set[str]
) -> tuple[schema.ShardStats | None, list[str]]:
    """A shard's JSON, and what is wrong with it, its index, and its tar from outside. Adds its keys to `keys`."""
    stats, problems = _read(opened, f"{name}.json", schema.parse_shard)
    if stats is None:
        return None, problems
    plan_id = plan.splits[split].plan_id if plan and split in plan.splits else stats.plan_id
    if stats.name != name:
        problems.append(f"{name}.json: says it is {stats.name}")
    if stats.format != opened.manifest.format:
        problems.append(f"{name}.json: expected format {list(opened.manifest.format)}, got {list(stats.format)}")
    if stats.plan_id != plan_id:
        problems.append(f"{name}.json: of another plan: expected {plan_id[:12]}, got {stats.plan_id[:12]}")
    problems += _check_file(opened, f"{name}.tar", stats.tar, hashed=False)
    problems += _check_file(opened, f"{fmt.INDEX}/{name}.parquet", stats.parquet, hashed=True)
    if not problems:
        problems += _check_index(opened, name, stats, plan_id, keys)
    return stats, problems


def _check_file(
    opened: TicketSet, name: str, expected: schema.FileDigest, hashed: bool, open_file: Open = storage.open_ranges
) -> Iterator[str]:
    url = storage.join(opened.url, name)
    try:
        size = storage.size_of(url)
        if size != expected.bytes:
            yield f"{name}: expected {expected.bytes} bytes, got {size}"
        elif hashed and (found := _sha256(open_file(url))) != expected.sha256:
            yield f"{name}: expected sha256 {expected.sha256[:12]}, got {found[:12]}"
    except FileNotFoundError:
        yield f"{name}: missing"
    except TicketSetError as error:
        yield f"{name}: {error}"
    except OSError as error:
        yield f"{name}: {error.strerror or first_line(error)}"


def _sha256(ranges: storage.Ranges) -> str:
    sha = hashlib.sha256()
    for offset in range(0, ranges.size, HASH_BLOCK):
        sha.update(ranges.read(offset, HASH_BLOCK))
    return sha.hexdigest()


def _check_index(opened: TicketSet, name: str, stats: schema.ShardStats, plan_id: str, keys: set[str]) -> Iterator[str]:
    """The index against the JSON: whose it is, counts, and extents that fill the tar without a gap."""
    where = f"{fmt.INDEX}/{name}.parquet"
    try:
        index = opened.shard_table(name)
    except (TicketSetError, OSError) as error:
        yield _in_words(opened, error)
        return
    metadata = index.schema.metadata or {}
    said = {k: metadata.get(f"datalth.{k}".encode(), b"").decode("utf-8", "replace") for k in ("shard", "plan_id")}
    if said != {"shard": name, "plan_id": plan_id}:
        yield f"{where}: of another shard or plan: {said['shard'][:100]}, {said['plan_id'][:12]}"
    rows = index.select(["key", "status", "offset", "bytes", "k"]).to_pylist()
    ok = [row for row in rows if row["status"] == "ok"]
    if (len(ok), len(rows) - len(ok)) != (stats.samples, stats.failed):
        yield f"{where}: expected {stats.samples} samples and {stats.failed} failures, got {len(ok)}, {len(rows) - len(ok)}"
    position = 0
    for row in ok:
        if row["offset"] != position:
            yield f"{where}: {row['key']}: expected at offset {position} of the tar, got {row['offset']}"
            break
        position += row["bytes"]
    if position + 1024 > stats.tar.bytes:
        yield f"{where}: its samples end at {position}, beyond the tar's {stats.tar.bytes} bytes"
    names = [row["key"] for row in rows]
    twice = [key for key in names if key in keys]
    keys.update(names)
    if twice:
        yield f"{where}: {len(twice)} keys stand twice in the split (first: {twice[0]})"
    if any(row["k"] != opened.k for row in rows):
        yield f"{where}: expected k = {opened.k} in every row"


def _check_tar(opened: TicketSet, name: str, stats: schema.ShardStats) -> Iterator[str]:
    """The tar's sha256 and every sample in it."""
    open_once = functools.cache(storage.open_ranges)  # blocks of a remote one are kept for its samples
    yield from _check_file(opened, f"{name}.tar", stats.tar, True, open_once)
    try:
        reader = SampleReader(opened, open_tar=lambda url, _: open_once(url))
        rows = rows_of(opened.joined(name))
        reader.open(name)
        tickets = {row["key"]: row["ticket"] for row in opened.shard_table(name).select(["key", "ticket"]).to_pylist()}
    except (TicketSetError, OSError) as error:
        yield _in_words(opened, error)
        return
    for row in rows:
        try:
            sample = reader.read(name, row)
            where = f"{name}.tar: {sample.key}"
            yield from (f"{where}: {problem}" for problem in _check_sample(opened, sample, tickets[sample.key]))
        except (TicketSetError, OSError) as error:  # no reason to leave out the next
            yield _in_words(opened, error)


def _check_sample(opened: TicketSet, sample: Sample, ticket: bytes | None) -> Iterator[str]:
    """What reading a sample does not look at: its pixels, view 0, and the ticket that its row holds."""
    height, width = sample.size
    if sample.ranked is not None:
        yield from ranked.problems(sample.ranked, sample.rankings)
    else:
        try:
            sample.pixels()
        except ImageError as error:
            yield f"image {error}"
            return
    if tuple(sample.views[0]) != canonical_view(width, height):
        yield f"expected the canonical view first, got {sample.views[0].tolist()}"
    expected = fmt.pack_ticket(sample.tickets[0], opened.num_patches) if opened.has_tickets else None
    if ticket != expected:
        yield "the index holds another ticket of view 0"
    if opened.has_token_labels and sample.token_labels is not None:
        yield from token_labels.problems(sample.token_labels)


def _check_totals(opened: TicketSet, shards: list[schema.ShardStats]) -> Iterator[str]:
    manifest = opened.manifest
    for name, split in manifest.splits.items():
        counted = count([stats for stats in shards if stats.split == name])
        for field in ("samples", "failed", "image_bytes"):
            said, total = getattr(split, field), getattr(counted, field)
            if total != said:
                yield f"{fmt.MANIFEST}: split {name} has {said} {field}, its shards {total}"
    if set_id(shards) != manifest.set_id:
        yield f"{fmt.MANIFEST}: expected set_id {set_id(shards)[:12]} (its shards), got {manifest.set_id[:12]}"
    if manifest.base is None and manifest.ranked is None:  # else no plain image set
        for name, content in interop_files(shards).items():
            found, problems = _read(opened, name, checks.parse_json)
            yield from problems
            if found is not None and found != content:
                yield f"{name}: does not list the shards of this set"


def _strangers(opened: TicketSet) -> Iterator[str]:
    """Shards that the manifest does not count, and what a killed run left."""
    known = {name for split in opened.splits for name in opened.shard_names(split)}
    for folder, suffixes in (
        (opened.url, (".tar", ".tmp")),
        (storage.join(opened.url, fmt.INDEX), (".parquet", ".tmp")),
    ):
        for file in storage.list_names(folder):
            stem, dot, suffix = file.rpartition(".")
            if dot + suffix in suffixes and stem not in known:
                yield f"{file}: not one of this set's shards"
