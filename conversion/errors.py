"""What goes wrong in a conversion by what was given to it."""


class ConversionError(ValueError):
    """What was given can't be converted; the message says why and what to do."""


class NotFiniteError(ConversionError):
    """A model's weights or a converted model's predictions are not finite."""
