"""The one door: every public name, its own object, and no torch before one is asked for that needs it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import datalth


@pytest.mark.parametrize("name", datalth.__all__)
def test_a_public_name_is_found_where_it_is_written_and_explains_itself(name):
    found = getattr(datalth, name)
    assert found.__module__ == datalth._HOMES[name] and found.__name__ == name
    assert found.__doc__ and getattr(datalth, name) is found


def test_editors_and_type_checkers_are_told_the_same_homes_as_the_running_program():
    """They read the imports, which never run, and __all__, which must be written out for them."""
    tree = ast.parse(Path(datalth.__file__).read_text(encoding="utf-8"))
    (unread,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {name.name: node.module for node in unread.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert told == datalth._HOMES
    assert sorted(told) == sorted(datalth.__all__) and set(datalth.__all__) <= set(dir(datalth))


def test_other_names_are_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'datalth' has no attribute 'TicketSets'"):
        datalth.TicketSets  # noqa: B018


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("", False),
        ("Sample TicketSet render_view verdict", False),
        pytest.param("TicketViT", True, marks=pytest.mark.slow),
    ],
)
def test_the_door_needs_no_torch(names, expected):
    code = f"import sys, datalth\nfor name in {names.split()!r}: getattr(datalth, name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
