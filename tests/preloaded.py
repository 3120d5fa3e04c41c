"""Python processes that start at once: they are forks of a process that has imported torch and the models' libraries.

Importing takes longer than most of what a test does with its process. At least one test of each command line starts a
plain process instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES = ("lingbot_rt.commands.serve", "lingbot_rt.engine.engine", "lingbot_rt.models.checkpoint")
_POLL_S = 0.02

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(_LIBRARIES))


class PreloadedProcess:
    """Runs ``[sys.executable, ("-m", MODULE) | ("-c", CODE) | SCRIPT, *arguments]``, as subprocess.Popen would.

    Both output streams go to ``log``, or to wherever this process' errors go. It is killed when this process ends.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path | None = None):
        python, *self.args = command
        assert python == sys.executable
        self._asked = threading.Lock()  # the exit code can be read only once
        values = dict(os.environ if env is None else env)
        self._process = _context.Process(target=_run, args=(self.args, values, os.getcwd(), log), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._asked:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(args: list[str], env: dict[str, str], folder: str, log: Path | None) -> None:
    """In the new process: its environment, folder and output are set, then the command runs."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    if log is not None:
        with log.open("ab") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
    if encoding := env.get("PYTHONIOENCODING"):
        sys.stdout.reconfigure(encoding=encoding)
        sys.stderr.reconfigure(encoding=encoding, errors="backslashreplace")
    # A module that is imported already runs a second time under the name of __main__, as ``python -m`` runs it.
    warnings.filterwarnings("ignore", ".*found in sys.modules.*", RuntimeWarning)
    kind, *rest = args
    match kind:
        case "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        case "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        case _:
            sys.argv = args
            runpy.run_path(kind, run_name="__main__")
