"""Options of workflows: their types and ranges, checked alike for commands and for callers from Python."""

import dataclasses
import functools
import inspect
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import pydantic
from pydantic import BeforeValidator

from entropy_gpt.conversion.early_checks import expanded, read_head
from entropy_gpt.conversion.errors import UserError


def _expanded(value: Any) -> Any:
    return expanded(value) if isinstance(value, str | os.PathLike) else value


# A folder, a file, or a repository or data set on the Hub.
Place = Annotated[str, BeforeValidator(_expanded)]
# A folder or a file.
LocalPath = Annotated[Path, BeforeValidator(_expanded)]
Options, Result, Parameters = TypeVar("Options"), TypeVar("Result"), ParamSpec("Parameters")
OPTION = re.compile(r"--[a-z][a-z-]*")


# Layer and head, from 0; the command has a comma between them.
Head = Annotated[tuple[int, int] | None, BeforeValidator(read_head)]
OPTIONS_OF_OTHER_NAMES = {
    **{"settings": "--set", "shard_size": "--max-shard-size", "licence": "--license", "cached": "--cache"},
    **{"length": "--seq", "networks": "--network", "new_tokens": "--max-new-tokens", "whole": "--full"},
    **{
        "longest_line": "--max-waiting",
        "longest_wait": "--max-waiting-seconds",
        "names": "--name",
        "clients": "--client",
    },
}


def read_options(options: type[Options], **values) -> Options:
    """
    Builds the options of a workflow.

    Args:
        options (`type`): A pydantic dataclass.
        values: Its fields.

    Raises:
        `UserError`: If a value is not allowed; the message names the option and the value.
    """
    try:
        return options(**values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{option_name(str(first['loc'][0]))} {first['input']}: {reason}.") from error


def read_arguments(options: type[Options], arguments: Mapping[str, Any]) -> Options:
    """As [`read_options`], from the arguments of a function (`locals()`), of which some may be no options."""
    return read_options(options, **{field.name: arguments[field.name] for field in dataclasses.fields(options)})


def check_positive(**numbers: int):
    """
    Refuses numbers below 1.

    Args:
        numbers (`int`): By the names of their options, such as `max_tokens`.

    Raises:
        `UserError`: If a number is below 1; the message names the option and the number.
    """
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{option_name(name)} {number}: give a number of at least 1.")


def as_tuple(values: str | os.PathLike | Iterable | None) -> tuple:
    """Several values, a single one given by itself, or none."""
    return (values,) if isinstance(values, str | os.PathLike) else tuple(values or ())


def with_argument_names(workflow: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """
    Adds to errors of a workflow which arguments the options in the message are, for callers from Python: a message
    about `--heal-steps` ends with "In Python, --heal-steps is heal_steps."
    """
    names = {option_name(name): name for name in inspect.signature(workflow).parameters}

    @functools.wraps(workflow)
    def call(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        try:
            return workflow(*arguments, **options)
        except UserError as error:
            named = dict.fromkeys(option for option in OPTION.findall(str(error)) if option in names)
            if named:
                meant = ", ".join(f"{option} is {names[option]}" for option in named)
                error.in_python = f"In Python, {meant}."
            raise

    return call


def option_name(field: str) -> str:
    """The command's option for a keyword argument: `max_tokens` is `--max-tokens`."""
    return OPTIONS_OF_OTHER_NAMES.get(field, f"--{field.replace('_', '-')}")
