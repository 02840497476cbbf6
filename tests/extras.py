"""Environments with what one extra of the project brings and nothing else, linked from the packages installed here."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

from .wheel import ROOT


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def link_extra(folder: Path, wheel: Path, *extras: str) -> Path:
    """
    Makes an environment in a folder.

    Args:
        folder (`Path`): Where.
        wheel (`Path`): The project's wheel.
        extras: Names of extras; none for the project alone.

    Returns:
        `Path`: The folder of its commands.
    """
    venv.create(folder, symlinks=True)
    shared = folder / "shared"
    shared.mkdir()
    for distribution in _needed(_requirements_of(extras)):
        for top in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
            if top != "__pycache__" and not (shared / top).exists():
                (shared / top).symlink_to(distribution.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", wheel], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "shared.pth").write_text(f"{shared}\n", encoding="utf-8")
    return folder / "bin"


def _requirements_of(extras: Iterable[str]) -> list[Requirement]:
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [requirement for requirement in map(Requirement, lines) if _holds(requirement, ())]


def _needed(requirements: list[Requirement]) -> Iterable[importlib.metadata.Distribution]:
    """The distributions that requirements stand for, with all that these need."""
    found, seen = {}, set()
    while requirements:
        requirement = requirements.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        if name == PROJECT["name"]:
            requirements += _requirements_of(requirement.extras)
            continue
        found[name] = importlib.metadata.distribution(name)
        needed = map(Requirement, found[name].requires or [])
        requirements += [each for each in needed if _holds(each, requirement.extras)]
    return found.values()


def _holds(requirement: Requirement, extras: Iterable[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
