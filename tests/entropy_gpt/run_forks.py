"""
Runs commands one after the other as if each had a process of its own: in a fork of this one, which has imported all
that they need. Each line of the input tells a command's arguments, its variables and the files for what it prints.
"""

import json
import os
import sys

from entropy_gpt.commands.main import main
from entropy_gpt.terminal import publish  # noqa: F401


def run(arguments: list[str], environment: dict[str, str], output: str, error: str):
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, output), (2, error)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["entropy-gpt", *arguments]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking apart what was imported takes a second


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        if (process := os.fork()) == 0:
            run(**json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
