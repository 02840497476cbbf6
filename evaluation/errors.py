"""Errors of records, tasks, publication and private inference."""

from entropy_gpt.conversion.errors import UserError


class RecordError(UserError, ValueError):
    """The given file holds no such record."""


class TextError(UserError, ValueError):
    """The attention of a model to a text can't be measured."""


class TaskError(UserError, ValueError):
    """A task of lm-eval can't be scored as asked."""


class PublicationError(UserError, ValueError):
    """A folder can't be published as it is."""


class PrivateInferenceError(UserError, RuntimeError):
    """
    A private inference can't begin or go on.

    Args:
        message (`str`): One line that says why and what to do.
        code (`str`, *optional*): The same in a word, for programs.
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code


class MachineError(PrivateInferenceError):
    """Something on this machine failed. The other side does not learn why, since the message may describe it."""


class EmbeddingsError(MachineError):
    """This side has no copy of the public embeddings that the other side names."""


class EngineError(MachineError):
    """This side's engine failed."""
