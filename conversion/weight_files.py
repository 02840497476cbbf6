"""Files of weights: found, read without running anything that they hold, and refused by what they are."""

import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .errors import ConversionError
from .foreign_files import check_kind


# As transformers looks for weights: the first that is there, or its shards, which the index next to it lists.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# How the unpickler of torch names what it refuses.
REFUSED = re.compile(r"(?:GLOBAL|Unsupported class) (\S+)")
MOST_NAMES_SHOWN = 5


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """
    The weights in a folder, by name.

    Raises:
        `ConversionError`: If there are none, or a file is missing, damaged or something else.
    """
    return gather_tensors((named for file in _weight_files(folder) for named in _load_tensors(file).items()), folder)


def read_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """
    Some of the weights in a folder, by name. Nothing else of its files is read.

    Args:
        folder (`Path`): With safetensors, in shards too; others can't be read in part.
        wanted (`Callable`): Whether a tensor is, by its name.

    Raises:
        `ConversionError`: If there are no safetensors, or a file is missing, damaged or something else.
    """
    found: list[tuple[str, torch.Tensor]] = []
    for file in _weight_files(folder):
        if file.suffix != ".safetensors":
            raise ConversionError(f"{folder} has {file.name}, and only safetensors are read in part: save it so.")
        check_kind(file, ConversionError)
        try:
            with safe_open(file, framework="pt") as content:
                found += [(name, content.get_tensor(name)) for name in content.keys() if wanted(name)]  # noqa: SIM118
        except (SafetensorError, OSError, RuntimeError) as error:  # the last one of torch, which maps the file
            raise _damaged(file, error) from error
    return gather_tensors(found, folder)


def read_json(file: Path) -> dict:
    """The named fields of a JSON file."""
    check_kind(file, ConversionError)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{file} can't be read: {error}. Download or save it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{file} holds a {type(content).__name__}, not named fields. Download or save it again.")
    return content


def has_safetensors(folder: Path) -> bool:
    """
    Whether a folder has all of its safetensors: an interrupted download may leave some of the shards.

    Raises:
        `ConversionError`: If an index of shards is damaged.
    """
    name = WEIGHT_FILES[0]
    if (folder / name).is_file():
        return True
    index = folder / f"{name}.index.json"
    return index.is_file() and all((folder / shard).is_file() for shard in _listed_shards(index))


def _weight_files(folder: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in _shards(index)]
    raise ConversionError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}, nor an index of shards.")


def _shards(index: Path) -> list[str]:
    """The files that an index lists, all of which have to be there."""
    shards = _listed_shards(index)
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ConversionError(
            f"{index} lists files that are not there: {shorten_names(missing)}. Download or save them."
        )
    return shards


def _listed_shards(index: Path) -> list[str]:
    """The files that an index lists, in its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError(f"{index} has no 'weight_map' from names to files. Download or save it again.")
    shards = sorted(set(weight_map.values()))
    if outside := [shard for shard in shards if _leaves_its_folder(shard)]:
        raise ConversionError(
            f"{index} lists files outside of its folder: {shorten_names(outside)}. Files are read from there alone: "
            "take a checkpoint from another source, or put its files next to the index."
        )
    return shards


def _leaves_its_folder(name: str) -> bool:
    """Whether a path is absolute or goes up, by the rules of either kind of system: what Windows forbids, all do."""
    path = PureWindowsPath(name)
    return bool(path.anchor) or ".." in path.parts


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix != ".safetensors":
        return check_tensor_types(unpickle(file), file)
    check_kind(file, ConversionError)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ConversionError:
    return ConversionError(f"{file} is damaged: {error}. Download or save it again.")


def unpickle(file: Path):
    """What a file of `torch.save` holds: tensors and plain values alone."""
    check_kind(file, ConversionError)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is an error here
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes make it
        # Its own message is not passed on: it advises to load without this safety.
        raise ConversionError(f"{file} can't be read as weights alone: {_why_not(error)}") from error


def _why_not(error: Exception) -> str:
    if (found := REFUSED.search(str(error))) is None:
        return "it is damaged, or not written by torch.save. Download or save it again."
    name = found[1].rstrip(".,")
    kind = f"a number or array of numpy ({name})" if name.startswith("numpy.") else name
    return (
        f"it holds {kind}. Only tensors, plain numbers and text are unpickled, because anything else can run code. "
        "Save it again without that."
    )


def check_tensor_types(content, file: Path) -> dict[str, torch.Tensor]:
    """Refuses what is not dense tensors by their names."""
    if not isinstance(content, dict):
        raise ConversionError(f"{file} has a {type(content).__name__} for weights, not dense tensors by their names.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not torch.is_tensor(tensor) or tensor.layout != torch.strided:
            raise ConversionError(
                f"{file} has a {type(tensor).__name__} for {name!r}, not a dense tensor with a name."
            )
    return content


def gather_tensors(named_tensors: Iterable[tuple[str, torch.Tensor]], source: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of several files by name, each name once."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise ConversionError(f"{source} has {name} twice (in two files, or with a prefix and without): keep one.")
        tensors[name] = tensor
    return tensors


def shorten_names(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    rest = len(names) - MOST_NAMES_SHOWN
    return ", ".join(names[:MOST_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
