"""What the studies share: public commands, shown and run, one by one or side by side; figures of runs; tables."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import click

from trainer.verdict.statistics import Estimate

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RECIPE = HERE / "digits.yaml"


def say(text: str) -> None:
    click.secho(f"\n=== {text}", bold=True)


def show(*words: object) -> None:
    """Print a command, run it, and let it write to the screen.

    Raises:
        click.ClickException: it failed; it has said why.
    """
    texts = [str(word) for word in words]
    click.echo(f"\n$ {shlex.join(texts)}")
    program = [sys.executable] if texts[0].endswith(".py") else [str(BIN / texts.pop(0))]
    if subprocess.run([*program, *texts], check=False).returncode:
        raise click.ClickException("the command above failed")


def mine(out: Path, *flags: object) -> None:
    """Mine a set; one that is finished is opened and left as it is."""
    show("datalth-mine", "--img-size", 96, "--out", out, *flags)


@dataclass(frozen=True)
class Command:
    """One of many that run side by side.

    Attributes:
        words: a console script of ours and its flags; run again, it goes on where it was stopped.
        done: the file that it writes last; its log stands beside that file's folder.
        needs: files that must be there before it can begin.
    """

    words: Sequence[object]
    done: Path
    needs: Sequence[Path] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.done.parent.name

    def __str__(self) -> str:
        return shlex.join([str(word) for word in self.words])


def training(output: Path, name: str, tickets: Path, *flags: object, needs: Sequence[Path] = ()) -> Command:
    """A run on a ticket set in the folder output/name; an interrupted one goes on."""
    words = ["datalth-train", "--shards", tickets, "-c", RECIPE, *flags, "--output", output, "--experiment", name]
    return Command([*words, "--resume", "latest"], output / name / "final.json", needs)


def run_all(commands: Sequence[Command], at_once: int) -> None:
    """Run what is not done, one thread each; of those that can begin the first one first. A line when each is done.

    Raises:
        click.ClickException: some failed, or wait for what never came; the others have run.
    """
    waiting = [command for command in commands if not command.done.exists()]
    running: dict[Future[str], Command] = {}
    failed: list[str] = []
    total = len(waiting)
    click.echo(f"\n{total} commands to run, {at_once} at a time; logs: NAME.log beside each one's folder")
    with ThreadPoolExecutor(at_once) as pool:
        while True:
            ready = [command for command in waiting if all(path.exists() for path in command.needs)]
            for command in ready[: at_once - len(running)]:
                waiting.remove(command)
                running[pool.submit(run_one, command)] = command
            if not running:
                break
            # A file that others need may come before its command ends.
            finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in finished:
                error = future.exception()
                failed += [str(error)] if error else []
                command = running.pop(future)
                click.echo(f"[{total - len(waiting) - len(running)}/{total}] {error or future.result()}")
    if failed or waiting:
        never = [command.name for command in waiting]
        raise click.ClickException("; ".join([*failed, *([f"could not begin: {', '.join(never)}"] if never else [])]))


def run_one(command: Command) -> str:
    """How it went, in a line.

    Raises:
        click.ClickException: it failed; its log says why.
    """
    click.echo(f"$ {command}")
    start, path = time.perf_counter(), command.done.parent.with_name(f"{command.name}.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [str(word) for word in command.words]
    with open(path, "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(BIN / texts[0]), *texts[1:]], check=False, stdout=log, stderr=log, env=environment
        )  # fmt: skip
    if done.returncode:
        raise click.ClickException(f"{command.name}: exit code {done.returncode}; see {path}")
    text = f"{command.name}: {time.perf_counter() - start:.0f} s"
    if command.done.name != "final.json":
        return text
    found = ", ".join(f"{protocol} {top1:.1f}" for protocol, top1 in figures(command.done.parent).items())
    return f"{text}, top-1 on {found}"


def figures(run: Path) -> dict[str, float]:
    """Top-1 by protocol."""
    results = json.loads((run / "final.json").read_text(encoding="utf-8"))["results"]
    return {protocol: found["top1"] for protocol, found in results.items()}


def plus_minus(estimate: Estimate, sign: str = "") -> str:
    """A figure and half its interval."""
    return f"{estimate.value:{sign}.1f} ±{estimate.half or float('nan'):.1f}"


def write_table(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    click.echo("\n" + path.read_text(encoding="utf-8"))
