"""Environments with other releases than the project's own, each a virtual environment that shares torch with it."""

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from packaging.requirements import Requirement


FOLDER = Path(sys.prefix) / "environments"
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
SECONDS, SECONDS_TO_INSTALL = 600, 1800


class Environment:
    """
    A virtual environment, made once and kept below the project's own; torch and what it needs are linked from there.
    It is made anew when its requirements change.

    Args:
        name (`str`): Its folder's name: what it is for, and the version of that.
        requirements: What pip installs into it, without the project's constraints.
    """

    def __init__(self, name: str, *requirements: str):
        self.folder = FOLDER / name
        self.python = self.folder / "bin" / "python"
        installed = self.folder / "requirements.txt"
        wanted = "\n".join(requirements)
        FOLDER.mkdir(exist_ok=True)
        with FileLock(FOLDER / f"{name}.lock"):
            if not installed.exists() or installed.read_text() != wanted:
                venv.create(self.folder, clear=True, with_pip=True)
                self._link_torch()
                install = "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
                self.run(*install, *requirements, timeout=SECONDS_TO_INSTALL)
                installed.write_text(wanted)

    @classmethod
    def with_tool(cls, tool: str, version: str) -> "Environment":
        """One with a tool and the newest release of transformers, which has to be one that the tool allows."""
        newest = newest_release("transformers")
        return cls(f"{tool}-{version}", f"{tool}=={version}", f"transformers=={newest}")

    def run(self, *words, cwd: Path | None = None, timeout: float = SECONDS, **variables) -> str:
        """
        Runs the environment's Python, isolated from this project's packages.

        Args:
            words: Its arguments; a script by its path.
            cwd (`Path`, *optional*): Where it runs.
            timeout (`float`, *optional*, defaults to 600): After how many seconds it is ended, which is an error.
            variables: Environment variables beside this process's.

        Returns:
            `str`: What it printed to standard output.
        """
        process = subprocess.run(
            [self.python, "-P", *map(str, words)],
            cwd=cwd,
            env={**_without_paths(), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert process.returncode == 0, f"{process.stdout[-3000:]}\n{process.stderr[-6000:]}"
        return process.stdout

    def version_of(self, package: str) -> str:
        """The version of a package in there."""
        return self.run("-c", f"import importlib.metadata as m; print(m.version({package!r}))").strip()

    def _link_torch(self):
        shared = self.folder / "shared"
        shared.mkdir()
        for distribution in _needed_by("torch"):
            for top in {Path(file).parts[0] for file in distribution.files or [] if ".." not in Path(file).parts}:
                link = shared / top
                if not link.exists():
                    link.symlink_to(SITE_PACKAGES / top)
        site_packages = next(self.folder.glob("lib/python*/site-packages"))
        (site_packages / "shared.pth").write_text(f"{shared}\n")


@functools.cache
def newest_release(package: str) -> str:
    """The version that pip would install without constraints."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    found = re.search(rf"^{re.escape(package)} \(([^)]+)\)", process.stdout, re.MULTILINE)
    assert found, f"pip names no release of {package}:\n{process.stdout}\n{process.stderr}"
    return found[1]


def _needed_by(name: str) -> Iterator[importlib.metadata.Distribution]:
    """The distributions that one needs, itself among them."""
    names, seen = [name], set()
    while names:
        name = names.pop()
        if (key := re.sub(r"[-_.]+", "-", name).lower()) in seen:
            continue
        seen.add(key)
        distribution = importlib.metadata.distribution(name)
        yield distribution
        requirements = map(Requirement, distribution.requires or [])
        names += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _without_paths() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
