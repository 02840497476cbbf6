"""What a forward pass asks of secure computation, from the configuration alone (arXiv 2501.03489, section 5)."""

import math

from pydantic.dataclasses import dataclass

from modeling_entropy_gpt import EntropyGPTConfig

from .records import RECORD


@dataclass(config=RECORD)
class NonlinearOperation:
    """
    Non-linear operations of one kind on tensors of one shape.

    Args:
        name (`str`): Such as "softmax", "LayerNorm" or "GELU".
        shape (`list[int]`): Of one tensor.
        count (`int`): Tensors of this shape.
    """

    name: str
    shape: list[int]
    count: int

    @property
    def elements(self) -> int:
        """Numbers that go through it."""
        return self.count * math.prod(self.shape)


@dataclass(config=RECORD)
class OperationCounts:
    """
    Operations of a forward pass over one sequence.

    Args:
        context (`int`): Tokens of the sequence.
        nonlinear (`list[NonlinearOperation]`): In the blocks: what the paper counts.
        ffn_flops (`int`): Of all FFNs, in the paper's accounting.
        attention_flops (`int`): Of all attention, in the paper's accounting.
    """

    context: int
    nonlinear: list[NonlinearOperation]
    ffn_flops: int
    attention_flops: int


def count_operations(config: EntropyGPTConfig, context: int) -> OperationCounts:
    """Counts the operations of a forward pass over `context` tokens."""
    raise NotImplementedError
