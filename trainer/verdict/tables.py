"""Tables of text, for the screen and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from shards.console import table
from trainer.verdict.statistics import Estimate


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        right: the columns of figures.
        by: the column at whose changes the screen shows a gap; None: no gaps.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int]
    by: int | None

    def plain(self) -> str:
        """For the screen."""
        columns = list(zip(self.head, *self.rows, strict=True))
        for i in self.right:
            width = max(map(len, columns[i]))
            columns[i] = tuple(cell.rjust(width) for cell in columns[i])
        head, *rows = zip(*columns, strict=True)
        first, *lines = table(rows, head).splitlines()
        by = slice(0, 0) if self.by is None else slice(self.by, self.by + 1)
        gaps = ["\n" if row[by] != last[by] else "" for row, last in zip(rows[1:], rows, strict=False)]
        return "\n".join(
            [f"{self.title}\n", first, *(gap + line for gap, line in zip(["", *gaps], lines, strict=True))]
        )

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [self.head, ["---:" if i in self.right else "---" for i in range(len(self.head))], *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(estimate: Estimate | None) -> str:
    """A figure and half its interval."""
    if estimate is None:
        return "n/a"
    return f"{estimate.value:.2f} ±{'?' if estimate.half is None else f'{estimate.half:.2f}'}"
