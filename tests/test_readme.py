"""README as a new user takes it: its commands in one folder at toy size, the docs' programs in the same folder, however installed."""

import glob
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from command_lines import COMMANDS, check_taken
from conftest import SELECTOR
from servers import upload
from trainer.config import RECIPES
from training import QUICK

pytestmark = pytest.mark.slow  # runs all of README's commands

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path = ROOT / "README.md") -> list[list[str]]:
    """A page's indented blocks, line by line."""
    found: list[list[str]] = [[]]
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found[-1].append(line[4:])
        elif line.strip():
            found.append([])
    return [block for block in found if block]


def run_command(line: str, photos: Path, weights: Path, s3: str) -> str:
    """One line of a shell block, with flags that make it small."""
    places = {"/data/imagenet": str(photos), "my-photos": str(photos), "s3://bucket": s3, "/local/cache": "cache"}
    words = [word for word in shlex.split(line, comments=True) if word not in ("--pretrained", "--amp")]  # no network
    for place, here in places.items():
        words = [word.replace(place, here) for word in words]
    if words[0] == "torchrun":
        words = words[words.index("--nproc-per-node") + 2 :]
    name, *flags = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    if name == "datalth-mine":
        flags += ["--img-size", "64", "-j", "2", "--device", "cpu", *(["--tokens", "8"] if "--tokens" in flags else [])]
        of_a_set = {"link", "ranked"} & set(flags)  # which then decides the rest
        flags += [] if of_a_set else ["--views", "4", "--selector", SELECTOR, "--weights", str(weights)]
    if name == "datalth-train" or flags[0] == "mine":
        flags += [*QUICK, "--epochs", "1", "--warmup-epochs", "0", "--unmask-epochs", "0"]
        flags += ["--levels", "2"] if flags[0] == "mine" else []  # of eleven
    result = CliRunner().invoke(COMMANDS[name], flags)
    assert result.exit_code == 0, (line, result.output, result.exc_info)
    return name


def test_readmes_commands_and_then_its_python_run_in_one_folder(photos, weights, tmp_path, monkeypatch, s3):
    monkeypatch.chdir(tmp_path)
    upload(photos, f"{s3}/imagenet")
    shutil.copy(photos / "val" / "bee" / "bee_0.jpg", "photo.jpg")
    shell = [line for block in blocks() if block[0].split()[0] in (*COMMANDS, "torchrun") for line in block]
    ran = [run_command(line, photos, weights, s3) for line in shell]
    assert set(ran) == set(COMMANDS) and Path("shards").is_dir()
    page = ROOT / "docs" / "PROGRAMS.md"
    programs = ["\n".join(block) for block in blocks(page) if block[0].startswith(("import ", "from "))]
    assert len(programs) == 3
    outputs = []
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    name, share = outputs[-1].split()
    assert name in ("ant", "bee", "cat") and 1 / 3 <= float(share) <= 1


def commands(page: Path) -> list[str]:
    """Its lines that call a command of ours, also under torchrun and where they go on in the next line."""
    lines = "\n".join(line for block in blocks(page) for line in block).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.split()[:1] and line.split()[0] in (*COMMANDS, "torchrun")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_is_taken_by_its_command(page, tmp_path, monkeypatch):
    """Parsed and not run: each flag is there and takes its value."""
    monkeypatch.chdir(tmp_path)
    for line in commands(page):
        words = shlex.split(line, comments=True)
        check_taken([word for word in words if word not in ("...", "[...]")])


def test_every_block_of_the_readme_is_of_a_kind_that_is_tried():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks():
        first, *rest = block[0].split()
        assert first in (*COMMANDS, "torchrun") or (first == "make" and rest[0] in targets), block


def test_plain_folders_of_their_names_do_not_hide_the_packages(tmp_path):
    """`--out shards` makes one; a finder of an editable install would lose against it."""
    try:
        url = json.loads(importlib.metadata.distribution("datalth").read_text("direct_url.json") or "{}").get("url")
    except importlib.metadata.PackageNotFoundError:
        url = None
    if url != ROOT.as_uri():
        pytest.skip("another folder is installed here")
    for name in ("datalth", "shards", "miner", "trainer"):
        (tmp_path / name).mkdir()
    code = (
        "import datalth, miner, trainer; datalth.TicketSet; print(datalth.__file__, miner.__file__, trainer.__file__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "None" not in done.stdout, done.stderr


def test_packages_hold_the_recipes_pages_and_types_and_an_editable_install_has_a_root():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest needs tomli too
    setup = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = setup["package-data"]
    shipped = {path for pattern in patterns["trainer"] for path in (ROOT / "trainer").glob(pattern)}
    assert shipped == set(RECIPES.values()) and len(shipped) >= 9
    web = {path for kind in ("html", "css", "js") for package in setup["packages"]["find"]["include"]
           for path in (ROOT / package.removesuffix("*")).rglob(f"*.{kind}")}  # fmt: skip
    found = {
        path
        for name in patterns
        for pattern in patterns[name]
        for path in (ROOT / name.replace(".", "/")).glob(pattern)
    }
    assert web and web <= found
    packages = {name.removesuffix("*") for name in setup["packages"]["find"]["include"]}
    assert packages == {path.parent.name for path in ROOT.glob("*/py.typed")} and patterns["*"] == ["py.typed"]
    # A root, and nothing else, makes setuptools write a .pth instead of a finder.
    assert setup["package-dir"] == {"": "."}
