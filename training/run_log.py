"""The log of a run: written line by line, and the source of its pictures."""

import json
from pathlib import Path

from .files import written_whole
from .storage import storing


RUN_LOG = "training_log.jsonl"
SCHEMA_VERSION = 1


class RunLogWriter:
    """
    Appends records to a run's log: one JSON object a line, with its `kind` and, but for the first, its `step`.

    The first record is of the kind `run` and says what the run is. A run that goes on from a checkpoint drops what was
    written after it, so that its log is that of a run which was never interrupted, but for losses that are means over
    steps on both sides of the checkpoint.

    Args:
        folder (`Path`): The run's folder.
        run (`dict`): What the run is.
        step (`int`): The step that the run goes on from; 0 begins anew.

    Attributes:
        last (`dict[str, dict]`): The last record of each kind.
    """

    def __init__(self, folder: Path, run: dict, step: int = 0):
        path = folder / RUN_LOG
        kept = _records_until(path, step) if step else []
        self.last = {record["kind"]: record for record in kept}
        with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for record in ({"kind": "run", "schema_version": SCHEMA_VERSION, **run}, *kept):
                file.write(json.dumps(record) + "\n")
        self._file = path.open("ab", buffering=0)

    def write(self, kind: str, step: int, **values):
        """Appends a record; it is in the file when this returns, whatever becomes of this process."""
        record = {"kind": kind, "step": step, **values}
        self.last[kind] = record
        line = (json.dumps(record) + "\n").encode()
        with storing(Path(self._file.name)):
            while line:  # a disk that has just become full takes a part
                line = line[self._file.write(line) :]

    def close(self):
        """Ends the log."""
        self._file.close()


def _records_until(path: Path, step: int) -> list[dict]:
    """The records of a log up to a step, without the first."""
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")  # behind the last line end is nothing, or a cut line
    return [record for record in map(json.loads, lines[1:]) if record["step"] <= step]
