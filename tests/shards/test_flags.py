"""Settings: one field is an option, a check and a value."""

import dataclasses
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from shards.console import Finite, reports_errors
from shards.errors import TicketSetError
from shards.flags import Settings, marked, options_of, setting, settings_from


def letters(texts: Any) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise TicketSetError(f"expected A=B, got {text}")
    return dict(text.split("=") for text in texts)


@dataclasses.dataclass(frozen=True)
class Small(Settings):
    data: str = setting(metavar="SPEC", help="Where from.")
    share: float = setting(0.5, Finite(0, 1), "Of the data.", marks=frozenset(["free"]))
    count: int | None = setting(None, click.IntRange(min=1), "How many.", short="-n", shown="all")
    how: Literal["copy", "link"] = setting("copy", help="Which way.")
    scale: tuple[float, float] = setting((0.08, 1.0), Finite(0), "From, to.")
    split: tuple[str, ...] = setting((), help="Repeatable.", flag="--part")
    away: str | None = setting(None, metavar="[PLACE]", help="Elsewhere.", bare="anywhere")
    average: bool = setting(True, help="Over time.")
    loud: bool = setting(False)
    extra: dict[str, str] = setting(dict, parse=letters)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count and self.loud:
            raise TicketSetError("`count`: not beside `loud`")


@click.command()
@options_of(Small)
@reports_errors
def command(**values: Any) -> None:
    small = settings_from(Small, values)
    if small.data == "bad":
        raise TicketSetError("`data` bad: expected another, with `share` 1; `datalth` is no flag")
    click.echo(repr(small))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == code, result.output
    return result.output


def test_a_command_line_and_a_program_make_the_same_settings():
    assert eval(run("--data", "x")) == Small("x")
    typed = run(
        *[
            "--data",
            "x",
            "--share",
            "1",
            "-n",
            "3",
            "--how",
            "link",
            "--scale",
            "0.5",
            "1",
            "--part",
            "a",
            "--part",
            "b",
        ],
        *["--no-average", "--extra", "k=v"],
    )
    by_hand = Small("x", 1.0, 3, "link", (0.5, 1.0), ("a", "b"), average=False, extra={"k": "v"})
    assert eval(typed) == by_hand


@pytest.mark.parametrize(("typed", "away"), [([], None), (["--away"], "anywhere"), (["--away", "here"], "here")])
def test_a_flag_may_be_typed_without_its_value(typed, away):
    assert eval(run(*typed, "--data", "x")) == eval(run("--data", "x", *typed)) == Small("x", away=away)


def test_help_shows_bounds_defaults_and_metavars():
    text = " ".join(run("--help").split())
    for part in (
        "--data SPEC Where from. [required]",
        "--share FLOAT RANGE Of the data. [default: 0.5; 0<=x<=1]",
        "-n, --count INTEGER RANGE How many. [default: all] [x>=1]",
        "--how [copy|link] Which way. [default: copy]",
        "--average / --no-average Over time. [default: average]",
        "--part TEXT Repeatable.",
        "--away [PLACE] Elsewhere.",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", 2.0),
        ("share", "much"),
        ("count", 0),
        ("how", "move"),
        ("scale", (1.0, -1.0)),
        ("loud", "x"),
        ("loud", "no"),
        ("average", 1),
        ("count", "3"),
        ("count", True),
        ("count", 2.0),
        ("share", "0.5"),
        ("how", 1),
        ("split", "train"),
        ("split", (1,)),
        ("data", 5),
    ],
)
def test_a_value_that_a_field_does_not_take_is_refused_in_a_program_too(name, value):
    with pytest.raises(TicketSetError, match=f"^`{name}` "):
        Small(**{"data": "x", name: value})


def test_errors_name_fields_in_programs_and_flags_on_the_command_line():
    with pytest.raises(TicketSetError, match="^`count`: not beside `loud`$"):
        Small("x", count=1, loud=True)
    assert "Error: --count: not beside --loud" in run("--data", "x", "-n", "1", "--loud", code=2)
    assert run("--data", "bad", code=1) == "Error: --data bad: expected another, with --share 1; `datalth` is no flag\n"
    assert "Invalid value for '--extra': expected A=B, got k" in run("--data", "x", "--extra", "k", code=2)


def test_marks_are_found_by_name():
    assert marked("free", Small) == {"share"}
    assert marked("other", Small) == frozenset()
