"""Result records: every number together with the conditions under which it was measured."""

from dataclasses import field, replace
from pathlib import Path

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, load_record, save_record
from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadDiagnostics
from entropy_gpt.evaluation.measuring.operation_counts import OperationCounts
from entropy_gpt.evaluation.measuring.perplexity import Likelihood
from entropy_gpt.evaluation.measuring.scores import TaskResult
from entropy_gpt.evaluation.origin import Origin


# What files of results are called.
RESULTS = "results.json"
KIND, SCHEMA_VERSION = "results of models", 2


@dataclass(config=RECORD)
class Conditions(Origin):
    """
    What a number depends on besides the model, with its origin.

    Args:
        corpus (`str`): Name of the text.
        corpus_revision (`str`): Its version and hash.
        vocab_size (`int`): Number of tokens of the tokenizer.
        context (`int`): Length of a sequence in tokens.
        evaluated_tokens (`int`): Number of tokens that were predicted, or whose rows of attention were looked at.
        dtype (`str`): Type of weights and computation.
        seed (`int`, *optional*): Seed of training (weights, order of the data) and of measuring.
    """

    corpus: str
    corpus_revision: str
    vocab_size: int
    context: int
    evaluated_tokens: int
    dtype: str
    seed: int | None


@dataclass(config=RECORD)
class Architecture:
    """
    What a model is, in the paper's notation and in sizes.

    Args:
        notation (`str`): The blocks, in the paper's notation.
        final_normalization (`str`): The norm before the head, which the notation does not contain.
        parameters (`int`): Tied ones count once.
        n_layer, n_head, n_embd, n_positions, vocab_size (`int`): As in the configuration.
    """

    notation: str
    final_normalization: str
    parameters: int
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int

    @property
    def sizes(self) -> dict[str, int]:
        """What is counted, by the words for it."""
        return {
            "parameters": self.parameters,
            "layers": self.n_layer,
            "heads": self.n_head,
            "width": self.n_embd,
            "positions": self.n_positions,
            "vocabulary": self.vocab_size,
        }


@dataclass(config=RECORD)
class TrainingResult:
    """
    What training took, from scratch or as the healing after a conversion.

    Args:
        steps (`int`): Optimiser steps.
        tokens (`int`): Tokens seen.
        seconds (`float`): Duration, with the evaluations in its course.
        hyperparameters (`dict`): Hyperparameters of the training.
        converted_from (`str`, *optional*): Notation of the trained model that this one was converted from.
        text (`str`, *optional*): What it was trained on, with its revision.
        started_from (`str`, *optional*): Name of the trained model that this training went on from.
        base_model (`str`, *optional*): The Hub's name for that model, if it came from there.
        cpu_seconds (`float`, *optional*): Seconds of all cores of this process in that time.
    """

    steps: int
    tokens: int
    seconds: float
    hyperparameters: dict
    converted_from: str | None = None
    text: str | None = None
    started_from: str | None = None
    base_model: str | None = None
    cpu_seconds: float | None = None


@dataclass(config=RECORD)
class LikelihoodResult:
    """How well a text is predicted, and under which conditions."""

    likelihood: Likelihood
    conditions: Conditions
    seconds: float


@dataclass(config=RECORD)
class HeadResult:
    """What the attention heads do on a text, and under which conditions."""

    heads: HeadDiagnostics
    conditions: Conditions
    seconds: float


@dataclass(config=RECORD)
class AttentionResult:
    """
    What the attention heads do on one text, and under which conditions. The rows of one head alone are kept.

    Args:
        tokens (`list[str]`): The tokens, as in [`TextDiagnostics`].
        entropies (`list[list[list[float]]]`): Row entropies in nats, `(layers, heads, tokens)`.
        head (`list[int]`): Layer and head whose rows are kept.
        weights (`list[list[float]]`): Its rows, `(tokens, tokens)`.
        conditions ([`Conditions`]): What the numbers depend on.
    """

    tokens: list[str]
    entropies: list[list[list[float]]]
    head: list[int]
    weights: list[list[float]]
    conditions: Conditions


@dataclass(config=RECORD)
class AnswerCheck:
    """
    How a private answer compares with the model's own in the clear.

    Args:
        answers (`int`): Tokens answered.
        same (`int`): Those that are the most likely ones in the clear too.
        largest_logit (`float`): In the clear, by its absolute value.
        largest_error (`float`, *optional*): Largest error of the logits; missing where the client learns tokens alone.
    """

    answers: int
    same: int
    largest_logit: float
    largest_error: float | None = None


@dataclass(config=RECORD)
class PrivateCost(Origin):
    """
    What one private inference cost, measured between real parties, with its origin.

    Args:
        protocol (`str`): Such as "cheetah".
        context (`int`): Tokens of the prompt.
        answers (`int`): Tokens that were answered, or positions whose logits were.
        total_bytes (`int`): Sent by all parties together, without the set-up of their connection.
        rounds (`int`): How often a message has to travel there and back, as in [`InferenceCost`].
        seconds (`float`): On the machine and network below.
        network (`str`): Such as "loopback".
        check ([`AnswerCheck`], *optional*): How the answer compares with the clear.
    """

    protocol: str
    context: int
    answers: int
    total_bytes: int
    rounds: int
    seconds: float
    network: str
    check: AnswerCheck | None = None


@dataclass(config=RECORD)
class ModelResult:
    """
    All that is known of a model; what was not measured is missing.

    Args:
        name (`str`): A name that distinguishes it from others, such as its folder.
        weights (`str`): Hash of its weights.
        architecture ([`Architecture`]): What it is.
        operations ([`OperationCounts`]): What a forward pass takes, from the configuration.
        training ([`TrainingResult`], *optional*): How it was trained.
        likelihood ([`LikelihoodResult`], *optional*): How well it predicts a text.
        heads ([`HeadResult`], *optional*): What its attention heads do.
        attention ([`AttentionResult`], *optional*): What its attention heads do on one text.
        tasks ([`TaskResult`], *optional*): Scores of lm-eval.
        costs (`list[PrivateCost]`): Costs of private inferences.
    """

    name: str
    weights: str
    architecture: Architecture
    operations: OperationCounts
    training: TrainingResult | None = None
    likelihood: LikelihoodResult | None = None
    heads: HeadResult | None = None
    attention: AttentionResult | None = None
    tasks: TaskResult | None = None
    costs: list[PrivateCost] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The architecture, and what it was converted from."""
        notation = self.architecture.notation
        converted_from = self.training and self.training.converted_from
        return f"{notation} from {converted_from}" if converted_from else notation


def save_results(results: list[ModelResult], path: Path):
    """Writes the records as JSON."""
    save_record(results, list[ModelResult], KIND, SCHEMA_VERSION, path)


def load_results(path: Path) -> list[ModelResult]:
    """
    Reads what [`save_results`] wrote.

    Raises:
        `ValueError`: If the file is of another kind or schema, or broken.
    """
    return load_record(list[ModelResult], KIND, SCHEMA_VERSION, path)


def find_results(results: list[ModelResult], model: ModelResult) -> ModelResult | None:
    """
    Collects what records contain about one model under any name: the first of each part, and every cost. Attention to
    one text is left out: it shows the text, which may be private.

    Args:
        results (`list[ModelResult]`): Results of any models.
        model ([`ModelResult`]): What is known of it without them: its weights and its architecture.

    Returns:
        [`ModelResult`]: `None` if no record is of this model.
    """
    known = (model.weights, model.architecture)
    own = [result for result in results if (result.weights, result.architecture) == known]
    if not own:
        return None
    parts = {
        name: next((part for result in own if (part := getattr(result, name)) is not None), None)
        for name in ("training", "likelihood", "heads", "tasks")
    }
    costs = [cost for result in own for cost in result.costs]
    costs = [cost for index, cost in enumerate(costs) if cost not in costs[:index]]
    return replace(own[0], **parts, attention=None, costs=costs)
