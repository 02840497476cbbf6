"""Errors that a user can mend."""


class UserError(Exception):
    """
    The root of all errors whose cause lies in what was given: arguments, files, the network. The message names the bad
    value and says what to do; commands show it without a traceback.
    """


def missing_package(wanted: str, missing: ModuleNotFoundError) -> str:
    """
    The message for a package that something needs and that is not installed.

    Raises:
        `ModuleNotFoundError`: The given error, if a module of this project is missing: no installation mends that.
    """
    if (missing.name or "").partition(".")[0] in ("entropy_gpt", "modeling_entropy_gpt"):
        raise missing
    return f"{wanted} needs {missing.name}, which is not installed: pip install 'entropy-gpt[all]'."


class ConversionError(UserError, ValueError):
    """The given model can't be converted, loaded or folded."""


class NotFiniteError(ConversionError):
    """A model's weights or a converted model's predictions are not finite."""
