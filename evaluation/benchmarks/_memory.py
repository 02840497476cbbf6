"""What a computation takes of memory, as the operating system counts it (Linux)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.origin import ROOT


# glibc gives tensors back to the system as they are freed, so that resident memory is what is in use.
EXACT = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1"}


@dataclass(config=RECORD)
class Memory:
    """Peak memory in MiB that a variant took in addition to its inputs."""

    name: str
    length: int
    mebibytes: float


def mebibytes_of(benchmark: str, *arguments: str) -> float:
    """The MiB that a benchmark prints when given the arguments, in a fresh process that counts memory exactly."""
    command = [sys.executable, "-m", f"entropy_gpt.evaluation.benchmarks.{benchmark}", *arguments]
    return float(subprocess.check_output(command, text=True, cwd=ROOT, env={**os.environ, **EXACT}))


def peak_mebibytes(run: Callable[[], None]) -> float:
    """The most resident memory during a run, beyond what there was before, in MiB. For a process of its own."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """A line of this process's memory record, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
