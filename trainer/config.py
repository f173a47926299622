"""Files of flags: recipes, a person's own, a run's args.yaml. No torch: the verdict reads them too."""

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml

from shards.errors import TicketSetError, first_line
from trainer.options import DERIVED, GROUPS

RECIPES = {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
MAX_BYTES = 100_000
OWN = frozenset(["experiment", "resume"])  # of one run: which folder is its, how it was begun


class _Loader(yaml.SafeLoader):
    """Plain values alone, each written once where it stands."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # 300 bytes of them can stand for more than the memory holds
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="expected values, got a *reference to another", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, (key, _) in enumerate(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value in names[:number]:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} a second time", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Names and values of a small file.

    Raises:
        TicketSetError: no plain file, larger than MAX_BYTES, not UTF-8, no names and values, or not plain: a name twice,
            anchors and references to them.
    """
    try:
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "something else" if path.exists() else "none"
            raise TicketSetError(f"{path}: expected a file, got {kind}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise TicketSetError(f"{path}: expected at most {MAX_BYTES} bytes of flags, got more")
        values = yaml.load(data.decode("utf-8-sig"), _Loader)
    except TicketSetError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise TicketSetError(f"{path}: not readable: {line}{error.problem}") from None
    except Exception as error:  # PyYAML's constructors raise whatever they met: IndexError for an empty !!int
        raise TicketSetError(f"{path}: not readable: {first_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise TicketSetError(f"{path}: expected lines of name: value, got {_shown(values)}")
    return {str(name): value for name, value in values.items()}


def find_config(text: str) -> Path:
    """A file, or else the recipe of that name: quick, quick.yaml and recipes/quick.yaml are one.

    Raises:
        TicketSetError: neither.
    """
    if os.path.exists(text) and not (os.path.isdir(text) and text in RECIPES):
        return Path(text)
    name = text.removeprefix("recipes/").removesuffix(".yaml")
    if name not in RECIPES:
        raise TicketSetError(f"{text!r}: expected a file or a recipe ({', '.join(RECIPES)}), found neither")
    return RECIPES[name]


def read_config(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """-c FILE.yaml sets defaults; what is typed wins, as with timm."""
    if text is None:
        return None
    known = {p.name: p for p in context.command.params if isinstance(p, click.Option) and p.name != parameter.name}
    try:
        values = _named(text, read_yaml(find_config(text)))
        if values.keys() & DERIVED:  # a run's args.yaml: another run like it
            # It has settings that another command has no flag for.
            others = {one.name for group in GROUPS for one in fields(group)} - known.keys()  # type: ignore[arg-type]
            values = {name: value for name, value in values.items() if name not in DERIVED | OWN | others}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            near = difflib.get_close_matches(unknown[0], [str(name) for name in known], 1)
            hint = f"; near: {near[0]}" if near else ""
            raise TicketSetError(f"{text}: no such flag: {_shown(unknown[0])}{hint}")
        values = {name: _default(value, known[name], context, f"{text}: {name}") for name, value in values.items()}
    except TicketSetError as error:
        raise click.BadParameter(str(error)) from None
    context.default_map = {**(context.default_map or {}), **values}
    return text


config_option = click.option(
    "-c",
    "--config",
    metavar="NAME|FILE.yaml",
    is_eager=True,
    callback=read_config,
    expose_value=False,
    help=f"Defaults for these flags: a recipe ({', '.join(RECIPES)}) or a file.",
)


def _named(text: str, values: dict[str, Any]) -> dict[str, Any]:
    """Flags by click's names: lr-base and lr_base are one."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        if (known := name.replace("-", "_")) in out:
            raise TicketSetError(f"{text}: {name}: a second time, with - and with _")
        out[known] = value
    return out


def _default(value: Any, option: click.Option, context: click.Context, where: str) -> Any:
    """What YAML gave, as click would have read it from a command line.

    Raises:
        TicketSetError: of a type that the flag does not take. YAML makes a bare yes true and a bare 010 eight.
    """
    if option.multiple:  # model-kwargs: {depth: 2}
        if isinstance(value, dict):
            return [f"{name}={item!r}" for name, item in value.items()]
        if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            return value
        raise TicketSetError(f"{where}: expected lines of name: value, got {_shown(value)}")
    if option.name in ("drop_blocks", "tokens") and isinstance(value, (list, int)) and not isinstance(value, bool):
        # Text to click, but a list of blocks and K as a number in args.yaml.
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)
    if value is None and not (option.is_flag or isinstance(option.default, (int, float, str))):
        return None
    text = isinstance(option.type, (click.Choice, click.types.StringParamType))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, bool) if option.is_flag else isinstance(value, str) or (number and not text)):
        quotes = "; put it in quotes" if text and value is not None else ""
        unset = "; leave the line out for the default" if value is None else ""
        raise TicketSetError(f"{where}: expected {_expected(option, text)}, got {_shown(value)}{quotes}{unset}")
    if option.is_flag:
        return value
    try:
        option.type.convert(str(value), option, context)
    except click.BadParameter as error:
        raise TicketSetError(f"{where}: expected {_expected(option, text)}: {error.message}") from None
    return str(value)


def _expected(option: click.Option, text: bool) -> str:
    if option.is_flag:
        return "true or false"
    if isinstance(option.type, click.Choice):
        return " or ".join(map(str, option.type.choices))
    return "text" if text else "a whole number" if isinstance(option.type, click.types.IntParamType) else "a number"


def _shown(value: Any) -> str:
    """A value in a line of ours."""
    return "null" if value is None else repr(value)[:80]
