"""Recipes: YAML files of flat settings, with overrides from the command line, read into typed arguments."""

import dataclasses
import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from modeling_entropy_gpt import EntropyGPTConfig

from .arguments import DataArguments, EntropyTrainingArguments, LoraArguments, ModelArguments
from .errors import RecipeError
from .recipe_file import config_names, find_recipe, read_settings


SECTIONS = (ModelArguments, DataArguments, EntropyTrainingArguments, LoraArguments)
ARGUMENT_FIELDS = {field.name: field for section in SECTIONS for field in dataclasses.fields(section)}
CONFIG_FIELDS = {field.name: field for field in dataclasses.fields(EntropyGPTConfig) if field.name in config_names()}
# In documentation: the title of a section of TrainingArguments, and an argument with its text.
SECTION = re.compile(r" *> ([^.]+)")
DOCUMENTED = re.compile(r"^ {4,8}(\w+) ?\(.*\):((?:.*\n)(?: {12}.*\n)*)", re.MULTILINE)


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
    settings = read_settings(source, overrides)
    config_fields = {name: value for name, value in settings.items() if name not in ARGUMENT_FIELDS}
    words = [word for name, value in settings.items() if name in ARGUMENT_FIELDS for word in _as_words(name, value)]
    try:
        model, data, training, lora = _Parser(SECTIONS).parse_args_into_dataclasses(words)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{path.name}: {error}") from error
    if "tensorboard" in training.report_to and find_spec("tensorboard") is None:
        raise RecipeError(
            f"{path.name}: report_to has tensorboard, which is not installed: pip install 'entropy-gpt[tensorboard]', "
            "or set report_to=none."
        )
    return Recipe(path.stem, settings, model, config_fields, data, training, lora)


def group_settings() -> dict[str, dict[str, dataclasses.Field]]:
    """All settings by what they are about: fields by their names, under the title of each group."""
    trainers = _trainer_sections()
    ours = [name for name in _names(EntropyTrainingArguments) if name not in trainers]
    titles = {
        **dict.fromkeys(_names(ModelArguments), "Model"),
        **dict.fromkeys(sorted(CONFIG_FIELDS), "Architecture, sizes and penalty"),
        **dict.fromkeys(_names(DataArguments), "Text"),
        **dict.fromkeys(ours, "Learned scalars, logs and guard"),
        **dict.fromkeys(_names(LoraArguments), "Adapters"),
        **{name: f"Trainer: {title}" for name, title in trainers.items()},
    }
    fields = {**CONFIG_FIELDS, **ARGUMENT_FIELDS}
    groups: dict[str, dict[str, dataclasses.Field]] = {}
    for name, title in titles.items():
        groups.setdefault(title, {})[name] = fields[name]
    return groups


def _names(section: type) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _trainer_sections() -> dict[str, str]:
    """The section of each of the Trainer's arguments in their documentation."""
    title, sections = "other", dict.fromkeys(_names(TrainingArguments), "other")
    for line in (TrainingArguments.__doc__ or "").splitlines():
        if section := SECTION.fullmatch(line):
            title = section[1]
        elif (argument := re.match(r" *(\w+) ?\(", line)) and argument[1] in sections:
            sections[argument[1]] = title
    return sections


def describe_setting(field: dataclasses.Field) -> str:
    """What a setting does, in one line."""
    documented = dict(DOCUMENTED.findall(EntropyGPTConfig.__doc__))
    return " ".join(field.metadata.get("help", documented.get(field.name, "")).split())


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(re.sub(r"argument --(\w+)(/--[\w-]+)*", r"\1", message))


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
