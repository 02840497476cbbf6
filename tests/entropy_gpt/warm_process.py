"""
Runs commands one after the other as if each had a process of its own: in a fork of this one, which has imported all
that they need. Each line of the input gives a command's arguments, its folder, its variables and the files for what it
prints; each line of the output is how a command ended.
"""

import gc
import json
import os
import pkgutil
import sys
from importlib import import_module

from entropy_gpt import programs, terminal, workflows
from entropy_gpt.commands.main import main


def import_all():
    for package in (workflows, terminal, programs):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)


def run(arguments: list[str], folder: str, environment: dict[str, str], output: str, error: str):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    writing = os.O_WRONLY | os.O_CREAT
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, writing), (2, error, writing)):
        os.dup2(os.open(path, flags), descriptor)
    sys.argv = ["entropy-gpt", *arguments]
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking apart what was imported takes a second


if __name__ == "__main__":
    import_all()
    gc.freeze()  # forks do not go through what was imported when they collect garbage, and so do not copy it
    for line in iter(sys.stdin.readline, ""):
        if (process := os.fork()) == 0:
            run(**json.loads(line))
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
