"""Recipes: YAML files of flat settings, with overrides from the command line, read into typed arguments."""

import dataclasses
import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, PreTrainedConfig

from modeling_entropy_gpt import EntropyGPTConfig

from .arguments import DataArguments, EntropyTrainingArguments, LoraArguments, ModelArguments
from .errors import RecipeError


RECIPES = Path(__file__).with_name("recipes")
SECTIONS = (ModelArguments, DataArguments, EntropyTrainingArguments, LoraArguments)
ARGUMENT_FIELDS = {field.name: field for section in SECTIONS for field in dataclasses.fields(section)}
# All fields of the configuration but those that the tokenizer sets, and one that is the Trainer's too.
CONFIG_FIELDS = {
    field.name: field
    for field in dataclasses.fields(EntropyGPTConfig)
    if field.name not in {*ARGUMENT_FIELDS, *(field.name for field in dataclasses.fields(PreTrainedConfig))}
    and not field.name.endswith("_token_id")
}


@dataclass(frozen=True)
class Recipe:
    """
    The settings of a run.

    Args:
        name (`str`): The recipe's name, without suffix.
        settings (`dict`): Every setting by its name, as it was given.
        model ([`ModelArguments`]): Where the model comes from.
        config_fields (`dict`): Fields of its configuration.
        data ([`DataArguments`]): What it is trained on.
        training ([`EntropyTrainingArguments`]): How it is trained.
        lora ([`LoraArguments`]): Adapters.
    """

    name: str
    settings: dict[str, Any]
    model: ModelArguments
    config_fields: dict[str, Any]
    data: DataArguments
    training: EntropyTrainingArguments
    lora: LoraArguments


def read_recipe(source: str, overrides: dict[str, Any]) -> Recipe:
    """
    Reads a recipe.

    Args:
        source (`str`): A YAML file, or the name of a recipe that comes with this package.
        overrides (`dict[str, Any]`): Settings that replace those of the recipe, with values such as YAML has.

    Raises:
        `RecipeError`: If there is no such recipe, it is no flat YAML, or a setting is unknown or impossible.
    """
    path = find_recipe(source)
    settings = read_yaml(path) | overrides
    settings = {"output_dir": str(Path("runs", path.stem)), **settings}
    _refuse_unknown(settings)
    config_fields = {name: value for name, value in settings.items() if name not in ARGUMENT_FIELDS}
    words = [word for name, value in settings.items() if name in ARGUMENT_FIELDS for word in _as_words(name, value)]
    try:
        model, data, training, lora = _Parser(SECTIONS).parse_args_into_dataclasses(words)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{path.name}: {error}") from error
    return Recipe(path.stem, settings, model, config_fields, data, training, lora)


def list_recipes() -> list[str]:
    """Names of the recipes that come with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(source: str) -> Path:
    """
    The file of a recipe: a path, or the name of one that comes with this package.

    Raises:
        `RecipeError`: If there is none.
    """
    for path in (Path(source), RECIPES / f"{source.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    hint = _nearest(Path(source).stem, list_recipes())
    raise RecipeError(f"There is no recipe {source}{hint} Give a YAML file, or one of {', '.join(list_recipes())}.")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(re.sub(r"argument --(\w+)(/--[\w-]+)*", r"\1", message))


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


def _refuse_unknown(settings: dict[str, Any]):
    known = sorted({*ARGUMENT_FIELDS, *CONFIG_FIELDS})
    for name in settings:
        if name not in known:
            raise RecipeError(
                f"There is no setting {name!r}{_nearest(name, known)} `entropy-gpt train --settings` lists them all."
            )


def _as_words(name: str, value: Any) -> list[str]:
    """A setting as the argument parser takes it."""
    if value is None:
        if ARGUMENT_FIELDS[name].default is not None:
            raise RecipeError(f"{name} is empty: give it a value, or leave it out.")
        return []
    if isinstance(value, list):
        if "list" not in str(ARGUMENT_FIELDS[name].type):
            raise RecipeError(f"{name}={value} is a list, and takes one value.")
        return [f"--{name}", *map(str, value)] if value else []
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _nearest(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"`, or a full stop without a near name."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
