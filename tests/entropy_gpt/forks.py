"""Commands in forks of a process that has imported what they need: as in processes of their own, without the start."""

import functools
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TextIO

from . import warm_process


ROOT = Path(__file__).parents[2]
COMMAND = "entropy_gpt.commands.main"


class Forks:
    """
    Runs commands in forks of one process.

    Args:
        environment (`dict[str, str]`, *optional*): The variables that libraries read when they are imported, by a new
            process. Without them, the process is a fork of this one, which has imported much already.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        self._process = None
        if environment is None:
            self._requests, self._answers = _fork()
        else:
            command, pipe = [sys.executable, "-m", warm_process.__name__], subprocess.PIPE
            self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)
            self._requests, self._answers = self._process.stdin, self._process.stdout

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
            print(json.dumps(tasks), file=self._requests, flush=True)
            statuses = json.loads(self._answers.readline())
            return [
                subprocess.CompletedProcess(
                    words, status, *(Path(task[name]).read_text(encoding="utf-8") for name in ("output", "error"))
                )
                for status, task in zip(statuses, tasks, strict=True)
            ]

    def close(self):
        self._requests.close()
        if self._process is not None:
            self._process.wait()


def _fork() -> tuple[TextIO, TextIO]:
    """A fork of this process that serves requests until they end; what it reads, and what it writes."""
    (request_end, requests), (answers, answer_end) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(requests)
        os.close(answers)
        # Pytest has its own handlers of logs and filters of warnings. Python prints logs that have no handler.
        logging.getLogger().handlers.clear()
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        try:
            with os.fdopen(request_end) as read, os.fdopen(answer_end, "w") as written:
                warm_process.serve(read, written)
        finally:
            os._exit(0)
    os.close(request_end)
    os.close(answer_end)
    return os.fdopen(requests, "w"), os.fdopen(answers)


@functools.cache
def shared_forks() -> Forks:
    """
    Those that all tests share, with the variables of this process. tests/conftest.py asks for them before a test has
    changed anything.
    """
    return Forks()


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    """`entropy-gpt` in forks of the shared process."""
    return shared_forks()(*arguments, **options)
