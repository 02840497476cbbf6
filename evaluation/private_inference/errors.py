"""What goes wrong in a private inference by what was given to it, by the peer or by the network."""


class PrivateInferenceError(RuntimeError):
    """A private inference can't begin or go on; the message is one line that says why and what to do."""


class EngineError(PrivateInferenceError):
    """What went wrong in this side's engine: the other side is not told, since it may speak of this machine."""
