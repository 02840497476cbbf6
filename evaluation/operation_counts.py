"""What a forward pass asks of secure computation, from the configuration alone (arXiv 2501.03489, section 5)."""

from dataclasses import dataclass

from modeling_entropy_gpt import EntropyGPTConfig


@dataclass(frozen=True)
class NonlinearOperations:
    """
    Non-linear operations of one sequence. Linear maps, static norms among them, cost little beside these.

    Args:
        softmax_rows (`int`): Rows of attention, of as many keys as the sequence has tokens.
        norm_rows (`int`): Rows of LayerNorm, of `n_embd` features.
        activation_elements (`int`): Numbers that go through the FFNs' activation.
    """

    softmax_rows: int
    norm_rows: int
    activation_elements: int


def count_nonlinear_operations(config: EntropyGPTConfig, context: int) -> NonlinearOperations:
    """Counts the non-linear operations of a forward pass over `context` tokens."""
    ffns = config.n_layer - len(config.pruned_ffn_layers)
    norms = (config.n_layer + ffns) * (config.normalization == "layernorm")
    norms += config.final_normalization == "layernorm"
    return NonlinearOperations(
        softmax_rows=config.n_layer * config.n_head * context,
        norm_rows=norms * context,
        activation_elements=(config.activation_function != "identity") * ffns * context * config.inner_size,
    )
