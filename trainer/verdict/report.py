"""The verdict for people: tables and sentences, for the screen and as Markdown."""

import math
import textwrap
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from shards.console import duration, printable
from shards.errors import TicketSetError
from trainer.options import PROTOCOLS
from trainer.verdict.claim import OWN, Claim, Judge, judges_of, key_notes
from trainer.verdict.groups import Group, check_comparable, group_runs
from trainer.verdict.runs import LeftOut, Run, read_run
from trainer.verdict.sentences import RESAMPLED, interval, sentence
from trainer.verdict.statistics import DRAWS
from trainer.verdict.tables import Table, cell
from trainer.verdict.weight_report import WEIGHT_READING, weight_notes, weight_sentence, weight_tables
from trainer.verdict.weights import WeightClaim, weight_claims

WIDTH = 120
LETTERS = {"winning": "winning (a)", "random": "random (b)", "full": "full (c)"}
READING = (
    "a: trained on winning tickets, b: on random patches, both tested on the tickets; c: trained and tested on all patches.",
    "Tested on the selector's K patches (tickets), the whole image (all), K random patches (random). Last epoch, raw weights.",
)


class Report:
    """Everything that was found, in words.

    Args:
        runs: all of them.
        judges: one for each model.
        margin: points.
        left_out: folders that were given and are of no use, and why.
    """

    def __init__(
        self, runs: Sequence[Run], judges: Sequence[Judge], margin: float, left_out: Sequence[str] = ()
    ) -> None:
        self.runs, self.judges, self.margin, self.left_out = list(runs), list(judges), margin, list(left_out)
        self.set_names = _set_names(runs)
        self._weight_claims = {judge: weight_claims(judge, margin) for judge in judges}

    def screen(self) -> str:
        """Plain text: what a, b and c are, each model's tables, the notes, and at last the sentences."""
        parts = ["\n".join(self.reading())]
        for judge in self.judges:
            parts += [self.title(judge), *(t.plain() for t in self.tables(judge)), _lines(self.model_notes(judge))]
        sentences = [text for judge in self.judges for text in self.all_sentences(judge)]
        text = "\n\n".join([*parts, _lines(self.notes()), _lines(["VERDICT", *sentences])])
        return "\n".join(map(printable, text.split("\n")))  # folders may be called anything

    def markdown(self) -> str:
        """verdict.md."""
        sentences = [f"- **{text}**" for judge in self.judges for text in self.all_sentences(judge)]
        asked = "what do the weight tickets show?" if self.ticketed else "does a ~ c > b hold?"
        parts = [f"# Verdict: {asked}", "\n".join(self.reading()), "\n".join(sentences)]
        parts.append("![accuracy against training cost](verdict.png)")
        for judge in self.judges:
            parts += [f"## {self.title(judge)}", *(t.markdown() for t in self.tables(judge))]
            parts.append("\n".join(f"- {note}" for note in self.model_notes(judge)))
        parts.append("\n".join(["## Notes\n", *(f"- {note}" for note in self.notes())]))
        parts.append("Runs: " + ", ".join(f"`{run.folder}`" for run in self.runs))
        return "\n\n".join(parts) + "\n"

    @property
    def ticketed(self) -> bool:
        """Whether there are runs with weight tickets."""
        return any(judge.ticketed for judge in self.judges)

    def reading(self) -> list[str]:
        """What the words of the tables mean."""
        told = not self.ticketed or any(judge.claims(self.margin) for judge in self.judges)
        return [*READING[0 if told else 1 :], *(WEIGHT_READING if self.ticketed else ())]

    def title(self, judge: Judge) -> str:
        """Of a model's table: the model, and the sets of its runs."""
        sets = sorted(
            {g.set_id for g in [*judge.groups, *judge.ticketed] if g.set_id} & self.set_names.keys(),
            key=self.set_names.__getitem__,
        )
        names = ", ".join(self.set_names[s] for s in sets)
        return f"{judge.model}, {judge.patches} patches" + (f", tickets of {names}" if names else "")

    def tables(self, judge: Judge) -> list[Table]:
        """Accuracy and cost; differences; the same of weight tickets."""
        tables = [self._accuracies(judge), self._differences(judge)]
        if judge.ticketed:
            tables += weight_tables(judge, self.weight_claims(judge), self.data_of, *self.unit())
        return [found for found in tables if found.rows]

    def _accuracies(self, judge: Judge) -> Table:
        set_head = ["set"] if len(self.set_names) > 1 else []
        head = ["trained on", *set_head, "K", "seeds", "tickets", "all", "random"]
        unit = self.unit()[0]
        head += [f"train {unit}", "train time", f"test {unit}"]
        rows = []
        for group in judge.groups:
            cells = [cell(judge.accuracy(group, protocol)) for protocol in PROTOCOLS]
            names = [lettered(group), *([self.set_name(group.set_id)] if set_head else [])]
            rows.append([*names, str(group.tokens), str(len(group.runs)), *cells, *self._cost_cells(judge, group)])
        title = (
            "Top-1 in % when tested on tickets, all or random patches (± half a 95 % interval), and what an image costs"
        )
        first = head.index("K")
        return Table(title, head, rows, frozenset(range(first, len(head))), first)

    def _cost_cells(self, judge: Judge, group: Group) -> list[str]:
        """Training MACs and time, also as shares of full's; MACs of a test on tickets and on all patches."""
        factor, c = self.unit()[1], judge.reference(group)
        dense, seconds = factor * group.cost("dense_gmacs"), group.cost("seconds")
        digits = max(0, 2 - math.floor(math.log10(dense))) if dense > 0 else 3
        share = f" ({seconds / c.cost('seconds'):.0%})" if c and c.cost("seconds") else ""
        tests = [group.test_gmacs(protocol) for protocol in ("tickets", "all")]
        texts = ["n/a" if value is None else f"{factor * value:.{digits}f}" for value in tests]
        train = f"{factor * group.cost('train_gmacs'):.{digits}f} ({judge.share(group):.0%})"
        return [train, f"{duration(seconds)}{share}", ", ".join(texts)]

    def unit(self) -> tuple[str, int]:
        """What costs are told in, and how many of it are a GMAC: toy models need the smaller one."""
        small = all(run.cost["dense_gmacs"] < 0.1 for run in self.runs)
        return ("MMACs", 1000) if small else ("GMACs", 1)

    def _differences(self, judge: Judge) -> Table:
        set_head = ["set"] if len(self.set_names) > 1 else []
        head = ["difference", *set_head, "K", "of", "minus", "points", "95 % interval"]
        rows = []
        for found in [*(d for claim in judge.claims(self.margin) for d in claim.differences), *judge.differences()]:
            sides = [(found.first, found.first_protocol), (found.second, found.second_protocol)]
            names = [found.kind, *([self.set_name(found.first.set_id)] if set_head else []), str(found.first.tokens)]
            figures = [f"{found.estimate.value:+.2f}", interval(found.estimate)]
            rows.append([*names, *(f"{group.name} on {protocol}" for group, protocol in sides), *figures])
        title = "Differences in points (whole: tested on all patches; rival: random patches tested so, that is PatchDropout)"
        by = head.index("K")
        return Table(title, head, rows, frozenset([by, by + 3, by + 4]), by)

    def sentences(self, judge: Judge) -> list[str]:
        """The verdict: one sentence for each ticket set and K."""
        return [
            sentence(claim, self.where(judge, claim), self.margin, judge.resampled)
            for claim in judge.claims(self.margin)
        ]

    def weight_claims(self, judge: Judge) -> list[WeightClaim]:
        """LTH, DLTH, LOTUS; none without weight tickets."""
        return self._weight_claims[judge]

    def weight_sentences(self, judge: Judge) -> list[str]:
        """The verdict on each of them."""
        claims = self.weight_claims(judge)
        return [weight_sentence(claim, f"{judge.model}, {self.data_of(claim.winning)}") for claim in claims]

    def all_sentences(self, judge: Judge) -> list[str]:
        """Of data tickets, then of weight tickets."""
        found = [*self.sentences(judge), *self.weight_sentences(judge)]
        return found or [f"{judge.model}: cannot be told: no runs of winning tickets."]

    def data_of(self, group: Group) -> str:
        """What a group was trained on: the set, where there are several, the arm and K."""
        names = [self.set_name(group.set_id)] if group.set_id and len(self.set_names) > 1 else []
        return ", ".join([*names, "full" if group.arm == "full" else f"{group.arm} K={group.tokens}"])

    def where(self, judge: Judge, claim: Claim) -> str:
        """What a sentence is about: the model, the tickets, K, and what `allow_diff` lets differ."""
        parts = [
            judge.model,
            self.set_name(claim.set_id) if claim.set_id else "",
            f"K={claim.tokens}" if claim.tokens else "",
        ]
        if claim.a is not None:
            parts.append(claim.a.differing)
            others = {"b": claim.ab, "c": claim.ac}
            parts += [
                f"{x}: {d.second.differing}" for x, d in others.items() if d and d.second.differs != claim.a.differs
            ]
        return ", ".join(part for part in parts if part)

    def model_notes(self, judge: Judge) -> list[str]:
        """How a model's intervals were made, and what to be careful with."""
        if judge.resampled:
            basis = f"intervals: {RESAMPLED} (paired bootstrap, {DRAWS} draws)"
            return [basis, *judge.notes(), *weight_notes(judge, self.weight_claims(judge))]
        spread = judge.spreads[OWN]
        basis = (
            f"intervals: 95 %, Student's t over seeds, one standard deviation pooled over all rows of a column;"
            f" for a - c and a - b, each arm as it was trained, {spread.sd:.2f} points, {spread.df} degrees of freedom"
        )
        return [basis, *judge.notes(), *weight_notes(judge, self.weight_claims(judge))]

    def notes(self) -> list[str]:
        """What all figures need."""
        unit = self.unit()[0]
        notes = [
            f"margin: up to {self.margin} points below c still count as equal; --margin sets it",
            f"train {unit}: one view's forward; in brackets the whole training against full. Times compare only on one idle machine",
            f"test {unit}: the student's, on tickets and on all patches. A test on tickets also needs the selector, not counted here",
        ]
        arms = {run.arm.split(" ")[0] for run in self.runs}
        if "resized" in arms:
            notes.append("resized: the whole image at K coarser patches, in training and in testing")
        if any(" auto" in run.arm for run in self.runs):
            notes.append(
                "auto: of each view as many patches as its scores ask for, in training and on tickets; K is their mean"
            )
        if any(run.arm.startswith("resized +") for run in self.runs):
            notes.append("resized, unmasked: at K coarser patches first, at all in the last epochs and in testing")
        if "gaussian" in arms:
            notes.append("gaussian: random patches, denser at the center (GLIP), tested on the tickets of the set")
        return [*notes, *key_notes(self.runs), *(f"left out: {why}" for why in self.left_out)]

    def set_name(self, set_id: str | None) -> str:
        """A short name for a set in this report."""
        return self.set_names[set_id] if set_id else "any"


def verdict(folders: Sequence[str | PathLike[str]], margin: float = 1.0, allow_diff: Sequence[str] = ()) -> Report:
    """Whether the data-level lottery ticket hypothesis holds in finished runs: does a ~ c > b?

    Args:
        folders: of runs; those that are not finished are left out, and named in the report.
        margin: points that winning tickets may stay below all patches and still count as equal.
        allow_diff: arguments of the runs, as args.yaml names them, that may differ; they tell groups apart.

    Returns:
        `.screen()` and `.markdown()` are for people; `.judges` hold each model's claims and differences.

    Raises:
        TicketSetError: no folder is a finished run, one is damaged, or they do not compare.
    """
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(Path(folder)))
        except LeftOut as why:
            left_out.append(str(why))
    if not runs:
        more = f"; nor is any of {len(left_out) - 1} others" if len(left_out) > 1 else ""
        raise TicketSetError(left_out[0] + more if left_out else "expected folders of runs, got none")
    check_comparable(runs, allow_diff)
    return Report(runs, judges_of(group_runs(runs, allow_diff)), margin, left_out)


def _lines(texts: Sequence[str]) -> str:
    """A text a line; long ones go on below, indented."""
    glued = (text.replace(" %", "\0%") for text in texts)
    wrapped = (textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False) for text in glued)
    return "\n".join(wrapped).replace("\0", " ")


def _set_names(runs: Sequence[Run]) -> dict[str, str]:
    """The method of each set whose tickets arms were trained or tested on; with the start of its id where two share one."""
    methods = {run.args["set_id"]: run.args["set_method"] for run in runs if run.set_id}
    shared = {id: list(methods.values()).count(method) > 1 for id, method in methods.items()}
    return {id: f"{method} {id[:8]}" if shared[id] else method for id, method in methods.items()}


def lettered(group: Group) -> str:
    """Its name with (a), (b) or (c)."""
    return group.name.replace(group.arm, LETTERS.get(group.arm, group.arm), 1)
