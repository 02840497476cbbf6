"""Errors that are the user's to mend."""


class CommandError(Exception):
    """A command can't do what was asked; the message says why and what to do. Shown without a traceback."""


class DivergedError(CommandError):
    """A training or a conversion came to numbers that are not finite, or ran away: to a study, that is a result."""
