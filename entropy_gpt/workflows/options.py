"""Options of workflows: their types and ranges, checked alike for commands and for callers from Python."""

import os
from typing import Annotated, TypeVar

import pydantic
from pydantic import BeforeValidator

from entropy_gpt.conversion.errors import UserError


# A folder, a file, or a repository or data set on the Hub.
Place = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
Options = TypeVar("Options")


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
        raise UserError(f"{option_name(str(first['loc'][0]))} {first['input']}: {first['msg']}.") from error


def option_name(field: str) -> str:
    """The command's option for a keyword argument: `max_tokens` is `--max-tokens`."""
    return f"--{field.replace('_', '-')}"
