"""What goes wrong in an evaluation by what was given to it."""


class TaskError(ValueError):
    """A task of lm-eval can't be scored as asked; the message says why and what to do."""
