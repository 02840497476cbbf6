"""Commands in forks of a process that has imported what they need: as in processes of their own, without the start."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from . import warm_process


ROOT = Path(__file__).parents[2]


class Forks:
    """
    Runs commands in forks of one process.

    Args:
        environment (`dict[str, str]`, *optional*): The variables that libraries read when they are imported. Those of
            this process if not given.
    """

    def __init__(self, environment: dict[str, str] | None = None):
        self._process = subprocess.Popen(
            [sys.executable, "-m", warm_process.__name__],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        """`entropy-gpt` with these arguments, as `subprocess.run` runs it."""
        words = list(map(str, arguments))
        with TemporaryDirectory() as folder:
            output, error = Path(folder, "output"), Path(folder, "error")
            task = {
                "arguments": words,
                "folder": str(cwd or Path.cwd()),
                "environment": dict(env or os.environ),
                "output": str(output),
                "error": str(error),
            }
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
            printed = (path.read_text(encoding="utf-8") for path in (output, error))
            return subprocess.CompletedProcess(words, status, *printed)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@functools.cache
def _shared_forks() -> Forks:
    return Forks()  # ends when this process does


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    """The same in forks of one process that all tests share, with the variables of this one."""
    return _shared_forks()(*arguments, **options)
