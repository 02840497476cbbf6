"""
What is found wrong with arguments before torch and transformers are imported, which takes seconds, and before anything
is downloaded: notations, and names of files and folders.
"""

import difflib
import functools
import json
import os
import re
from contextlib import suppress
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from .errors import ConversionError, UserError


# How alike a wrong name and the one that is suggested must be.
LIKENESS = 0.75
# How long the Hub may take to reply.
HUB_SECONDS = 3
# Names that could be repositories on the Hub.
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FILE_SUFFIX = re.compile(r"\.[a-z]{2,7}")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
PAGE_SUFFIXES = (".html", ".md")
# More layers than any model has.
MANY_LAYERS = 10_000


def expanded(path: str | os.PathLike) -> str:
    """A path in which a leading `~` stands for the home folder. Shells leave it as it is in `--output=~/x`."""
    try:
        return str(Path(path).expanduser()) if os.fspath(path).startswith("~") else os.fspath(path)
    except RuntimeError:  # there is no such user: it is a name that begins with ~
        return os.fspath(path)


def check_notation(notation: str, n_layer: int = MANY_LAYERS):
    """
    Refuses a notation that can't be read.

    Args:
        notation (`str`): An architecture in the paper's notation.
        n_layer (`int`): The number of layers, if it is known.

    Raises:
        `ConversionError`: If a token is unknown, given twice, or needs more layers.
    """
    try:
        _notation_module().parse_notation(notation, n_layer)
    except ValueError as error:
        raise ConversionError(str(error)) from error


def check_model(source: str | os.PathLike):
    """
    Refuses a folder that holds no model, and a wrong path. What could be a repository on the Hub is not looked up.

    Raises:
        `ConversionError`: If there is no such folder, or no configuration in it. The message suggests another one.
    """
    folder = Path(expanded(source))
    if (nearest := _find_meant(source)) is not None:
        raise ConversionError(_missing(source, _model_in(nearest)))
    check_place(source)
    if not folder.is_dir() or (folder / CONFIG).exists():
        return
    adapter = folder / ADAPTER_CONFIG
    kind = f"holds an adapter{_base_of(adapter)}, not a model" if adapter.exists() else f"holds no {CONFIG}"
    models = [path.parent for path in (*folder.glob(f"*/{CONFIG}"), *folder.parent.glob(f"model/{CONFIG}"))]
    nearest = min(models, key=lambda model: model.name != "model", default=None)
    remedy = f"did you mean {nearest}?" if nearest else "give the folder of a model."
    raise ConversionError(f"{source} {kind}; {remedy}")


def _base_of(adapter_config: Path) -> str:
    """`" of "` and the model that an adapter belongs to; nothing if it names none."""
    try:
        base = dict(json.loads(adapter_config.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError):
        return ""
    return f" of {base}" if base else ""


def is_model(text: str) -> bool:
    """Whether a text means a model, here or on the Hub, and no notation."""
    return Path(expanded(text)).exists() or not ("SM" in text or "+" in text or "(" in text)


def check_place(source: str | os.PathLike):
    """
    Refuses a wrong path. What could be a repository on the Hub is let through, and looked up there only if its first
    part is a folder here that holds something of nearly the same name.

    Raises:
        `ConversionError`: If there is no such file or folder.
    """
    nearest = _find_meant(source)
    if nearest or not (Path(expanded(source)).exists() or REPOSITORY.fullmatch(str(source))):
        raise ConversionError(_missing(source, nearest))


def check_path(path: Path, remedy: str = "Check the path."):
    """
    Refuses a file or folder that does not exist.

    Args:
        path (`Path`): The file or folder.
        remedy (`str`): What the message says where nothing has nearly the same path.

    Raises:
        `UserError`: If there is no such file or folder. The message suggests another one.
    """
    place = Path(expanded(path))
    if not place.exists():
        raise UserError(_missing(path, find_nearest(place), remedy))


def find_nearest(path: Path) -> Path | None:
    """The existing file or folder with nearly the same path, if there is one."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).exists():
            names = [child.name for child in found.iterdir()] if found.is_dir() else []
            part = next(iter(difflib.get_close_matches(part, names, n=1, cutoff=LIKENESS)), None)
            if part is None:
                return None
        found /= part
    return found


def read_head(value):
    """
    Layer and head from text with a comma between them; other values as they are.

    Raises:
        `ValueError`: If it is other text.
    """
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError("give the numbers of a layer and a head, such as 2,1")
    return tuple(map(int, parts))


def check_head(value: str | None):
    """
    Refuses text that is not a layer and a head.

    Raises:
        `UserError`: If it is not.
    """
    try:
        read_head(value)
    except ValueError as error:
        raise UserError(f"--head {value}: {error}.") from error


def check_page(output: Path):
    """
    Refuses a page whose name has another suffix than those of [`PAGE_SUFFIXES`].

    Raises:
        `UserError`: If it has. The message names the nearest suffix.
    """
    if output.suffix not in PAGE_SUFFIXES:
        allowed = " or ".join(PAGE_SUFFIXES)
        nearest = suggest(output.suffix, list(PAGE_SUFFIXES))
        raise UserError(f"--output {output}: the name of a page ends in {allowed}{nearest}")


def suggest(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"`, or a full stop without a near name."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


def _missing(path: str | os.PathLike, nearest: Path | None, remedy: str = "Check the path.") -> str:
    if nearest is None:
        return f"There is no {path}. {remedy}"
    return f"There is no {path}; did you mean {nearest}?"


def _find_meant(source: str | os.PathLike) -> Path | None:
    """What lies nearest to a path that does not exist, if it is no name of a repository on the Hub."""
    path = Path(expanded(source))
    if path.exists():
        return None
    if not REPOSITORY.fullmatch(str(source)) or FILE_SUFFIX.fullmatch(path.suffix):
        return find_nearest(path)
    nearest = find_nearest(path) if len(path.parts) > 1 and Path(path.parts[0]).is_dir() else None
    return nearest if nearest and not _is_on_hub(str(source)) else None


def _is_on_hub(name: str) -> bool:
    """Whether the Hub, or its cache here, has a repository of this name; no, if the Hub does not answer."""
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    kinds = ("model", "dataset")
    if any(Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").exists() for kind in kinds):
        return True
    for kind in kinds:
        with suppress(HfHubHTTPError, httpx2.HTTPError, OSError):
            HfApi().repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
            return True
    return False


def _model_in(folder: Path) -> Path:
    """The model of a run's folder; any other folder as it is."""
    model = folder / "model"
    return model if (model / CONFIG).exists() and not (folder / CONFIG).exists() else folder


@functools.cache
def _notation_module() -> ModuleType:
    """The module that reads notations, without its package, whose import takes seconds."""
    path = Path(find_spec("modeling_entropy_gpt").origin).with_name("notation.py")
    spec = spec_from_file_location("_notation_alone", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
