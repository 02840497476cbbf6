"""Errors of texts, recipes and training runs."""

from entropy_gpt.conversion.errors import UserError


class CorpusError(UserError, ValueError):
    """The given text or tokenizer can't be used."""


class RecipeError(UserError, ValueError):
    """The given recipe or setting can't be used."""


class DivergedError(UserError):
    """Training or conversion produced numbers that are not finite, or ran away. To a study, that is a result."""
