"""What a program consists of: steps, each of them a function of tensors, over some tokens."""

from collections.abc import Callable
from dataclasses import dataclass

from .arithmetic import Arithmetic


@dataclass(frozen=True)
class Step:
    """
    One operation of one layer.

    Args:
        operation (`str`): Such as "exponential"; what costs are summed by.
        layer (`int`, *optional*): `None` around the blocks.
        function (`Callable`): Takes an [`Arithmetic`] and tensors; hashable, and equal for equal steps.
        inputs, outputs (`tuple[str]`): Variables.
    """

    operation: str
    layer: int | None
    function: Callable
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Span:
    """
    The tokens that a pass is given.

    Args:
        start (`int`): Tokens before, whose keys and values are kept.
        length (`int`): Tokens.
        answers (`int`): Number of last tokens whose logits are wanted.
    """

    start: int
    length: int
    answers: int = 1

    @property
    def end(self) -> int:
        return self.start + self.length


def run_steps(steps: list[Step], ops: Arithmetic, variables: dict) -> dict:
    """Runs a program in the clear, on JAX's or numpy's arrays; returns all variables."""
    variables = dict(variables)
    for step in steps:
        results = step.function(ops, *(variables[name] for name in step.inputs))
        results = results if isinstance(results, tuple) else (results,)
        variables.update(zip(step.outputs, results, strict=True))
    return variables
