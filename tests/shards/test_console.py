"""What commands write on the screen: errors of one line, names that cannot act on a terminal, any output encoding."""

import ast
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image
from test_verdict import write_arms

from conftest import inspect, mine, write_image
from shards.console import print_json, printable, rate, reports_errors, table
from shards.errors import ImageError, TicketSetError

KEY = "train/ant/ant_0"


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain, übung, 日本, 🐦, C:\\n", "plain, übung, 日本, 🐦, C:\\n"),
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\nb\rc\td\0", r"a\nb\rc\td\x00"),
        ("\x7f\x80\x9b2J\x9f", r"\x7f\x80\x9b2J\x9f"),
        ("\u202agnp.\u202e\u2066\u2069\u2028\u2029", r"\u202agnp.\u202e\u2066\u2069\u2028\u2029"),
        ("photo_\udcff\ud800", r"photo_\udcff\ud800"),
    ],
)
def test_what_acts_on_a_terminal_is_spelled_out_and_nothing_else(raw, shown):
    assert printable(raw) == shown
    assert (
        printable("\xa0\u200b\u2027\u202f\u2065\u206a\ue000\xff ~") == "\xa0\u200b\u2027\u202f\u2065\u206a\ue000\xff ~"
    )


def test_a_name_in_a_table_cannot_add_a_line_to_it():
    assert table([["bird\n0 problems", 1], ["\x1b[2J", 23]], ["class", "count"]).splitlines() == [
        "class             count",
        r"bird\n0 problems      1",
        r"\x1b[2J              23",
    ]


def run(error: BaseException | None, *words: str) -> tuple[int, str]:
    @click.command()
    @reports_errors
    def command() -> None:
        for word in words:
            click.echo(word)
        if error is not None:
            raise error

    result = CliRunner().invoke(command)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


FULL = "what is finished is safe: free some space and run the same command again"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TicketSetError("set: expected a, got b"), "set: expected a, got b"),
        (ImageError("too large"), "too large"),
        (TicketSetError("a\x1b[31m\nset: sound"), r"a\x1b[31m\nset: sound"),
        (TicketSetError("\udcff.tar: missing"), r"\udcff.tar: missing"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.tar"), f"out/a.tar: No space left on device; {FULL}"),
        (
            OSError(errno.EMFILE, "Too many open files", "a.jpg"),
            (
                "a.jpg: Too many open files; what is finished is safe: allow more open files (ulimit -n), or use fewer workers (-j),"
                " and run the same command again"
            ),
        ),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EACCES, "Permission denied", "new\nline"), r"new\nline: Permission denied"),
        (OSError("cannot write"), "cannot write"),
        (OSError(), "OSError"),
        (
            MemoryError(),
            "out of memory; what is finished is safe: free some memory, or use fewer workers (-j), and run the same command again",
        ),
        (
            MemoryError("Unable to allocate 3.5 GiB"),
            (
                "out of memory (Unable to allocate 3.5 GiB); what is finished is safe: free some memory, or use fewer workers (-j),"
                " and run the same command again"
            ),
        ),
    ],
)
def test_an_error_is_one_line(error, line):
    assert run(error) == (1, f"Error: {line}\n")


def test_a_list_of_ours_keeps_its_lines():
    assert run(TicketSetError("expected one of\n  this\n  th\nat")) == (
        1,
        "Error: expected one of\n  this\n  th\\nat\n",
    )


@pytest.mark.parametrize("error", [ValueError("a fault of ours"), KeyError("x"), RuntimeError()])
def test_a_fault_of_ours_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(error)


INTERRUPTED = """
import gc, os, signal, sys, time, weakref
import click
from miner.cli import stopped_by_sigterm
from shards.console import reports_errors

place, number = sys.argv[1], int(sys.argv[2])


class Thing:
    def __del__(self):
        if place == "del":
            stop()


def stop(*_):
    os.kill(os.getpid(), number)
    time.sleep(0)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("rest", nargs=-1)
@HEARD
def command(rest):
    with stopped_by_sigterm():
        thing = Thing()
        seen = weakref.ref(thing, stop) if place == "weakref" else None
        if place == "fork":
            os.register_at_fork(after_in_parent=stop)
            os.fork() or os._exit(0)
        del thing
        for _ in range(100 if heard else 10):
            time.sleep(0.05)
    print("went on")


command()
"""


@pytest.mark.parametrize("heard", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["del", "weakref", "fork"])
def test_a_stop_where_python_ignores_it_is_heard_all_the_same(place, number, heard):
    """Without `reports_errors`, the control, the command goes on after a traceback."""
    script = f"heard = {heard}\n" + INTERRUPTED.replace("@HEARD", "@reports_errors" if heard else "")
    command = [sys.executable, "-c", script, place, f"{int(number)}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if heard:
        assert (found.returncode, found.stdout, found.stderr.strip()) == (1, "", "Aborted!")
    else:
        assert (found.returncode, found.stdout) == (0, "went on\n") and "KeyboardInterrupt" in found.stderr


@pytest.mark.parametrize("raised", ["cause", "context"])
def test_an_error_that_comes_of_a_stop_is_the_stop(raised):
    @click.command()
    @reports_errors
    def command():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as stop:
            raise RuntimeError("Error calling __set_name__") from (stop if raised == "cause" else None)

    result = CliRunner().invoke(command, [])
    assert (result.exit_code, result.output.strip()) == (1, "Aborted!")


SPEAKING = """
import click
from shards.console import print_json, reports_errors
from shards.errors import TicketSetError

@click.command()
@reports_errors
def command():
    print("printed 日本 → é \\udcff")
    click.echo("echoed 日本 → é \\udcff")
    raise TicketSetError("日本 → é \\udcff")

command()
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8:strict", "日本 → é \\udcff"),
        ("latin-1", "\\u65e5\\u672c \\u2192 é \\udcff"),
        ("cp1252:strict", "\\u65e5\\u672c \\u2192 é \\udcff"),
    ],
)
def test_no_output_encoding_stops_a_command(encoding, shown):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    found = subprocess.run([sys.executable, "-c", SPEAKING], env=environment, capture_output=True, check=False)
    name = encoding.partition(":")[0]
    assert found.returncode == 1, found.stderr
    assert found.stdout.decode(name) == f"printed {shown}\nechoed {shown}\n"
    assert found.stderr.decode(name) == f"Error: {shown}\n"


def test_an_ascii_terminal_stops_no_command(tmp_path):
    (tmp_path / "speak.py").write_text(SPEAKING.replace("click.echo", "print"), encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, tmp_path / "speak.py"], env=environment, capture_output=True, check=False)
    shown = b"\\u65e5\\u672c \\u2192 \\xe9 \\udcff\n"
    assert (found.returncode, found.stdout) == (1, b"printed " + shown + b"echoed " + shown)
    assert b"Traceback" not in found.stderr


def closed_pipe() -> int:
    """As `| head` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("command", [("show", KEY), ("stats",)])
def test_a_picture_is_there_though_nobody_reads_the_lines(center_set, tmp_path, command):
    name, *rest = command
    picture = tmp_path / "out.png"
    subprocess.run(
        [sys.executable, "-m", "shards.inspect.cli", name, center_set, *rest, "-o", picture],
        stdout=closed_pipe(),
        check=False,
    )
    with Image.open(picture) as image:
        image.load()


@pytest.mark.slow
def test_a_verdict_is_written_though_nobody_reads_it(tmp_path):
    runs = write_arms(tmp_path / "runs")
    subprocess.run(
        [sys.executable, "-m", "trainer.verdict.cli", *runs, "-o", tmp_path / "out"], stdout=closed_pipe(), check=False
    )
    assert (tmp_path / "out" / "verdict.json").is_file()


def test_a_failed_image_is_shown_though_there_is_nothing_to_draw(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/train/ant/ant_0.jpg").write_bytes(b"no image")
    mine("--data", tmp_path / "photos", "--out", tmp_path / "set", "--method", "center", "--views", 1,
         "--max-failures", 1)  # fmt: skip
    found = inspect("show", tmp_path / "set", KEY, "-o", tmp_path / "a.png", code=1)
    assert "not an image" in found.output and f"Error: {KEY}: failed (not an image" in found.output
    assert not (tmp_path / "a.png").exists()


def test_odd_exif_is_no_matter_of_the_screen(tmp_path):
    """Pillow warns of every such image; its pixels are right."""
    for number, name in enumerate(("a", "b")):
        path = tmp_path / "photos/train" / name / "0.jpg"
        write_image(path, number)
        with Image.open(path) as image:
            image.save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    mine("--data", tmp_path / "photos", "--out", tmp_path / "set", "--method", "center", "--views", 1,
         "--exif", "apply", "--val-share", 0)  # fmt: skip
    for command in (
        ("verify", tmp_path / "set", "--deep"),
        ("show", tmp_path / "set", "train/a/0", "-o", tmp_path / "a.png"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with Image.open(path) as image:
                image.getexif()
            assert [w.category for w in caught] == [UserWarning]  # negative control
            inspect(*command)
        assert len(caught) == 1


def test_json_for_programs_has_nothing_that_acts_on_a_terminal():
    content = {"name": "\x9b2J\u202e日本\udcff", "k": 1}

    @click.command()
    def command() -> None:
        print_json(content)

    output = CliRunner().invoke(command).output
    assert output.isascii() and json.loads(output) == content


ROOT = Path(__file__).parents[2]


def test_text_is_never_in_the_encoding_of_the_locale():
    """Which would write other bytes, or none, under another locale."""
    found = []
    for folder in ("shards", "miner", "trainer", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and not any(word.arg == "encoding" for word in node.keywords):
                    name = getattr(node.func, "attr", getattr(node.func, "id", None))
                    modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                    text_file = name == "open" and isinstance(node.func, ast.Name) and not any("b" in m for m in modes)
                    if text_file or name in ("read_text", "write_text"):
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [
        (1234, 1, "1234 images/s"),
        (42, 10, "4.2 images/s"),
        (9996, 100, "100.0 images/s"),
        (1, 8, "8.0 s/image"),
        (0, 5, "- images/s"),
        (3, 0, "- images/s"),
    ],
)
def test_a_rate_says_something_at_any_speed(count, seconds, text):
    assert rate(count, seconds) == text
