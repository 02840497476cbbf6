"""
Recipes as they are written: YAML files of flat settings. What is wrong with a file or with a setting's name is found
here, without the seconds that importing torch and transformers takes.
"""

import ast
import difflib
import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .files import expanded


RECIPES = Path(__file__).with_name("recipes")


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
    hint = _nearest(Path(source).stem, list_recipes())
    raise RecipeError(f"There is no recipe {source}{hint} Give a YAML file, or one of {', '.join(list_recipes())}.")


def read_settings(source: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """
    The settings of a recipe by their names; without `output_dir`, that is `runs/` and the recipe's name. In texts, a
    leading `~` stands for the home folder.

    Args:
        source (`str`): A YAML file, or the name of a recipe that comes with this package.
        overrides (`dict[str, Any]`): Settings that replace those of the recipe.

    Raises:
        `RecipeError`: If there is no such recipe, it is no flat YAML, or a setting is unknown.
    """
    path = find_recipe(source)
    settings = {"output_dir": str(Path("runs", path.stem)), **read_yaml(path), **overrides}
    settings = {name: expanded(value) if isinstance(value, str) else value for name, value in settings.items()}
    known = sorted({*argument_names(), *config_names()})
    for name in settings:
        if name not in known:
            raise RecipeError(
                f"There is no setting {name!r}{_nearest(name, known)} `entropy-gpt train --settings` lists them all."
            )
    return settings


def argument_names() -> frozenset[str]:
    """Names of all arguments of a run."""
    ours = Path(__file__).with_name("arguments.py")
    sections = ("ModelArguments", "DataArguments", "EntropyTrainingArguments", "LoraArguments")
    trainers = _fields(_package("transformers") / "training_args.py", "TrainingArguments")
    return trainers.union(*(_fields(ours, section) for section in sections))


def config_names() -> frozenset[str]:
    """Names of the configuration's fields; those that the tokenizer sets, and one of the Trainer's, are left out."""
    ours = _fields(_package("modeling_entropy_gpt") / "configuration_entropy_gpt.py", "EntropyGPTConfig")
    common = _fields(_package("transformers") / "configuration_utils.py", "PreTrainedConfig")
    return frozenset(name for name in ours - common - argument_names() if not name.endswith("_token_id"))


def _package(name: str) -> Path:
    return Path(find_spec(name).origin).parent


@functools.cache
def _fields(path: Path, name: str) -> frozenset[str]:
    """Fields that a dataclass declares, from its source."""
    classes = (node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))
    declared = next(node.body for node in classes if node.name == name)
    return frozenset(node.target.id for node in declared if isinstance(node, ast.AnnAssign))


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


def _nearest(name: str, known: list[str]) -> str:
    """`"; did you mean 'x'?"`, or a full stop without a near name."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
