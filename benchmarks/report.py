"""The table of docs/PERFORMANCE.md, from benchmarks/results/*.json alone."""

import json

from benchmarks.rounds import RESULTS

HEAD = "| part | what | against | median (min to max) | by CPU time | wanted | |\n|---|---|---|---|---|---|---|\n"


def table(names: tuple[str, ...] = ()) -> str:
    """Markdown: a line for each row of the named parts, of all by default; then machines, versions, commands, notes."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    parts = [part for part in parts if not names or part["part"] in names]
    lines = [_line(part["part"], row) for part in parts for row in part["rows"]]
    machines = sorted({_machine(part) for part in parts})
    runs = [_run(part, machines.index(_machine(part)) + 1) for part in parts]
    numbered = [f"{number}. {text}" for number, text in enumerate(machines, 1)]
    return HEAD + "\n".join(lines) + "\n\nMachines:\n\n" + "\n".join(numbered) + "\n\nRuns:\n\n" + "\n".join(runs)


def _line(part: str, row: dict) -> str:
    unit = row["unit"]
    figures = f"{_figure(row['median'], unit)} ({_figure(row['low'], unit)} to {_figure(row['high'], unit)})"
    cpu = _figure(row["cpu_median"], unit) if "cpu_median" in row else ""
    reached = {True: "yes", False: "**no**", None: ""}[row.get("reached")]
    what = f"{row['what']} ({row['note']})" if "note" in row else row["what"]
    return f"| {part} | {what} | {row['against']} | {figures} | {cpu} | {row.get('wanted', '')} | {reached} |"


def _figure(value: float, unit: str) -> str:
    return f"{value:.3g}{'x' if unit == 'x' else f' {unit}'}"


def _machine(part: dict) -> str:
    machine, versions = part["machine"], part["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {packages}"


def _run(part: dict, machine: int) -> str:
    notes = "".join(f"; {note}" for note in part["notes"])
    load = f"load {part['machine']['load']} at its end"
    threads = "all cores" if part["part"] == "gpu" else "one thread a leg"
    return (
        f"- {part['part']}: `{part['command']}`, {part['rounds']} rounds, {threads}, machine {machine}, {load}{notes}"
    )
