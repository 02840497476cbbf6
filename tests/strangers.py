"""
Processes of strangers, who have what is on the Hub or in a folder, and not this project. Such a process is this very
file, run by path and isolated; it runs a script, or a module after `-m`, without any package of this project.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


REMOTE_LOADING = Path(__file__).resolve().parents[1] / "evaluation" / "measuring" / "remote_loading.py"
DEEDS = Path(__file__).with_name("deeds_of_strangers.py")


def run_stranger(folder: Path, environment: Mapping[str, str], *words) -> str:
    """
    Runs a stranger's process in a folder, with nobody at the keyboard.

    Args:
        folder (`Path`): Where it runs.
        environment (`Mapping[str, str]`): Its variables.
        words: The script, or `-m` and a module, and the arguments.

    Returns:
        `str`: What it printed.
    """
    process = subprocess.run(
        [sys.executable, "-I", __file__, *map(str, words)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def do(deed: str, folder: Path, environment: Mapping[str, str], **arguments):
    """Lets a stranger do one of the deeds, and gives what comes of it."""
    told = json.dumps(arguments, default=str)
    return json.loads(run_stranger(folder, environment, DEEDS, deed, told).splitlines()[-1])


if __name__ == "__main__":
    from_module = sys.argv[1] == "-m"
    del sys.argv[: 2 if from_module else 1]
    sys.meta_path.insert(0, runpy.run_path(str(REMOTE_LOADING))["_ProjectBlocker"]())
    (runpy.run_module if from_module else runpy.run_path)(sys.argv[0], run_name="__main__")
