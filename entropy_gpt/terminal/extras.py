"""The parts of the project that not everybody needs."""

from enum import StrEnum


class Part(StrEnum):
    """A part that needs packages of its own, or a service."""

    train = "train"
    eval = "eval"
    private = "private"
    onnx = "onnx"
    hub = "hub"
