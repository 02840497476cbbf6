"""What a forward pass asks of secure computation, from the configuration alone (arXiv 2501.03489, section 5)."""

import math
from collections.abc import Iterator

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from modeling_entropy_gpt import EntropyGPTConfig
from modeling_entropy_gpt.layers import TANH_GELUS


# How the paper calls activations that have other names in transformers.
ACTIVATION_TITLES = {
    **dict.fromkeys(("gelu", *TANH_GELUS), "GELU"),
    "relu": "ReLU",
    "leaky_relu": "leaky ReLU",
    "learnable_leaky_relu": "leaky ReLU",
    "silu": "SiLU",
}
ATTENTION_TITLES = {
    "softmax": "softmax",
    "power4": "power4 attention",
    "power2": "power2 attention",
    "clamped": "clamped softmax",
}
LINEAR_ACTIVATIONS = ("identity", "linear")


@dataclass(config=RECORD)
class NonlinearOperation:
    """
    Non-linear operations of one kind on tensors of one shape.

    Args:
        name (`str`): Such as "softmax", "LayerNorm" or "GELU".
        shape (`list[int]`): Shape of one tensor.
        count (`int`): Tensors of this shape.
    """

    name: str
    shape: list[int]
    count: int

    @property
    def elements(self) -> int:
        """Numbers that go through it."""
        return self.count * math.prod(self.shape)

    @property
    def text(self) -> str:
        """As the paper's tables write it: `144 × R^(128×128)`."""
        return f"{self.count:,} × R^({'×'.join(map(str, self.shape))})"


@dataclass(config=RECORD)
class OperationCounts:
    """
    Operations of a forward pass over one sequence. A multiplication with its addition counts as two FLOPs.

    Args:
        context (`int`): Tokens of the sequence.
        nonlinear (`list[NonlinearOperation]`): In the blocks: what the paper counts.
        ffn_flops (`int`):
            Of all FFNs: 16 T d² a layer, 2 T d² where the two maps are fused into one, and 2 T d for the scales of the
            residual sum, where it has some: the paper does not explain its count, and this gives each of its figures.
        attention_flops (`int`):
            Of all attention in the paper's accounting: 8 T d² for the four projections and 3 T² d for the two products
            of T x T, a layer. The paper does not explain it; half of one product, as under a causal mask, gives each
            of its figures.
        computed_attention_flops (`int`): The same with both products in full, as dense kernels compute them: 4 T² d.
        apart (`list[NonlinearOperation]`):
            What the paper does not count: the choice of the token embeddings, which is a product of one-hot rows with
            the table where tokens are secret; the final norm; the choice of the most likely token at each position.
        head_flops (`int`): FLOPs of the logits of all positions.
    """

    context: int
    nonlinear: list[NonlinearOperation]
    ffn_flops: int
    attention_flops: int
    computed_attention_flops: int
    apart: list[NonlinearOperation]
    head_flops: int


def count_operations(config: EntropyGPTConfig, context: int) -> OperationCounts:
    """
    Counts the operations of a forward pass over one sequence. What is linear for secure computation is no non-linear
    operation: static norms, weight and spectral normalisation, temperatures, scales of the residual sum.

    Args:
        config ([`EntropyGPTConfig`]): Any architecture.
        context (`int`): Tokens of the sequence.

    Raises:
        `ValueError`: If the model has fewer positions.
    """
    if not 1 <= context <= config.n_positions:
        raise ValueError(f"context={context} is not possible: the model has positions for 1 to {config.n_positions}.")
    width, projections, products = config.n_embd, 8 * context * config.n_embd**2, context**2 * config.n_embd
    return OperationCounts(
        context=context,
        nonlinear=list(_in_blocks(config, context)),
        ffn_flops=_ffns(config) * _ffn_flops(config, context),
        attention_flops=config.n_layer * (projections + 3 * products),
        computed_attention_flops=config.n_layer * (projections + 4 * products),
        apart=list(_apart(config, context)),
        head_flops=2 * context * width * config.vocab_size,
    )


def _ffns(config: EntropyGPTConfig) -> int:
    return config.n_layer - len(config.pruned_ffn_layers)


def _ffn_flops(config: EntropyGPTConfig, context: int) -> int:
    width = config.n_embd
    maps = 2 * width**2 if config.ffn_type == "fused" else 4 * width * config.inner_size
    return context * (maps + 2 * width * config.ffn_residual_scaling)


def _in_blocks(config: EntropyGPTConfig, context: int) -> Iterator[NonlinearOperation]:
    yield NonlinearOperation(
        ATTENTION_TITLES[config.attention_function], [context, context], config.n_layer * config.n_head
    )
    if config.normalization == "layernorm":
        yield NonlinearOperation("LayerNorm", [context, config.n_embd], config.n_layer + _ffns(config))
    activation = config.activation_function
    if activation not in LINEAR_ACTIVATIONS and _ffns(config):
        title = ACTIVATION_TITLES.get(activation, activation)
        yield NonlinearOperation(title, [context, config.inner_size], _ffns(config))


def _apart(config: EntropyGPTConfig, context: int) -> Iterator[NonlinearOperation]:
    yield NonlinearOperation("embedding", [context, config.vocab_size], 1)
    if config.final_normalization == "layernorm":
        yield NonlinearOperation("final LayerNorm", [context, config.n_embd], 1)
    yield NonlinearOperation("argmax", [context, config.vocab_size], 1)
