"""JSON objects as frozen dataclasses: each field says its type, and the check of what a file may hold there."""

import dataclasses
from dataclasses import MISSING, dataclass, field
from typing import Any, TypeVar

from shards.checks import OBJECT, Check
from shards.errors import TicketSetError

R = TypeVar("R", bound="Record")


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of what a JSON object becomes. A field is `name: Annotated[type, check]`, or another record.

    A field whose default is None may be missing, and is not written where it is None.

    Attributes:
        others: fields of a higher minor version, which nothing reads, kept so that the hash of the whole stays right.
    """

    others: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls: type[R], value: Any, name: str) -> R:  # noqa: PYI019 - typing.Self is newer than Python 3.10
        """The record of a JSON value; itself a check.

        Raises:
            TicketSetError: it is no object, lacks a field, or a field is not what it should be.
        """
        content, known = OBJECT(value, name), _known(cls)
        missing = [each.name for each in known if each.default is MISSING and each.name not in content]
        if missing:
            raise TicketSetError(f"{name}: lacks the field {missing[0]!r}")
        said = {
            each.name: _check_of(each)(content[each.name], f"{name}: {each.name}")
            for each in known
            if each.name in content
        }
        return cls(**said, others={key: item for key, item in content.items() if key not in said})

    def to_json(self) -> dict[str, Any]:
        """What `parse` read, or what it will read: lists for tuples, dicts for records."""
        said = {each.name: getattr(self, each.name) for each in _known(type(self))}
        absent = {each.name for each in _known(type(self)) if each.default is None and said[each.name] is None}
        return {name: _plain(value) for name, value in said.items() if name not in absent} | self.others

    def part(self, kind: type["Record"]) -> dict[str, Any]:
        """The fields that it shares with a class it inherits from, to make a sibling of."""
        return {each.name: getattr(self, each.name) for each in _known(kind)}


def _known(kind: type[Record]) -> list["dataclasses.Field[Any]"]:
    return [each for each in dataclasses.fields(kind) if each.name != "others"]


def _check_of(declared: "dataclasses.Field[Any]") -> Check:
    kind: Any = declared.type  # Annotated[type, check], or a record, which checks itself
    check: Check = kind.__metadata__[0] if hasattr(kind, "__metadata__") else kind.parse
    return check


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
