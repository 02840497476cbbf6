"""The record of a conversion: what each step cost, what healing gave back, and under which conditions."""

from dataclasses import field
from typing import ClassVar

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.measuring.operation_counts import OperationCounts

from .results import Conditions


@dataclass(config=RECORD)
class StepRecord:
    """
    What one step did, on text that nothing was fitted to.

    Args:
        title (`str`): The step.
        kl (`float`): KL to the original after it, in nats per token.
        nats (`float`): Negative log-likelihood of a token after it; perplexity is its exponential.
        naive_kl (`float`, *optional*): KL that the step would have cost with weights copied and nothing fitted.
        naive_nats (`float`, *optional*): Likewise.
        naive_diverged (`bool`): Whether these are missing because they are not finite.
        parameters (`int`): After it; tied ones count once.
        seconds (`float`): Calibration included, measurement not.
        kept (`bool`): Whether the step keeps every prediction, as a check on a sample of the text found: its figures
            are those of the step before.
    """

    title: str
    kl: float
    nats: float
    naive_kl: float | None
    naive_nats: float | None
    naive_diverged: bool
    parameters: int
    seconds: float
    kept: bool = False


@dataclass(config=RECORD)
class HealingRecord:
    """
    Training after the simplification.

    Args:
        steps (`int`): Optimiser steps.
        tokens (`int`): Tokens seen.
        seconds (`float`): Duration, evaluations included.
        settings (`dict`): Hyperparameters of the training.
        validation_nats (`list[list[float]]`): Steps, and the negative log-likelihood of a token of validation text.
        events (`list[list]`): Steps, and what was removed then, or why the guard went back.
    """

    steps: int
    tokens: int
    seconds: float
    settings: dict
    validation_nats: list[list[float]]
    events: list[list]


@dataclass(config=RECORD)
class ConversionReport(StoredRecord):
    """
    A conversion from end to end.

    Args:
        source (`str`): Where the original lies.
        source_notation, target_notation (`str`): Both architectures in the paper's notation.
        source_final_normalization, target_final_normalization (`str`): The norms before the head.
        original_nats (`float`, *optional*):
            Negative log-likelihood of a token under the original; none if no text was read.
        original_parameters (`int`): Parameters of the original; tied ones count once.
        source_operations, target_operations ([`OperationCounts`]): Operations of one sequence.
        pruning_damage (`dict[str, float]`): KL that pruning each FFN alone would cost, by layer, if it was measured.
        calibration_tokens (`int`): Tokens that the steps were fitted to.
        naive (`bool`): Whether norms and linear maps were not fitted, but copied.
        steps (`list[StepRecord]`): What was done, in order; healing is a step too.
        healing ([`HealingRecord`], *optional*): How it went.
        seconds (`float`): Whole duration, with measurements; that of the last run alone after an interruption.
        peak_memory_bytes (`int`): Peak memory of the process.
        conditions ([`Conditions`]): What the numbers depend on.
    """

    KIND: ClassVar[str] = "a conversion"
    SCHEMA_VERSION: ClassVar[int] = 2

    source: str
    source_notation: str
    target_notation: str
    source_final_normalization: str
    target_final_normalization: str
    original_nats: float | None
    original_parameters: int
    source_operations: OperationCounts
    target_operations: OperationCounts
    seconds: float
    peak_memory_bytes: int
    conditions: Conditions
    pruning_damage: dict[str, float] = field(default_factory=dict)
    calibration_tokens: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    healing: HealingRecord | None = None
    naive: bool = False

    @property
    def final_nats(self) -> float:
        """Negative log-likelihood of a token under the converted model, on the text of `original_nats`."""
        return self.steps[-1].nats if self.steps else self.original_nats
