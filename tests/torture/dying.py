"""Processes that die, and disks that fill: what is done afterwards is what would have been done without."""

import ctypes
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from watch import Case

from conftest import contents
from processes import ended, kill, start
from training import arguments as training_arguments
from training import same, weights_of

MNT_DETACH, CLONE_NEWNS, MS_REC_PRIVATE, MS_REMOUNT = 2, 0x20000, 0x44000, 32


class Killed:
    """A command that is killed at random times until it ends by itself.

    Args:
        name: for the table.
        module: of the command.
        arguments: of it, for an output folder; the same ones resume it.
        result: of an output folder, to be compared.
        equal: compares two results.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Callable[[Path], list[str]],
        result: Callable[[Path], object],
        equal: Callable[[object, object], bool],
        root: Path,
    ) -> None:
        self.name, self._module, self._arguments, self._result, self._equal = name, module, arguments, result, equal
        self._log, self._root = root / "log", root
        began = time.monotonic()
        code = ended(start(module, arguments(root / "whole"), self._log), 120)
        assert code == 0, self._log.read_text()
        self._seconds, self._whole = time.monotonic() - began, result(root / "whole")

    def case(self, rng: random.Random) -> Case:
        """Kill it some times by SIGKILL, SIGTERM or SIGINT, let it end, and compare."""
        out, kills = self._root / "out", []
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(rng.randint(1, 6)):
            pid = start(self._module, self._arguments(out), self._log)
            code = ended(pid, rng.random() * 1.1 * self._seconds)
            if code is not None:
                break
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            code = kill(pid, number)
            kills.append(f"{signal.Signals(number).name}: {code}")
            text = self._log.read_text()
            if code == 999 or "Traceback" in text:  # 999: it did not end
                return Case(f"{kills}", self.name, "fault", text[-6000:])
        code = ended(start(self._module, self._arguments(out), self._log), 120)
        if code != 0:
            return Case(f"{kills}", self.name, "fault", f"exit code {code}: {self._log.read_text()[-1500:]}")
        if not self._equal(self._result(out), self._whole):
            return Case(f"{kills}", self.name, "fault", "another result than without dying")
        left = [path.name for path in out.rglob("*.tmp")]
        return Case(f"{kills}", self.name, f"equal after {len(kills)} deaths", f"left behind: {left}" if left else "")


class Full:
    """A command whose disk fills at a random size, and that goes on when there is room again."""

    def __init__(self, killed: Killed, most: int) -> None:
        self.name, self._killed, self._most = killed.name.replace("dying", "full disk"), killed, most
        self._place = killed._root / "disk"
        self._place.mkdir(exist_ok=True)

    def possible(self) -> bool:
        """Whether this process may mount: as root only."""
        return (
            os.geteuid() == 0
            and ended(start("os", [], Path(os.devnull), lambda: self._mount(65536) or os._exit(7)), 9) == 7
        )

    def _mount(self, size: int, flags: int = 0) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if not flags and libc.unshare(CLONE_NEWNS):
            os._exit(8)
        libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None)
        if libc.mount(b"tmpfs", bytes(self._place), b"tmpfs", flags, b"size=%d" % size):
            os._exit(9)

    def case(self, rng: random.Random) -> Case:
        """In a name space of its own: a small disk, the command, more room, the command again, the comparison."""
        killed, size = self._killed, rng.randrange(8192, self._most)
        verdict = killed._root / "verdict"
        verdict.unlink(missing_ok=True)

        def whole() -> None:
            self._mount(size)
            out = self._place / "out"
            code = ended(start(killed._module, killed._arguments(out), killed._log), 120)
            text = killed._log.read_text()
            if code == 0:
                self._say(verdict, "it fitted")
            if code != 1 or "Traceback" in text or "space" not in text:
                self._say(verdict, f"FAULT exit code {code}: {text[-1500:]}")
            self._mount(256 << 20, MS_REMOUNT)
            code = ended(start(killed._module, killed._arguments(out), killed._log), 120)
            if code != 0:
                self._say(verdict, f"FAULT with room again, exit code {code}: {killed._log.read_text()[-1500:]}")
            if not killed._equal(killed._result(out), killed._whole):
                self._say(verdict, "FAULT another result than on a large disk")
            self._say(verdict, "equal with room again")

        code = ended(start("os", [], killed._root / "outer", whole), 300)
        said = verdict.read_text() if verdict.exists() else f"FAULT no verdict, exit code {code}"
        fault = said.startswith("FAULT")
        return Case(f"{size} bytes", self.name, "fault" if fault else said, said if fault else "")

    @staticmethod
    def _say(verdict: Path, text: str) -> None:
        verdict.write_text(text)
        os._exit(0)


def mining(photos: Path, root: Path, images: str) -> Killed:
    """datalth-mine: the bytes are equal."""
    root.mkdir()
    flags = [
        "--data",
        str(photos),
        "--method",
        "center",
        "--img-size",
        "64",
        "--views",
        "2",
        "--shard-size",
        "3",
        "-j",
        "2",
        "--images",
        images,
    ]
    return Killed(
        f"dying miner ({images})",
        "miner.cli",
        lambda out: [*flags, "--out", str(out)],
        contents,
        lambda a, b: a == b,
        root,
    )


def training(tickets: Path, root: Path) -> Killed:
    """datalth-train: the weights are equal."""
    root.mkdir()

    def arguments(out: Path) -> list[str]:
        return [*training_arguments(tickets, out, "run", "--recovery-interval", 2), "--resume", "latest"]

    return Killed("dying trainer", "trainer.cli", arguments, lambda out: weights_of(out / "run"), same, root)  # type: ignore[arg-type]
