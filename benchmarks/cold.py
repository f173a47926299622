"""Seconds until a fresh process has answered: `datalth-shards info`, and --help of every command."""

import resource
import subprocess
import time
from importlib.metadata import distribution

from benchmarks.rounds import Lap, Part, Row, turns
from benchmarks.setting import Setting, script

WANTED = ("<=", 1.0)


def measure(setting: Setting) -> Part:
    commands = {f"{' '.join(command)} --help": [*command, "--help"] for command in all_commands()}
    commands["datalth-shards info"] = ["datalth-shards", "info", str(setting.shards)]
    legs = {name: lambda command=command: answer(command) for name, command in commands.items()}
    part = Part(laps=turns(legs, setting.rounds))
    for name, laps in part.laps.items():
        wall, cpu = [lap.wall for lap in laps], [lap.cpu for lap in laps]
        part.rows.append(Row(name, "", wall, cpu, WANTED, "s"))
    return part


def all_commands() -> list[list[str]]:
    """Every console script of the distribution, and every subcommand of those that have some."""
    found = []
    for entry in distribution("datalth").entry_points:
        if entry.group == "console_scripts":
            found.append([entry.name])
            found += [[entry.name, name] for name in getattr(entry.load(), "commands", {})]
    return found


def answer(command: list[str]) -> Lap:
    """Runs a command; CPU seconds are its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([script(command[0]), *command[1:]], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Lap(1, wall, cpu)
