"""Errors that a user can mend."""

import re
from importlib.metadata import requires


# Modules that come with a requirement of the project, and with which.
BROUGHT_BY = {"yaml": "pyyaml", "jaxlib": "jax", "libspu": "spu"}
# Extras that hold what others bring.
COLLECTIONS = ("all", "dev", "docs")
PROJECT = "entropy-gpt"


class UserError(Exception):
    """
    The root of all errors whose cause lies in what was given: arguments, files, the network. The message names the bad
    value and says what to do; commands show it without a traceback, and without `in_python`, which names the arguments
    of a Python function that options in the message stand for.
    """

    in_python = ""

    def __str__(self) -> str:
        return f"{super().__str__().rstrip('.')}. {self.in_python}" if self.in_python else super().__str__()


def missing_package(wanted: str, missing: ModuleNotFoundError, likely: str = "") -> str:
    """
    The message for a package that something needs and that is not installed, with the extra that brings it.

    Args:
        wanted (`str`): What needs it.
        missing (`ModuleNotFoundError`): The error of its import.
        likely (`str`): The extra that is named if several bring it.

    Raises:
        `ModuleNotFoundError`: The given error, if a module of this project is missing: no installation mends that.
    """
    if (missing.name or "").partition(".")[0] in ("entropy_gpt", "modeling_entropy_gpt"):
        raise missing
    module = (missing.name or "").partition(".")[0]
    extras = find_extras(module)
    if not extras:
        return f"{wanted} needs {missing.name}, which is not installed: pip install '{PROJECT}[all]'."
    extra = likely if likely in extras else extras[0]
    return f"{wanted} needs {missing.name}, which is not installed: pip install '{PROJECT}[{extra}]'."


def find_extras(module: str) -> list[str]:
    """The extras of this project that bring a module, in the order of the project's file."""
    wanted = BROUGHT_BY.get(module, module).replace("_", "-").lower()
    found = []
    for line in requires(PROJECT) or []:
        requirement, _, marker = line.partition(";")
        name = re.match(r"[\w.-]+", requirement)[0].replace("_", "-").lower()
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if name == wanted and extra and extra[1] not in COLLECTIONS:
            found.append(extra[1])
    return found


class ConversionError(UserError, ValueError):
    """The given model can't be converted, loaded or folded."""


class NotFiniteError(ConversionError):
    """A model's weights or a converted model's predictions are not finite."""
