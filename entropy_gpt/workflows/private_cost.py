"""Prediction of the cost of private inference from architectures, without weights or engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import SET_UP_BYTES, PredictedStep, predict
from entropy_gpt.evaluation.private_inference.program.program import Span, tables_bytes
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from modeling_entropy_gpt import EntropyGPTConfig

from .options import as_tuple, check_positive, read_options


HEAD_SIZE = 64


@dataclass(frozen=True)
class PredictedCost:
    """
    The predicted cost of one architecture.

    Args:
        notation (`str`): The architecture, in the paper's notation.
        steps (`list[PredictedStep]`): The steps of the inference.
        key_bytes (`float`): Bytes of the keys, sent once per connection.
        table_bytes (`int`): Bytes of the embeddings, sent once per connection with "client_table".
    """

    notation: str
    steps: list[PredictedStep]
    key_bytes: float
    table_bytes: int

    @property
    def by_operation(self) -> dict[str, float]:
        """Bytes that both parties send, by operation."""
        totals: dict[str, float] = {}
        for step in self.steps:
            totals[step.operation] = totals.get(step.operation, 0) + step.total_bytes
        return totals

    @property
    def total_bytes(self) -> float:
        """Bytes that both parties send, without the set-up of their connection."""
        return sum(step.total_bytes for step in self.steps)

    @property
    def round_trips(self) -> float:
        """The round trips of all steps."""
        return sum(step.round_trips for step in self.steps)


def private_cost(
    notations: Sequence[str],
    *,
    n_layer: int = 12,
    n_embd: int = 768,
    n_head: int | None = None,
    vocab_size: int = 50257,
    kept: int = 0,
    length: int = 128,
    all_positions: bool = False,
    embedding: str = "one_hot",
) -> list[PredictedCost]:
    """
    Predicts the traffic and the round trips of private inference under Cheetah.

    Args:
        notations (`Sequence[str]`): Architectures, in the paper's notation.
        n_layer, n_embd, vocab_size (`int`): Their sizes.
        n_head (`int`, *optional*): Heads. Default: heads of 64 dimensions.
        kept (`int`): Earlier tokens, whose keys and values are cached.
        length (`int`): Tokens of the prompt.
        all_positions (`bool`): Whether the logits of all positions are computed, not only those of the last one.
        embedding (`str`): "one_hot" or "client_table", as in [`PrivateSettings`].

    Returns:
        `list[PredictedCost]`: The cost of each architecture, in order.

    Raises:
        `UserError`: If an architecture is not known, or the sizes do not fit.

    Example:

    ```python
    from entropy_gpt.workflows.private_cost import private_cost

    baseline, proposal = private_cost(["SM+LN+G", "EReg(SM(t)+ScFuFFN)"], length=256)
    print(baseline.total_bytes / proposal.total_bytes)
    ```
    """
    check_positive(n_layer=n_layer, n_embd=n_embd, vocab_size=vocab_size, seq=length)
    if kept < 0:
        raise UserError(f"--kept {kept}: give a number of at least 0.")
    settings = read_options(PrivateSettings, embedding=embedding)
    span = Span(kept, length, length if all_positions else 1)
    tables = tables_bytes(vocab_size, span.end, n_embd) if embedding == "client_table" else 0
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head or count_heads(n_embd), "vocab_size": vocab_size}
    return [
        PredictedCost(notation, _predict(notation, sizes, settings, span), SET_UP_BYTES, tables)
        for notation in as_tuple(notations)
    ]


def count_heads(n_embd: int) -> int:
    """The number of heads of 64 dimensions in a model of this width, at least one."""
    return max(1, n_embd // HEAD_SIZE)


def _predict(notation: str, sizes: dict, settings: PrivateSettings, span: Span) -> list[PredictedStep]:
    tokens = {"bos_token_id": None, "eos_token_id": None, "n_positions": span.end}
    try:
        config = EntropyGPTConfig.from_notation(notation, **sizes, **tokens)
        config.validate()
        return predict(config, settings, span)
    except (PrivateInferenceError, ValueError) as error:
        raise UserError(f"{notation}: {error}") from error
