"""Errors that a user can mend."""


class UserError(Exception):
    """
    The root of all errors whose cause lies in what was given: arguments, files, the network. The message names the bad
    value and says what to do; commands show it without a traceback.
    """


class ConversionError(UserError, ValueError):
    """The given model can't be converted, loaded or folded."""


class NotFiniteError(ConversionError):
    """A model's weights or a converted model's predictions are not finite."""
