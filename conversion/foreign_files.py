"""Files that are taken for weights or text, and are something else: what they are, and what to do."""

import zipfile
from pathlib import Path

from .errors import UserError


LFS_POINTER = b"version https://git-lfs"
# The first bytes of a file, what it then is, and what to do.
BEGINNINGS = {
    LFS_POINTER: "a Git LFS pointer: the file itself was not downloaded. Run git lfs pull where it lies",
    b"GGUF": "a GGUF file. Give the checkpoint that it was made from",
    b"\x89HDF": "an HDF5 file, as TensorFlow saves weights. Save them with PyTorch",
    (20240326).to_bytes(4, "little"): "a checkpoint of llm.c. Export it to a folder of transformers with its "
    "dev/eval/export_hf.py",
    (20240520).to_bytes(4, "little"): "a file of tokens of llm.c, not of weights. Give its checkpoint, exported to a "
    "folder of transformers",
    b"<!DOCTYPE": "a web page. Download the file itself",
    b"<html": "a web page. Download the file itself",
}
ONNX = "an ONNX graph, which is written from a checkpoint and can't be read back. Give the checkpoint"
TORCHSCRIPT = "a TorchScript archive, which holds code. Save the state_dict of the model instead"


def identify(path: Path) -> str | None:
    """
    What a file is, and what to do, if that is neither a checkpoint of PyTorch nor text.

    Args:
        path (`Path`): The file; only its beginning is read.

    Raises:
        `OSError`: If it can't be read.
    """
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning:
        return "an empty file. Download or save it again"
    if beginning[8:9] == b"{":  # safetensors, whose first bytes are a length
        return None
    for signature, description in BEGINNINGS.items():
        if beginning.startswith(signature):
            return description
    if path.suffix.lower() == ".onnx" or _begins_as_onnx(beginning):
        return ONNX
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        return TORCHSCRIPT
    return None


def _begins_as_onnx(beginning: bytes) -> bool:
    """The version of the format (field 1, a number), then the name of the producer (field 2, text)."""
    return beginning[:1] == b"\x08" and beginning[1:2] < b"\x20" and beginning[2:3] == b"\x12"


def check_kind(file: Path, error: type[UserError]):
    """
    Refuses a file that can't be opened, or is of another kind, before a reader calls it damaged.

    Args:
        file (`Path`): The file.
        error (`type`): What is raised.
    """
    try:
        kind = identify(file)
    except OSError as failure:
        raise error(f"{file} can't be read ({failure.strerror}). Make it readable.") from failure
    if kind is not None:
        raise error(f"{file} is {kind}.")
