"""The project as a wheel, as package indexes have it."""

import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_entropy_gpt", "entropy_gpt", "conversion", "training", "evaluation")


def build_wheel(folder: Path) -> Path:
    """Builds it from a copy of the sources in a folder, and returns where it is."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheel')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel
