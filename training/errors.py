"""Errors of a text or data set."""


class CorpusError(ValueError):
    """The given text can't be used; the message says why and what to do."""
