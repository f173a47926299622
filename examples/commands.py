"""What the studies share: public commands, shown and run, one by one or side by side; figures of runs; tables."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
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
    running: dict[Command, tuple[subprocess.Popen[bytes], float]] = {}
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
            for command, (process, start) in [*running.items()]:
                if process.poll() is not None:
                    del running[command]
                    text = how_it_went(command, process.returncode, time.perf_counter() - start)
                    failed += [text] if process.returncode else []
                    click.echo(f"[{total - len(waiting) - len(running)}/{total}] {text}")
    finally:  # they save where they are
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    failed += [f"{command.name}: could not begin" for command in waiting]
    if failed:
        raise click.ClickException("; ".join(failed))


def begin(command: Command) -> subprocess.Popen[bytes]:
    """Print it, and start it with its log."""
    texts = [str(word) for word in command.words]
    click.echo(f"$ {shlex.join(texts)}")
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log, "ab") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([str(BIN / texts[0]), *texts[1:]], stdout=log, stderr=log, env=environment)


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
