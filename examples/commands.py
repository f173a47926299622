"""What the studies share: public commands, shown and run, one by one or side by side; figures of runs; tables."""

import importlib
import json
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import click

from trainer.verdict.statistics import Estimate

HERE = Path(os.path.relpath(Path(__file__).parent))  # short, for who reads the commands
RECIPE = HERE / "digits.yaml"
PROGRAMS = {
    "datalth-mine": "miner.cli",
    "datalth-predict": "trainer.predict.cli",
    "datalth-shards": "shards.inspect.cli",
    "datalth-train": "trainer.cli",
    "datalth-verdict": "trainer.verdict.cli",
    "datalth-weights": "trainer.weights.cli",
}
# Importing torch and timm takes seconds, so it is done once: each command is forked from a process that has them.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["miner.run", "trainer.run"])


def say(text: str) -> None:
    click.secho(f"\n=== {text}", bold=True)


def show(*words: object, codes: Sequence[int] = (0,)) -> None:
    """Print a command, run it, and let it write to the screen.

    Args:
        codes: with which it may end.
    Raises:
        click.ClickException: it failed; it has said why.
    """
    click.echo(f"\n$ {shlex.join(map(str, words))}")
    process = start(words)
    process.join()
    if process.exitcode not in codes:
        raise click.ClickException("the command above failed")


def start(words: Sequence[object], log: Path | None = None) -> BaseProcess:
    """A command in a process of its own; what it says goes to the end of a log, or to the screen."""
    sys.stdout.flush()
    process = SERVER.Process(target=run, args=([str(word) for word in words], log))
    process.start()
    return process


def run(words: Sequence[str], log: Path | None) -> None:
    """One of PROGRAMS or a file of examples/, as if typed; ends the process."""
    if log is not None:  # beside others
        importlib.import_module("torch").set_num_threads(1)
        with open(log, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    name, *flags = words
    module = importlib.import_module(PROGRAMS.get(name, Path(name).stem))
    module.main(flags, prog_name=name)


def mine(out: Path, *flags: object) -> None:
    """Mine a set; one that is finished is opened and left as it is."""
    show(*mining(out, *flags).words)


@dataclass(frozen=True, eq=False)
class Command:
    """One of many that run side by side.

    Attributes:
        words: a console script of ours and its flags; run again, it goes on where it was stopped.
        done: the file that it writes last, in a folder of its own.
        needs: files that must be there before it can begin.
    """

    words: Sequence[object]
    done: Path
    needs: Sequence[Path] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.done.parent.name

    @property
    def log(self) -> Path:
        """Beside its folder."""
        return self.done.parent.with_name(f"{self.name}.log")


def mining(out: Path, *flags: object, needs: Sequence[Path] = (), side: int = 96) -> Command:
    """A ticket set in the folder out, of views of side x side pixels."""
    return Command(["datalth-mine", "--img-size", side, "--out", out, *flags], out / "manifest.json", needs)


def training(
    output: Path, name: str, tickets: Path, *flags: object, needs: Sequence[Path] = (), recipe: Path = RECIPE
) -> Command:
    """A run on a ticket set in the folder output/name; an interrupted one goes on."""
    words = ["datalth-train", "--shards", tickets, "-c", recipe, *flags, "--output", output, "--experiment", name]
    return Command([*words, "--resume", "latest"], output / name / "final.json", needs)


def run_all(commands: Sequence[Command], at_once: int) -> None:
    """Run what is not done, one thread each; of those that can begin the first one first. A line when each is done.

    Raises:
        click.ClickException: some failed, or wait for what never came; the others have run.
    """
    waiting = [command for command in commands if not command.done.exists()]
    running: dict[Command, tuple[BaseProcess, float]] = {}
    failed: list[str] = []
    total = len(waiting)
    click.echo(f"\n{total} commands to run, {at_once} at a time; logs: NAME.log beside each one's folder")
    try:
        while True:
            ready = [command for command in waiting if all(path.exists() for path in command.needs)]
            for command in ready[: at_once - len(running)]:
                waiting.remove(command)
                running[command] = begin(command), time.perf_counter()
            if not running:
                break
            time.sleep(0.2)  # a file that others need may come before its command ends
            for command, (process, began) in [*running.items()]:
                if process.exitcode is not None:
                    del running[command]
                    text = how_it_went(command, process.exitcode, time.perf_counter() - began)
                    failed += [text] if process.exitcode else []
                    click.echo(f"[{total - len(waiting) - len(running)}/{total}] {text}")
    finally:  # they save where they are
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()
    failed += [f"{command.name}: could not begin" for command in waiting]
    if failed:
        raise click.ClickException("; ".join(failed))


def begin(command: Command) -> BaseProcess:
    """Print it, and start it with its log."""
    click.echo(f"$ {shlex.join(map(str, command.words))}")
    command.log.parent.mkdir(parents=True, exist_ok=True)
    return start(command.words, command.log)


def how_it_went(command: Command, code: int, seconds: float) -> str:
    """In a line."""
    if code:
        return f"{command.name}: exit code {code}; see {command.log}"
    text = f"{command.name}: {seconds:.0f} s"
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
