"""Output folders that are replaced as a whole: what may be written to, and what may not be deleted."""

import os
from pathlib import Path

from entropy_gpt.conversion.errors import UserError


def holds_earlier_output(output: Path, record: str, kind: str, overwrite: bool) -> bool:
    """
    Whether a folder holds what is to be replaced.

    Args:
        output (`Path`): The folder, absolute.
        record (`str`): The file that every output of this kind has.
        kind (`str`): What the output is called.
        overwrite (`bool`): Whether the command was told to replace it.

    Raises:
        `UserError`: If the place can't be written to, holds something else, or is not to be replaced.
    """
    parent = next((folder for folder in output.parents if folder.exists()), output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is no folder that can be written to. Give another --output.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / record).is_file():
        raise UserError(f"{output} is there already and holds no {kind}: give another --output.")
    if not overwrite:
        raise UserError(f"{output} holds an earlier {kind}: give another --output, or --overwrite.")
    return True


def refuse_to_delete(paths: set[Path], kind: str):
    """
    Refuses an `--overwrite` that would delete what the command did not write.

    Raises:
        `UserError`: If there is any such path.
    """
    if paths:
        raise UserError(f"--overwrite would delete {min(paths)}, which no {kind} wrote: move it elsewhere.")
