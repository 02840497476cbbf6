"""
Runs commands and other programs as if each had a process of its own: in forks of this one, which has imported all that
they need. It listens at a path, and serves each client in a fork, until its standard input ends. Each request is a
line: a list of processes that run at the same time, with their module, arguments, folder, variables and the files for
what they print. Each answer is a list of how they ended.
"""

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import socket
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

import datasets.config
import transformers.utils.hub
from huggingface_hub import constants, hf_api

from entropy_gpt import programs, terminal, workflows


# Modules that read variables when they are imported, in the order in which they depend on one another.
READERS = (constants, transformers.utils.hub, datasets.config)


def import_all():
    for package in (workflows, terminal, programs):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)


def read_variables():
    """Where the Hub is and what is kept of it, as the variables say, wherever it was read when this was imported."""
    for source in READERS:
        former = dict(vars(source))
        importlib.reload(source)
        changed = {name for name in former if name.isupper() and former[name] != vars(source)[name]}
        for module in list(sys.modules.values()):
            for name in changed:
                if vars(module).get(name) is former[name]:
                    setattr(module, name, vars(source)[name])
    hf_api.api.__init__()


def run(
    module: str, arguments: list[str], folder: str, environment: dict[str, str], output: str, error: str, draws: bool
):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    read_variables()
    tempfile.tempdir = None
    writing = os.O_WRONLY | os.O_CREAT
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, writing), (2, error, writing)):
        os.dup2(os.open(path, flags), descriptor)
    if not draws:
        from matplotlib.figure import Figure

        Figure.savefig = lambda figure, path, **options: Path(path).touch()
    sys.argv = ["entropy-gpt", *arguments]
    status = import_module(module).main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # taking apart what was imported takes a second


def start(process: dict) -> int:
    if (number := os.fork()) == 0:
        try:
            run(**process)
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # not by the interpreter's end, which may wait for threads that a fork lacks
    return number


def wait_for_all(numbers: list[int]) -> list[int]:
    """How processes ended. Once one has failed, the others, which may wait for it, are killed."""
    ended = {}
    while len(ended) < len(numbers):
        number, status = os.wait()
        ended[number] = os.waitstatus_to_exitcode(status)
        if ended[number] != 0:
            for other in {*numbers} - {*ended}:
                os.kill(other, signal.SIGKILL)
    return [ended[number] for number in numbers]


def serve(client: socket.socket):
    try:
        for line in client.makefile("r", encoding="utf-8"):
            statuses = wait_for_all([start(process) for process in json.loads(line)])
            client.sendall(json.dumps(statuses).encode() + b"\n")
    finally:
        os._exit(0)


def main(path: str):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("listening", flush=True)
        import_all()
        gc.freeze()  # forks do not go through what was imported when they collect garbage, and so do not copy it
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            accept(listener)
        Path(path).unlink(missing_ok=True)
        while select.select([listener], [], [], 0)[0]:  # those who came before
            accept(listener)


def accept(listener: socket.socket):
    with listener.accept()[0] as client:
        if os.fork() == 0:
            listener.close()
            serve(client)


if __name__ == "__main__":
    main(sys.argv[1])
