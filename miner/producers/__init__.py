"""Producers: a ticket set is images plus members, and each kind of member has a producer, one file here.

A new kind is a new file, a line in `build_producers`, and its members in `shards`; nothing else knows them by name.
"""

import torch

from miner.models import choose_device
from miner.producers.kept import KeptRankings, KeptTokenLabels
from miner.producers.masks import build_mask_rankings
from miner.producers.producer import Producer
from miner.producers.ranked import ranked_pixels
from miner.producers.rankings import build_rankings, uses_model
from miner.producers.token_labels import TokenLabels
from miner.selectors import BLIND, MODEL_FREE
from miner.settings import Geometry, Labeling, Machine, Output, Selection
from miner.sources import Source
from miner.token_labels import build_labeler
from shards.errors import TicketSetError
from shards.schema import SelectorIdentity

__all__ = ["Producer", "build_models", "build_producers", "check_settings", "device_of", "is_blind"]


def build_producers(
    models: tuple[Producer, ...], selection: Selection | None, output: Output, geometry: Geometry, source: Source
) -> tuple[Producer, ...]:
    """All producers of a set: those with models, and those that only hand on or store.

    Args:
        models: of `build_models`.
        selection: None: the source's rankings are kept, and its token labels where no others are asked for.
    Raises:
        TicketSetError: the settings ask for views that cannot be stored.
    """
    producers = list(models)
    if selection is None:
        kept = source.tickets
        assert kept is not None
        producers.insert(0, KeptRankings(kept.selector))
        if kept.labeler and not models:  # else others are asked for
            producers.append(KeptTokenLabels(kept.labeler))
    if output.images == "ranked":
        selector = producers[0].identity
        assert isinstance(selector, SelectorIdentity), "of views without rankings there is no order"
        producers.append(ranked_pixels(output, geometry, selector.counts[-1], decoded=selection is not None))
    return tuple(producers)


def build_models(
    selection: Selection | None, labeling: Labeling, geometry: Geometry, machine: Machine, classes: tuple[str, ...]
) -> tuple[Producer, ...]:
    """The producers that look at pixels or rank, their models loaded.

    Args:
        selection: None: nothing ranks, rankings are kept.
        machine: with a batch size.
        classes: of the set.
    Raises:
        TicketSetError: a model, weights or a device that is not there, or that do not fit.
    """
    assert machine.batch_size is not None
    # torch lets convolutions of float32 run in tf32: on an H200 that moved 0.2 % of the best 98 patches (`benchmarks gpu rankings`).
    torch.backends.cudnn.allow_tf32 = False
    device = device_of(selection, labeling, machine)
    producers: list[Producer] = []
    if selection is not None and selection.ranks:
        build = build_mask_rankings if selection.masks else build_rankings
        producers.append(build(selection, geometry, machine, device, machine.batch_size))
    if labeling.token_labels is not None:
        name, weights, size = labeling.token_labels, labeling.token_label_weights, labeling.token_label_size
        labeler = build_labeler(name, weights, classes, device, machine.amp, size)
        producers.append(TokenLabels(labeler, machine.batch_size))
    return tuple(producers)


def device_of(selection: Selection | None, labeling: Labeling, machine: Machine) -> torch.device:
    """Where producers compute: the CPU, whatever else there is, where none looks at pixels.

    Raises:
        TicketSetError: no such device.
    """
    return torch.device("cpu") if is_blind(selection, labeling) else choose_device(machine.device)


def is_blind(selection: Selection | None, labeling: Labeling) -> bool:
    """Whether no producer looks at pixels."""
    return (selection is None or selection.method in BLIND) and labeling.token_labels is None


def check_settings(selection: Selection | None, labeling: Labeling, output: Output, machine: Machine) -> None:
    """Refuse an unknown method before weights are loaded, and settings that nothing would look at.

    Args:
        selection: None: rankings are kept.
    Raises:
        TicketSetError: see above.
    """
    asked = selection or Selection()
    method = asked.method
    unused = {} if selection and asked.ranks and uses_model(asked) else {
        "selector": asked.selector, "weights": asked.weights, "drop_blocks": asked.drop_blocks,
        "torchcompile": machine.torchcompile,
    }  # fmt: skip
    if labeling.token_labels is None and (selection is None or method in MODEL_FREE):
        unused["amp"] = machine.amp
    why = f"`method` {method} uses no model" if selection else "the rankings of `data` are kept, without a model"
    for name, value in unused.items():
        if value:
            raise TicketSetError(f"`{name}`: {why}; leave it out")
    if asked.ranks:
        return
    for name in ("keep_rate", "tokens"):
        if getattr(selection, name) is not None:
            raise TicketSetError(f"`{name}`: `method` {method} mines no tickets; leave it out")
    if labeling.token_labels is None or output.images != "link":
        raise TicketSetError(
            f"`method` {method}: mines token labels alone; expected `token_labels` and `images` link beside it"
        )
