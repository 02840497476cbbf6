"""Output folders that are replaced as a whole: which may be written to, and which files are never deleted."""

import os
from pathlib import Path

from entropy_gpt.conversion.errors import UserError


def holds_earlier_output(output: Path, record: str, kind: str, overwrite: bool) -> bool:
    """
    Whether a folder holds earlier output, which is about to be replaced.

    Args:
        output (`Path`): The folder, absolute.
        record (`str`): The name of a file that all output of this kind has.
        kind (`str`): What messages call the output, such as `"conversion"`.
        overwrite (`bool`): Whether earlier output may be replaced.

    Raises:
        `UserError`: If the folder can't be written to, holds something else, or may not be replaced.
    """
    parent = next((folder for folder in output.parents if folder.exists()), output)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is not a writable folder. Give another --output.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / record).is_file():
        raise UserError(f"{output} exists and holds no {kind}: give another --output.")
    if not overwrite:
        raise UserError(f"{output} holds an earlier {kind}: give another --output, or --overwrite.")
    return True


def refuse_to_delete(paths: set[Path], kind: str):
    """
    Refuses to overwrite a folder in which there are files of somebody else.

    Args:
        paths (`set[Path]`): Those files; nothing happens if there are none.
        kind (`str`): What messages call the output.

    Raises:
        `UserError`: If there are any.
    """
    if paths:
        raise UserError(f"--overwrite would delete {min(paths)}, which no {kind} wrote: move it elsewhere.")
