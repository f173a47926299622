"""Commands in child processes, forked from this one, which has imported torch already."""

import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def start(module: str, arguments: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """A command in a child process; returns its pid."""
    sys.stdout.flush()
    # Until the child may be interrupted: inside the hooks of a fork Python ignores a Ctrl-C, and prints a traceback.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid
    code = 70
    try:
        before()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        faulthandler.register(signal.SIGUSR1, 1)  # `kill` asks one that hangs where each of its threads is
        signal.alarm(0)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        importlib.import_module(module).main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except KeyboardInterrupt:  # before click was there to hear it
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:  # whatever comes so late
            os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """Its exit code (negative: the signal), or None where it still runs after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(pid: int, number: int = signal.SIGKILL) -> int:
    os.kill(pid, number)
    code = ended(pid, 20)
    if code is None:
        os.kill(pid, signal.SIGUSR1)
        time.sleep(1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 999  # it did not end when asked to
    return code


def waits_for(there: Callable[[], bool], seconds: float = 60) -> None:
    """Until something is there."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)
