"""What a computation takes of memory, as the operating system counts it (Linux)."""

from collections.abc import Callable
from pathlib import Path


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
