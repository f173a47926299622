"""Sources: where labeled images come from. `open_source` takes every form that `data` accepts."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import replace

from miner.settings import Inputs
from miner.sources.archive import compressed, packer_of
from miner.sources.folder import folder_source
from miner.sources.imagenet import imagenet_source, is_imagenet
from miner.sources.listings import SharedListings
from miner.sources.source import (
    JUNK_NOTE,
    Source,
    Tally,
    is_junk,
    note_unlabeled,
    spelled,
    spelled_classes,
    split_off_val,
)
from miner.sources.tars import tar_source
from miner.sources.ticket_set import ticket_set_source
from miner.sources.timm_reader import timm_source
from miner.sources.tree import LocalTree, RemoteTree, Tree
from shards import format as fmt
from shards import remote, storage
from shards.errors import TicketSetError
from shards.schema import check_split_name

__all__ = ["Source", "open_source"]

FORMS = """expected one of
  a folder of class folders, or of train/ and val/ with class folders   `data` photos
  the original ImageNet tars in a folder                                `data` ILSVRC2012
  WebDataset tars                                                       `data` 'tars/train-{0000..0127}.tar'
  another ticket set                                                    `data` shards
  a map-style timm reader                                               `data` timm:hfds/uoft-cs/cifar10
  a name under $DATALTH_DATA                                            `data` imagenet
  all but the ImageNet tars and timm's also at a URL                    `data` s3://bucket/photos"""


def open_source(inputs: Inputs, seed: int = 0, shared: SharedListings | None = None) -> Source:
    """List the images behind `data`.

    Args:
        inputs: where they are, as FORMS, and which of them; no splits = all there are.
        seed: of the set; takes part in which images become the val split of a source that has none.
        shared: where several workers keep what they listed of remote tars.
    Raises:
        TicketSetError: nothing of the kind is there, it holds no images, or a split is missing.
    """
    spec, splits = inputs.data, inputs.splits
    source = _open(spec, splits, inputs.labels, inputs.base, shared)
    if source.base is None:
        source = replace(source, classes=spelled_classes(source.classes, f"`data` {spec}"))
        source = split_off_val(source, inputs.val_share, seed)
    missing = [s for s in splits if s not in source.splits]
    if missing:
        there = list(dict.fromkeys([*source.splits, *(["val"] if source.own_val else [])]))
        raise TicketSetError(f"`data` {spec}: expected a split of {there}, got `splits` {missing[0]}")
    if splits:
        source = source.only(splits)
    for name in source.splits:
        check_split_name(name, f"`data` {spec}: split")
    empty = [name for name, table in source.splits.items() if len(table) == 0]
    if empty:
        raise TicketSetError(f"`data` {spec}: split {empty[0]} holds no images")
    return note_unlabeled(source)


def _open(
    spec: str, splits: Sequence[str], labels: str | None, base: str | None, shared: SharedListings | None
) -> Source:
    if spec.startswith("timm:"):
        return timm_source(spec, splits)
    path = storage.local(spec)
    packer = packer_of(path)
    if packer:
        raise compressed(f"`data` {spec}", packer)
    if storage.is_remote(path):
        return _open_remote(spec, path.rstrip("/"), splits, labels, base, shared)
    if not os.path.exists(path):
        under = os.path.join(os.environ.get("DATALTH_DATA", ""), path)
        if os.environ.get("DATALTH_DATA") and os.path.exists(under):
            path = under
        elif path.endswith(".tar") and _expand(path):
            return tar_source(spec, _expand(path), labels)
        else:
            raise TicketSetError(f"`data` {spec}: no such path; {FORMS}")
    if is_imagenet(path):
        return imagenet_source(spec, path, splits, labels)
    if os.path.isfile(path):
        if not path.endswith(".tar"):
            raise TicketSetError(f"`data` {spec}: a single file; {FORMS}")
        return tar_source(spec, [path], labels)
    if not os.path.isdir(path):
        raise TicketSetError(f"`data` {spec}: neither a file nor a folder; {FORMS}")
    if os.path.exists(os.path.join(path, fmt.MANIFEST)) or os.path.exists(os.path.join(path, fmt.PLAN)):
        return ticket_set_source(path, base)
    return _folder_or_tars(spec, LocalTree(path), splits, labels)


def _open_remote(
    spec: str, url: str, splits: Sequence[str], labels: str | None, base: str | None, shared: SharedListings | None
) -> Source:
    if url.endswith(".tar"):
        return tar_source(spec, _expand(url), labels, shared)
    if any(storage.exists(storage.join(url, name)) for name in (fmt.MANIFEST, fmt.PLAN)):
        return ticket_set_source(url, base)
    tally = Tally()
    tree = RemoteTree(url, tally)
    if not any(True for _ in tree.scan()):
        raise TicketSetError(f"`data` {spec}: nothing is there; {FORMS}")
    source = _folder_or_tars(spec, tree, splits, labels, shared)
    return replace(source, notes=[*tally.notes(), *source.notes])


# What img2dataset writes beside its tars: one JSON and one parquet a tar, and a folder of work in progress.
_IMG2DATASET = re.compile(r".*_tmp|[0-9]+_stats\.json|[0-9]+\.parquet")


def _folder_or_tars(
    spec: str, tree: Tree, splits: Sequence[str], labels: str | None, shared: SharedListings | None = None
) -> Source:
    """Tars that lie in a folder without other folders are what it holds."""
    found = sorted((name, item.is_folder) for name, item in tree.scan())
    tars = [storage.join(tree.root, name) for name, _ in found if name.endswith(".tar") and not is_junk(name)]
    if not tars:
        packed = next((name for name, is_dir in found if packer_of(name) and not is_dir), None)
        if packed and not any(is_dir for _, is_dir in found):
            raise compressed(storage.join(tree.root, packed), str(packer_of(packed)))
        return folder_source(spec, tree, splits, labels)
    if any(is_dir and not is_junk(name) and not _IMG2DATASET.fullmatch(name) for name, is_dir in found):
        source = folder_source(spec, tree, splits, labels)
        note = f"{len(tars)} tars beside the folders are not read (first: {tars[0]}); give them as `data` 'DIR/*.tar'"
        return replace(source, notes=[note, *source.notes])
    tally = Tally()
    for name, _ in found:
        if is_junk(name):
            tally.add(JUNK_NOTE, spelled(name))
        elif _IMG2DATASET.fullmatch(name):
            tally.add("{count} files and folders of img2dataset beside the tars are not read (first: {first})", name)
    source = tar_source(spec, tars, labels, shared)
    return replace(source, notes=[*tally.notes(), *source.notes])


def _remote_glob(url: str) -> list[str]:
    found = remote.glob(url)
    if not found:
        raise TicketSetError(f"`data` {url}: no such files")
    return found


def _expand(pattern: str) -> list[str]:
    """Braces and globs; a brace without a file behind it is an error, not a gap."""
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for url in expand_urls(pattern):
        if storage.is_remote(url):
            urls += _remote_glob(url) if "*" in url or "[" in url else [url]  # a ? begins a query
        elif glob.has_magic(url):
            urls += sorted(glob.glob(url))
        elif os.path.exists(url):
            urls.append(url)
        elif "{" in pattern:
            raise TicketSetError(f"`data` {pattern}: {url} is missing")
    return urls
