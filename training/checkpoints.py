"""Checkpoints that are whole or not there: sealed with the hashes of their files before they get their name."""

import hashlib
import json
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

SEAL = "sealed_files.json"
# Where a checkpoint is written until it is whole. Uploads of a run's folder leave out what begins like this.
STAGING = "_unfinished-checkpoint"


def seal(folder: Path):
    """Writes down the size and SHA-256 of every file in a checkpoint, as its last file."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
    (folder / SEAL).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: a file missing, cut or altered since it was sealed; `None` if nothing."""
    try:
        files = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {SEAL}, so it was not written to its end"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {SEAL} is damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, and had {size:,} when it was written"
        if _hash(path) != digest:
            return f"{name} was altered since it was written"
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a Trainer's output folder, whole or not, the latest first."""
    numbered = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in folder.glob("checkpoint-*")}
    return sorted((path for path, number in numbered.items() if number.isdigit()), key=_step, reverse=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a Trainer's output folder, or `None`. Warns of those that it passes over."""
    for checkpoint in list_checkpoints(folder):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(f"{checkpoint} is passed over: {damage}.")
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
