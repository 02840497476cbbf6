"""The optional parts of the project."""

from enum import StrEnum


class Part(StrEnum):
    """An optional part, which needs packages of an extra or the Hub."""

    train = "train"
    eval = "eval"
    tasks = "tasks"
    private = "private"
    onnx = "onnx"
    hub = "hub"
