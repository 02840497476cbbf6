"""Columns of tables about models and runs, each listed once: its headings, and the cell of a record."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.records.results import ModelResult


@dataclass(frozen=True)
class Column:
    """
    A column.

    Args:
        title (`str`): Its heading in documents.
        narrow (`str`): Its heading in a terminal of 80 characters, in lines.
        show (`Callable`): The cell of a record, such as a [`ModelResult`]; empty if it was not measured.
    """

    title: str
    narrow: str
    show: Callable[[Any], str]


def list_rows(columns: Iterable[Column], records: Iterable) -> list[tuple[str, ...]]:
    """One row of text for each record."""
    columns = tuple(columns)
    return [tuple(column.show(record) for column in columns) for record in records]


def entropy_columns(find: Callable[[Any], HeadwiseEntropy | None]) -> tuple[Column, Column, Column]:
    """
    Columns of mean entropy, overloaded heads and collapsed heads.

    Args:
        find (`Callable`): The entropies of a record, or `None` if they were not measured.
    """

    def column(title: str, narrow: str, show: Callable[[HeadwiseEntropy], str]) -> Column:
        return Column(title, narrow, lambda record: "" if (entropy := find(record)) is None else show(entropy))

    return (
        column("mean entropy (nats)", "entropy\n(nats)", lambda entropy: f"{entropy.mean:.2f}"),
        column("overloaded heads", "over-\nloaded", lambda entropy: f"{entropy.overloaded_share:.0%}"),
        column("collapsed heads", "col-\nlapsed", lambda entropy: f"{entropy.collapsed_share:.0%}"),
    )


def _find_entropy(result: ModelResult) -> HeadwiseEntropy | None:
    return None if result.heads is None else result.heads.heads.entropy


ARCHITECTURE = Column("architecture", "architecture", lambda result: result.title)
FINAL_NORM = Column("final norm", "final\nnorm", lambda result: result.architecture.final_normalization)
PARAMETERS = Column("parameters", "para-\nmeters", lambda result: f"{result.architecture.parameters:,}")
PERPLEXITY = Column(
    "perplexity per token", "ppl per\ntoken", lambda result: f"{result.likelihood.likelihood.perplexity:.2f}"
)
WORD_PERPLEXITY = Column(
    "perplexity per word", "ppl per\nword", lambda result: f"{result.likelihood.likelihood.word_perplexity:.4g}"
)
BITS_PER_BYTE = Column(
    "bits per byte", "bits/\nbyte", lambda result: f"{result.likelihood.likelihood.bits_per_byte:.3f}"
)
MEAN_ENTROPY, OVERLOADED, COLLAPSED = entropy_columns(_find_entropy)
TRAINING_SECONDS = Column("training (s)", "training\nseconds", lambda result: f"{result.training.seconds:.0f}")
