"""What a value read from somebody's file must be: small checks that are put together into those of whole files.

A check is a function (value, name) that gives back what the code works with (the value itself, a tuple for a list, a
record for an object), or raises a line: the name, what was expected, what was found.
"""

import json
import re
import reprlib
from collections.abc import Callable
from typing import Any

from shards.errors import TicketSetError

Check = Callable[[Any, str], Any]  # (value, its name) -> the value as the code has it; raises TicketSetError
# No line of a file, nor a terminal, may meet these.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def rule(holds: Callable[[Any], bool], says: str) -> Check:
    """Any condition, and its words."""

    def check(value: Any, name: str) -> Any:
        if not holds(value):
            raise TicketSetError(f"{name}: expected {says}, got {reprlib.repr(value)}")
        return value

    return check


def integer(low: int, high: int) -> Check:
    """A whole number; true and 1.0 are none."""
    return rule(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Check:
    """A finite number."""
    return rule(
        lambda v: type(v) in (int, float) and low <= v <= high,  # not a number is in no range
        f"a number from {low:g} to {high:g}",
    )


def one_of(*values: Any) -> Check:
    """One of some values, of the same type."""
    return rule(lambda v: any(type(v) is type(w) and v == w for w in values), f"one of {', '.join(map(str, values))}")


def text(longest: int) -> Check:
    """Characters without control characters, one at least."""
    return rule(
        lambda v: isinstance(v, str) and 0 < len(v) <= longest and not CONTROL.search(v),
        f"1 to {longest} characters without control characters",
    )


def matching(pattern: re.Pattern[str], says: str) -> Check:
    """Text that matches as a whole."""
    return rule(lambda v: isinstance(v, str) and pattern.fullmatch(v) is not None, says)


def or_null(check: Check) -> Check:
    """None, or what another check lets pass."""
    return lambda value, name: None if value is None else check(value, name)


def list_of(check: Check, shortest: int, longest: int) -> Check:
    """A list whose every item passes; it becomes a tuple."""
    whole = rule(
        lambda v: isinstance(v, list) and shortest <= len(v) <= longest, f"a list of {shortest} to {longest} values"
    )

    def check_all(value: Any, name: str) -> tuple[Any, ...]:
        return tuple(check(item, f"{name}[{number}]") for number, item in enumerate(whole(value, name)))

    return check_all


def fields(required: dict[str, Check], optional: dict[str, Check] | None = None) -> Check:
    """An object that has some fields; others are left alone."""

    def check_all(value: Any, name: str) -> Any:
        OBJECT(value, name)
        missing = [field for field in required if field not in value]
        if missing:
            raise TicketSetError(f"{name}: lacks the field {missing[0]!r}")
        for field, check in {**required, **(optional or {})}.items():
            if field in value:
                check(value[field], f"{name}: {field}")
        return value

    return check_all


def mapping_of(names: Check, check: Check, most: int, fewest: int = 1) -> Check:
    """An object of `fewest` to `most` fields; their names pass one check, their values another."""
    whole = rule(lambda v: isinstance(v, dict) and fewest <= len(v) <= most, f"{fewest} to {most} names and values")

    def check_all(value: Any, name: str) -> dict[str, Any]:
        items = whole(value, name).items()
        return {names(field, f"{name}: name"): check(item, f"{name}: {field}") for field, item in items}

    return check_all


OBJECT = rule(lambda v: isinstance(v, dict), "names and values")


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        TicketSetError: it does not.
    """

    def refuse(word: str) -> float:  # NaN and Infinity are Python's, not JSON's
        raise ValueError(f"a number that is none: {word}")

    try:
        content = json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise TicketSetError(f"{where}: not readable as JSON: nested too deeply") from None
    except ValueError as error:
        raise TicketSetError(f"{where}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise TicketSetError(f"{where}: expected names and values, got {type(content).__name__}")
    return content
