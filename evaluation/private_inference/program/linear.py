"""The embedding, the norms and the linear maps of a program, and the choice of a token."""

import math

from .arithmetic import Arithmetic
from .steps import Span


# Rows of an embedding table in one product.
MOST_EMBEDDED = 4096


def embed(ops: Arithmetic, tokens, table, positions, span: Span):
    """
    Rows `(length, vocabulary)` of one 1 each to embeddings `(length, width)`, in parts of the vocabulary: the engine
    keeps all that it makes of a table for the time of a product, 2 GB of each thousand rows of GPT-2 small's.
    """
    parts = math.ceil(table.shape[0] / MOST_EMBEDDED)
    size = math.ceil(table.shape[0] / parts)
    rows = [slice(part * size, (part + 1) * size) for part in range(parts)]
    return sum(ops.matmul(tokens[:, part], table[part]) for part in rows) + positions[span.start : span.end]


def normalize(ops: Arithmetic, hidden, epsilon: float):
    """LayerNorm without gain and bias."""
    width = hidden.shape[-1]
    centered = hidden - ops.scale(hidden.sum(axis=-1, keepdims=True), 1 / width)
    variance = ops.scale(ops.square(centered).sum(axis=-1, keepdims=True), 1 / width)
    return ops.multiply(centered, ops.reciprocal_root(variance + ops.public(epsilon)))


def linear(ops: Arithmetic, hidden, weight, bias):
    return ops.matmul(hidden, weight) + bias


def add_linear(ops: Arithmetic, hidden, weight, bias, residual):
    """The last rows of the residual stream, as many as there are, with a linear map of others added."""
    return residual[-hidden.shape[0] :] + ops.matmul(hidden, weight) + bias


def add_linear_to_scaled(ops: Arithmetic, hidden, weight, bias, residual, beta):
    return ops.scale_all(residual, beta) + ops.matmul(hidden, weight) + bias


def choose(ops: Arithmetic, logits):
    return ops.index_of_largest(logits)


def draw(ops: Arithmetic, logits, noise):
    """With Gumbel noise times a temperature T, a token of softmax(logits / T) (Maddison et al., 1408.6100)."""
    return ops.index_of_largest(logits + noise)
