"""Small disks and limits, to see what happens when there is no room."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """
    A disk of its own in memory, mounted at a folder; the test is skipped where that takes more rights.

    Args:
        folder (`Path`): Where it is mounted; it is made.
        size (`str`): Such as `"2m"`.
        options (`str`): Further options of `mount`.
    """
    folder.mkdir(parents=True)
    try:
        mount("-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no rights to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*words: str | Path):
    """Calls `mount` with these arguments."""
    subprocess.run(["mount", *words], check=True, capture_output=True)
