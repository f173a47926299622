"""Settings: frozen dataclasses whose fields are written once, with type, default, bounds and help. A command's options
are made from them, and a program makes them by hand.

    @dataclass(frozen=True)
    class Views(Settings):
        hflip: float = setting(0.5, Finite(0, 1), "Probability that a random view is flipped.", metavar="P")

    @click.command()
    @options_of(Views)          # --hflip P  Probability that a random view is flipped.  [default: 0.5; 0<=x<=1]
    def main(**values):
        views = settings_from(Views, values)

An error names a field in backquotes, `hflip`; `shards.console.reports_errors` turns it into the flag.
"""

import contextlib
import dataclasses
import importlib
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click

from shards.errors import TicketSetError

T = TypeVar("T", bound="Settings")
Command = Callable[..., Any]


def setting(
    default: Any = dataclasses.MISSING,
    kind: "click.ParamType[Any] | None" = None,
    help: str = "",
    *,
    metavar: str | None = None,
    flag: str | None = None,
    short: str | None = None,
    shown: str | None = None,
    parse: Callable[[Any], Any] | None = None,
    bare: str | None = None,
    marks: frozenset[str] = frozenset(),
) -> Any:
    """A field of `Settings`.

    Args:
        default: a value, or a function without arguments that makes it; without one the field is required.
        kind: of the value, or of each of several: click's type, with its bounds. Without one the annotation says it.
        help: for --help.
        metavar: what --help shows in the value's place.
        flag: where it is not the name with dashes.
        short: of one letter, `-b`.
        shown: the default as --help shows it, where the value itself says too little.
        parse: text, or for a dict or a tuple of any length all texts, -> value.
        bare: the value of a flag that is typed without one.
        marks: what else is true of it; see `marked`.
    """
    metadata: dict[str, Any] = {
        "kind": kind,
        "help": help,
        "metavar": metavar,
        "flag": flag,
        "short": short,
        "shown": shown,
    }
    metadata |= {"parse": parse, "bare": bare, "marks": marks}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Settings:
    """Base of frozen dataclasses of `setting` fields; their values are checked when they are made.

    Raises:
        TicketSetError: a value that its field does not take.
    """

    def __post_init__(self) -> None:
        for field, hint in _fields(type(self)):
            _check(field, hint, getattr(self, field.name))


def marked(mark: str, *groups: type[Settings]) -> frozenset[str]:
    """Names of the fields that bear a mark."""
    return frozenset(field.name for group in groups for field, _ in _fields(group) if mark in field.metadata["marks"])


def options_of(*groups: type[Settings]) -> Callable[[Command], Command]:
    """A decorator that gives a click command an option for every field of the groups, in their order."""

    def decorate(command: Command) -> Command:
        for group in reversed(groups):
            for field, hint in reversed(_fields(group)):
                command = _option(field, hint)(command)
        return command

    return decorate


def settings_from(group: type[T], values: Mapping[str, Any]) -> T:
    """A group out of a command's values.

    Raises:
        click.UsageError: values that do not go together.
    """
    with usage_errors():
        return group(**{field.name: values[field.name] for field, _ in _fields(group)})


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Errors about settings inside are those of how a command was typed: exit code 2."""
    try:
        yield
    except TicketSetError as error:
        raise click.UsageError(as_flags(str(error))) from None


def as_flags(text: str) -> str:
    """Text with the backquoted fields of the command that is running as its flags, an argument's as --help names it;
    in a program it stays as it is."""
    context = click.get_current_context(silent=True)
    for parameter in context.command.params if context is not None else ():
        if parameter.opts:
            option = isinstance(parameter, click.Option)
            shown = max(parameter.opts, key=len) if option else parameter.human_readable_name
            text = text.replace(f"`{parameter.name}`", shown)
    return text


def function_of(spec: str, field: str) -> Callable[..., Any]:
    """The function that `module:function` names, of any module that can be imported, the working folder's too.

    Args:
        field: that says so, for the error.
    Raises:
        TicketSetError: there is none.
    """
    module_name, _, function_name = spec.partition(":")
    if os.getcwd() not in sys.path:  # a console script looks beside itself only, not where the user works
        sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise TicketSetError(f"`{field}` {spec}: {error}") from None
    if not callable(function):
        raise TicketSetError(f"`{field}` {spec}: expected a function, got {type(function).__name__}")
    return function


def _fields(group: type[Settings]) -> list[tuple[Any, Any]]:
    """Fields and their types; of `X | None` X."""
    hints = typing.get_type_hints(group)
    return [(field, _bare(hints[field.name])) for field in dataclasses.fields(group)]  # type: ignore[arg-type]


def _bare(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = set(typing.get_args(hint)) - {type(None)}
        return kinds.pop() if len(kinds) == 1 else hint  # of several a field's own `parse` makes one
    return hint


def _option(field: Any, hint: Any) -> Callable[[Command], Command]:
    said, origin = field.metadata, typing.get_origin(hint)
    flag = said["flag"] or f"--{field.name.replace('_', '-')}"
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory
    keywords: dict[str, Any] = {"help": said["help"], "metavar": said["metavar"], "required": needed}
    if not needed:
        # Of nothing, none and off there is nothing to show.
        plain = default == () or any(default is nothing for nothing in (None, False, dict))  # 0 is something
        keywords |= {"default": default, "show_default": not plain}
    if hint is bool:
        keywords["is_flag"] = True
        flag += f"/--no-{flag.removeprefix('--')}" if default is True else ""
    elif origin is typing.Literal:
        keywords["type"] = click.Choice(typing.get_args(hint))
    elif said["parse"]:
        keywords |= {"callback": _parsing(said["parse"]), "multiple": hint is dict or origin is dict}
        keywords["default"] = None if default is dict else default
    elif origin is tuple:
        parts = typing.get_args(hint)
        keywords["type"] = said["kind"] or parts[0]
        keywords |= {"multiple": True} if parts[-1] is Ellipsis else {"nargs": len(parts)}
    else:
        keywords["type"] = said["kind"] or hint
    if said["bare"] is not None:
        keywords |= {"is_flag": False, "flag_value": said["bare"]}
    if said["shown"]:  # click shows none where the default is None, and else in brackets
        keywords["help"] += f"  [default: {said['shown']}]"
        keywords["show_default"] = False
    names = [name for name in (said["short"], flag, field.name) if name]
    return click.option(*names, **keywords)


def _parsing(parse: Callable[[Any], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(context: click.Context, parameter: click.Parameter, text: Any) -> Any:
        try:
            return parse(text)
        except TicketSetError as error:
            raise click.BadParameter(str(error)) from None

    return callback


# What a value of a type is. A program's value is kept as it is, so that "3" is no number though click would read it as one.
_TYPES: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
}


def _check(field: Any, hint: Any, value: Any) -> None:
    said, origin = field.metadata, typing.get_origin(hint)
    if value is None or said["parse"]:
        return
    if origin is tuple and not isinstance(value, tuple):
        raise TicketSetError(f"`{field.name}` {value!r}: expected a tuple")
    item = typing.get_args(hint)[0] if origin is tuple else str if origin is typing.Literal else hint
    kind = click.Choice(typing.get_args(hint)) if origin is typing.Literal else said["kind"]
    wanted, words = _TYPES[item]
    for one in value if origin is tuple else (value,):
        if not isinstance(one, wanted) or (isinstance(one, bool) and item is not bool):
            raise TicketSetError(f"`{field.name}` {value!r}: expected {words}")
        try:
            if kind is not None:
                kind.convert(one, None, None)
        except click.BadParameter as error:
            raise TicketSetError(f"`{field.name}` {value!r}: {error.message}") from None
