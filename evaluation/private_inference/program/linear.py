"""The embedding, the norms and the linear maps of a program, and the choice of a token."""

import math

from .arithmetic import Arithmetic
from .steps import Span


# Rows of an embedding table in one product.
MOST_EMBEDDED = 4096


def embed(ops: Arithmetic, tokens, table, positions, span: Span):
    """
    Rows `(length, vocabulary)` of one 1 each to embeddings with checksums `(length, width + 1)`, in parts of the
    vocabulary: the engine keeps all that it makes of a table for the time of a product, 2 GB of each thousand rows of
    GPT-2 small's.
    """
    parts = math.ceil(table.shape[0] / MOST_EMBEDDED)
    size = math.ceil(table.shape[0] / parts)
    rows = [slice(part * size, (part + 1) * size) for part in range(parts)]
    products = (ops.matmul(tokens[:, part], ops.append_checksum(table[part])) for part in rows)
    return sum(products) + ops.append_checksum(positions[span.start : span.end])


def begin_stream(ops: Arithmetic, embeddings):
    """The same from embeddings that are there."""
    return ops.append_checksum(embeddings)


def normalize(ops: Arithmetic, stream, epsilon: float):
    """LayerNorm without gain and bias, `(length, width)`."""
    hidden = stream[:, :-1]
    width = hidden.shape[-1]
    centered = hidden - ops.scale(hidden.sum(axis=-1, keepdims=True), 1 / width)
    variance = ops.scale(ops.square(centered).sum(axis=-1, keepdims=True), 1 / width)
    return ops.multiply(centered, ops.reciprocal_root(variance + ops.public(epsilon)))


def linear(ops: Arithmetic, hidden, weight, bias):
    """A linear map of hidden states, or of the stream, whose checksum it leaves out."""
    return ops.matmul(hidden[:, : weight.shape[0]], weight) + bias


def linear_with_checksum(ops: Arithmetic, hidden, weight, bias):
    """The same with the checksum of each row behind."""
    return ops.matmul(hidden[:, : weight.shape[0]], ops.append_checksum(weight)) + ops.append_checksum(bias)


def compute_logits(ops: Arithmetic, hidden, weight, bias):
    """Logits `(answers, vocabulary)`, and their checksums apart."""
    logits = linear_with_checksum(ops, hidden, weight, bias)
    return logits[:, :-1], logits[:, -1:]


def add_linear(ops: Arithmetic, hidden, weight, bias, residual):
    """The last rows of the residual stream, as many as there are, with a linear map of others added."""
    return residual[-hidden.shape[0] :] + linear_with_checksum(ops, hidden, weight, bias)


def add_linear_to_scaled(ops: Arithmetic, hidden, weight, bias, residual, beta):
    return ops.scale_all(residual, beta) + linear_with_checksum(ops, hidden, weight, bias)


def choose(ops: Arithmetic, logits):
    return ops.index_of_largest(logits)


def draw(ops: Arithmetic, logits, noise):
    """With Gumbel noise times a temperature T, a token of softmax(logits / T) (Maddison et al., 1408.6100)."""
    return ops.index_of_largest(logits + noise)
