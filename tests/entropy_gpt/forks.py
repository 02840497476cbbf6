"""Commands in forks of a process that has imported what they need: as in processes of their own, without the start."""

import fcntl
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from tests.hub_server import neutral_environment

from . import warm_process


ROOT = Path(__file__).parents[2]
COMMAND = "entropy_gpt.commands.main"


class Forks:
    """
    Runs commands in forks of one process, which all workers of a run share. Who needs it first starts it. It ends with
    who started it; others are served to their end.

    Args:
        path (`Path`): Where it listens.
    """

    def __init__(self, path: Path):
        self._connection = socket.socket(socket.AF_UNIX)
        with Path(__file__).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # so that one worker at a time looks and starts
            if self._connection.connect_ex(str(path)) != 0:
                path.unlink(missing_ok=True)  # of a process that was killed
                self._start(path)
                self._connection.connect(str(path))
        self._answers = self._connection.makefile("r", encoding="utf-8")

    def _start(self, path: Path):
        command = [sys.executable, "-m", warm_process.__name__, path]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, env=neutral_environment(), **pipes)
        if not self.process.stdout.readline():
            raise RuntimeError(f"The warm process ended with {self.process.wait()} before it listened.")

    def __call__(
        self, *arguments, cwd: Path | None = None, env: dict[str, str] | None = None, draws: bool = True
    ) -> subprocess.CompletedProcess:
        """
        `entropy-gpt` with these arguments, as `subprocess.run` runs it.

        Args:
            cwd (`Path`, *optional*): Its folder.
            env (`dict[str, str]`, *optional*): Its variables.
            draws (`bool`): Whether the files of its pictures have any content, which takes seconds.
        """
        (process,) = self.run_together(COMMAND, arguments, [env or os.environ], cwd, draws)
        return process

    def run_together(
        self,
        module: str,
        arguments: tuple,
        environments: list[dict[str, str]],
        cwd: Path | None = None,
        draws: bool = True,
    ) -> list[subprocess.CompletedProcess]:
        """A module's `main` in processes at the same time, one for each set of variables."""
        words = list(map(str, arguments))
        with TemporaryDirectory() as folder:
            tasks = [
                {
                    "module": module,
                    "arguments": words,
                    "folder": str(cwd or Path.cwd()),
                    "environment": dict(environment),
                    "output": str(Path(folder, f"output{number}")),
                    "error": str(Path(folder, f"error{number}")),
                    "draws": draws,
                }
                for number, environment in enumerate(environments)
            ]
            self._connection.sendall(json.dumps(tasks).encode() + b"\n")
            statuses = json.loads(self._answers.readline())
            return [
                subprocess.CompletedProcess(
                    words, status, *(Path(task[name]).read_text(encoding="utf-8") for name in ("output", "error"))
                )
                for status, task in zip(statuses, tasks, strict=True)
            ]


@functools.cache
def shared_forks() -> Forks:
    """Those that all tests share."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", os.getpid())
    return Forks(Path(gettempdir(), f"entropy-gpt-forks-{run}"))


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    """`entropy-gpt` in forks of the shared process."""
    return shared_forks()(*arguments, **options)
