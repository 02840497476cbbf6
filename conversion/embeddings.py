"""The embeddings of a checkpoint, without the rest of it."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from .early_checks import expanded
from .errors import ConversionError
from .weight_files import has_safetensors, read_tensors


# The embeddings of tokens and positions, which have the prefix of the base model or not.
EMBEDDING = re.compile(r"(?:transformer\.)?(wte|wpe)\.weight")
FILES = "model*.safetensors*"
# Where the Hub's cache keeps a commit of a repository.
SNAPSHOT = re.compile(r"models--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Embeddings:
    """
    Args:
        name (`str`): The repository on the Hub, or the name of the folder.
        revision (`str`, *optional*): The commit there, if it is known.
        tables (`dict[str, np.ndarray]`): "wte" `(tokens, width)` and "wpe" `(positions, width)`, in single precision.
    """

    name: str
    revision: str | None
    tables: dict[str, np.ndarray]


def read_embeddings(source: str | Path) -> Embeddings:
    """
    Reads the embeddings of a GPT-2 or an EntropyGPT; of its safetensors, these two tables alone.

    Args:
        source (`str` or `Path`):
            A folder, or a repository on the Hub. From there all of its safetensors are downloaded at first; what the
            Hub's cache has is not looked up there.

    Raises:
        `ConversionError`: If there are none, or files are missing, damaged, or no safetensors.
    """
    folder = find_folder(source)
    found = read_tensors(folder, lambda name: EMBEDDING.fullmatch(name) is not None)
    tables = {EMBEDDING.fullmatch(name)[1]: tensor.float().numpy() for name, tensor in found.items()}
    if missing := {"wte", "wpe"} - {*tables}:
        raise ConversionError(f"{source} has no {' and no '.join(sorted(missing))}: give the folder of a GPT-2.")
    if match := SNAPSHOT.search(folder.resolve().as_posix()):
        return Embeddings(match["name"].replace("--", "/"), match["revision"], tables)
    return Embeddings(folder.resolve().name, None, tables)


def find_folder(source: str | Path) -> Path:
    """
    Where the files of [`read_embeddings`] are.

    Raises:
        `ConversionError`: If they are neither here nor on the Hub.
    """
    source = expanded(source)
    if Path(source).is_dir():
        return Path(source)
    try:
        folder = Path(snapshot_download(source, allow_patterns=FILES, local_files_only=True))
        if has_safetensors(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise _not_there(source, error) from error
    try:
        return Path(snapshot_download(source, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise _not_there(source, error) from error


def _not_there(source: str, error: Exception) -> ConversionError:
    return ConversionError(f"{source} is neither a folder here nor a repository that the Hub hands out: {error}")
