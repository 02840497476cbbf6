"""Checks in processes of their own, since they may crash or hang: each reports its findings as lines of JSON."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


MESSAGE_CHARACTERS = 200
# The exit status of Python after an uncaught exception, whose last line is the message.
UNCAUGHT = 1


@dataclass(frozen=True)
class Reported:
    """The values that a process reported, and why it ended early; the reason is empty if it did not."""

    values: list = field(default_factory=list)
    ending: str = ""

    @property
    def facts(self) -> dict:
        """The values of a process that reports them by name, together."""
        return {name: fact for value in self.values for name, fact in value.items()}


def in_process(function: Callable[..., Iterator], *arguments, seconds: float) -> Reported:
    """
    Runs a generator in a separate process, and collects the values that it yields before it ends.

    Args:
        function (`Callable`): A function of an importable module.
        arguments: Its arguments, which JSON can hold.
        seconds (`float`): Time limit, after which the process is killed.
    """
    imports = f"from {__name__} import print_values; from {function.__module__} import {function.__name__} as check"
    code = f"{imports}; print_values(check)"
    # -P: nothing is imported from the current folder, which may contain a datasets.py.
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code, json.dumps(arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        output, error = child.communicate(timeout=seconds)
        ending = _describe_ending(child.returncode, error)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        ending = f"not done after {seconds:g} s"
    *lines, _ = output.split("\n")
    return Reported([json.loads(line) for line in lines], ending)


def print_values(function: Callable[..., Iterator]):
    """
    Runs a generator with the arguments of the command line, and prints each value as JSON. Output of libraries goes to
    stderr.
    """
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for value in function(*json.loads(sys.argv[1])):
        print(json.dumps(value), file=lines, flush=True)


def _describe_ending(status: int, error: str) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"it crashed ({signal.Signals(-status).name})"
    lines = [line for line in error.splitlines() if line.strip()]
    return shorten(lines[-1]) if status == UNCAUGHT and lines else f"it ended with status {status}"


def shorten(message: str) -> str:
    """A message in one line, without control characters."""
    line = " ".join(message.split())
    return "".join(letter for letter in line if letter.isprintable())[:MESSAGE_CHARACTERS]
