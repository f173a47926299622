"""litdata and mosaicml-streaming, in a Python of their own that takes its turn over a pipe."""

import subprocess
from pathlib import Path

from benchmarks.rounds import Lap
from benchmarks.setting import one_thread


class Stranger:
    """A process that holds one peer's loader ready.

    Args:
        python: of the peers' virtual environment.
        name: litdata or streaming.
        pictures: class folders.
        folder: for the peer's own copy.
    Raises:
        RuntimeError: the peer cannot be started.
    """

    def __init__(self, python: str, name: str, pictures: Path, folder: Path, batch_size: int) -> None:
        program = str(Path(__file__).with_name("stranger.py"))
        arguments = [python, program, name, str(pictures), str(folder), str(batch_size)]
        self._process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread()
        )
        self.versions = self._answer()

    def lap(self, batches: int) -> Lap:
        """The next `batches` batches; wall and CPU seconds are the peer's own."""
        assert self._process.stdin
        print(batches, file=self._process.stdin, flush=True)
        return Lap(*map(float, self._answer().split()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout
        for line in self._process.stdout:  # libraries may print as well
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError(f"{self._process.args[:3]}: ended with {self._process.wait()}")
