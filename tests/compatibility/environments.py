"""Environments with other releases than the project's own, each a virtual environment that shares torch with it."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement


FOLDER = Path(sys.prefix) / "environments"
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


class Environment:
    """
    A virtual environment, made once and kept below the project's own; torch and what it needs are linked from there.

    Args:
        name (`str`): Its folder's name.
        requirements: What pip installs into it, without the project's constraints.
    """

    def __init__(self, name: str, *requirements: str):
        self.folder = FOLDER / name
        self.python = self.folder / "bin" / "python"
        installed = self.folder / "requirements.txt"
        wanted = "\n".join(requirements)
        if not installed.exists() or installed.read_text() != wanted:
            venv.create(self.folder, clear=True, with_pip=True)
            self._link_torch()
            self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
            installed.write_text(wanted)

    def run(self, *words, cwd: Path | None = None, **variables) -> str:
        """
        Runs the environment's Python, isolated from this project's packages.

        Args:
            words: Its arguments; a script by its path.
            cwd (`Path`, *optional*): Where it runs.
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


def newest_release(package: str) -> str:
    """The version that pip would install without constraints."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, "--disable-pip-version-check"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.match(rf"{package} \(([^)]+)\)", printed)[1]


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
