"""Command lines in files that are no Python: parsed by the commands that they call, and not run."""

from collections.abc import Sequence
from typing import Any

import click
import pytest

import miner.cli
import shards.inspect.cli
import trainer.cli
import trainer.predict.cli
import trainer.verdict.cli
import trainer.weights.cli

COMMANDS: dict[str, Any] = {
    "datalth-mine": miner.cli.main,
    "datalth-predict": trainer.predict.cli.main,
    "datalth-shards": shards.inspect.cli.main,
    "datalth-train": trainer.cli.main,
    "datalth-verdict": trainer.verdict.cli.main,
    "datalth-weights": trainer.weights.cli.main,
}


def check_taken(words: Sequence[str]) -> None:
    """Fail unless each flag of a command of ours is there and takes its value; torchrun and its like stand before it."""
    first = next(i for i, word in enumerate(words) if word in COMMANDS)
    name, *flags = words[first:]
    command = COMMANDS[name]
    if isinstance(command, click.Group):
        command = command.commands[flags.pop(0)]
    try:
        command.make_context(command.name, flags)
    except click.UsageError as error:
        pytest.fail(f"{' '.join(words)}: {error.format_message()}")
