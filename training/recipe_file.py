"""
Recipes as they are written: YAML files of flat settings. What is wrong with a file or with a setting's name is found
here, without the seconds that importing torch and transformers takes.
"""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from entropy_gpt.conversion.early_checks import (
    check_model,
    check_notation,
    check_place,
    expanded,
    find_nearest,
    suggest,
)
from entropy_gpt.conversion.errors import ConversionError

from .errors import RecipeError


RECIPES = Path(__file__).with_name("recipes")
# Settings that have to be above 0, and those that may be 0 but not less.
POSITIVE = frozenset(
    {
        "n_layer",
        "n_head",
        "n_embd",
        "n_positions",
        "vocab_size",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "num_train_epochs",
        "logging_steps",
        "save_steps",
        "temperature_init",
    }
)
NOT_NEGATIVE = frozenset(
    {
        "learning_rate",
        "weight_decay",
        "max_grad_norm",
        "warmup_steps",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "entropy_coefficient",
        "log_sum_coefficient",
        "seed",
    }
)
# Settings that are files, folders or data sets on the Hub.
PLACES = ("dataset", "validation_dataset", "tokenizer")
# Settings that name files or folders, with those that may.
PATHS = frozenset(
    {
        *PLACES,
        "output_dir",
        "model_name_or_path",
        "data_cache",
        "logging_dir",
        "resume_from_checkpoint",
        "deepspeed",
        "fsdp_config",
        "accelerator_config",
    }
)


def list_recipes() -> list[str]:
    """Names of the recipes that come with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(source: str) -> Path:
    """
    The file of a recipe: a path, or the name of one that comes with this package.

    Raises:
        `RecipeError`: If there is none.
    """
    for path in (Path(expanded(source)), RECIPES / f"{source.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    nearest = find_nearest(Path(expanded(source)))
    hint = f"; did you mean {nearest}?" if nearest else suggest(Path(source).stem, list_recipes())
    raise RecipeError(f"There is no recipe {source}{hint} Give a YAML file, or one of {', '.join(list_recipes())}.")


def read_settings(source: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    The settings of a recipe by their names; without `output_dir`, that is `runs/` and the recipe's name. In paths, a
    leading `~` stands for the home folder.

    Args:
        source (`str`): A YAML file, or the name of a recipe that comes with this package.
        overrides (`dict[str, Any]`): Settings that replace those of the recipe.

    Raises:
        `RecipeError`: If there is no such recipe, it is no flat YAML, or a setting is unknown.
    """
    path = find_recipe(source)
    settings = {"output_dir": str(Path("runs", path.stem)), **read_yaml(path), **overrides}
    paths = {name: expanded(settings[name]) for name in PATHS & settings.keys() if isinstance(settings[name], str)}
    settings |= paths
    known = sorted({*argument_names(), *config_names()})
    for name in settings:
        if name not in known:
            raise RecipeError(
                f"There is no setting {name!r}{suggest(name, known)} `entropy-gpt train --settings` lists them all."
            )
    _check_values(settings)
    return settings


def _check_values(settings: dict[str, Any]):
    """
    Refuses values that can't be meant, as far as that is known without torch and transformers.

    Raises:
        `RecipeError`: If a number is none or out of range, a notation can't be read, or a path is wrong.
    """
    types = {**_argument_types(), **_config_types()}
    for name, value in settings.items():
        if value is not None and not isinstance(value, list):
            _check_number(name, value, types[name])
    sizes = [settings.get(name) for name in ("n_embd", "n_head")]
    if all(isinstance(size, int) for size in sizes) and sizes[0] % sizes[1]:
        raise RecipeError(f"n_head={sizes[1]} does not divide n_embd={sizes[0]}. Change one of them.")
    checks = {"notation": check_notation, "model_name_or_path": check_model, **dict.fromkeys(PLACES, check_place)}
    for name, check in checks.items():
        if settings.get(name) is not None:
            try:
                check(str(settings[name]))
            except ConversionError as error:
                raise RecipeError(f"{name}={settings[name]}: {error}") from error


def _check_number(name: str, value: Any, annotation: str):
    kinds = {*annotation.split(" | ")} - {"None"}
    if not kinds or not kinds <= {"int", "float"}:
        return
    read, kind = (float, "a number") if "float" in kinds else (int, "a whole number")
    try:
        number = read(str(value))
    except ValueError as error:
        raise RecipeError(f"{name}={value}: {value!r} is not {kind}.") from error
    if name in POSITIVE and not number > 0:
        raise RecipeError(f"{name}={value}: give {kind} above 0.")
    if name in NOT_NEGATIVE and not number >= 0:
        raise RecipeError(f"{name}={value}: give {kind} that is not below 0.")


def argument_names() -> frozenset[str]:
    """Names of all arguments of a run."""
    return frozenset(_argument_types())


def config_names() -> frozenset[str]:
    """Names of the configuration's fields; those that the tokenizer sets, and one of the Trainer's, are left out."""
    common = _fields(_package("transformers") / "configuration_utils.py", "PreTrainedConfig")
    names = _config_types().keys() - common.keys() - argument_names()
    return frozenset(name for name in names if not name.endswith("_token_id"))


def _argument_types() -> dict[str, str]:
    """The type of each argument of a run, as its dataclass says it."""
    ours = Path(__file__).with_name("arguments.py")
    sections = ("ModelArguments", "DataArguments", "EntropyTrainingArguments", "LoraArguments")
    types = dict(_fields(_package("transformers") / "training_args.py", "TrainingArguments"))
    for section in sections:
        types |= _fields(ours, section)
    return types


def _config_types() -> dict[str, str]:
    """The type of each field that the configuration declares."""
    return _fields(_package("modeling_entropy_gpt") / "configuration_entropy_gpt.py", "EntropyGPTConfig")


def _package(name: str) -> Path:
    return Path(find_spec(name).origin).parent


@functools.cache
def _fields(path: Path, name: str) -> dict[str, str]:
    """Fields that a dataclass declares, with their types, from its source."""
    classes = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    declared = next(node.body for node in classes if node.name == name)
    fields = (node for node in declared if isinstance(node, ast.AnnAssign))
    return {field.target.id: ast.unparse(field.annotation) for field in fields}


class _Loader(yaml.SafeLoader):
    """
    Safe YAML, in which no key stands twice, with the scalars of YAML 1.2: 1e-3 is a number, and no, 010 and 2024-01-01
    are texts.
    """

    def construct_mapping(self, node, deep=False):
        seen: set = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(problem=f"{key!r} is set twice", problem_mark=node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
    ("float", r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.inf|\.nan", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def read_yaml(path: Path) -> dict[str, Any]:
    """
    Named settings of a YAML file, read safely.

    Raises:
        `RecipeError`: If it is no YAML, a name stands twice, or it holds something else.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RecipeError(f"{path} has to be a list of settings, one `name: value` a line.")
    return settings


def read_override(text: str) -> tuple[str, Any]:
    """
    The name and the value of a `key=value` setting; values as in YAML.

    Raises:
        `RecipeError`: If it is no such setting.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"{text!r} is no setting: give key=value, such as learning_rate=1e-3.")
    try:
        return name, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}={value}: {value!r} is no YAML value; quote it.") from error
