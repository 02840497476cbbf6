"""Records of task scores."""

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.origin import Origin


@dataclass(config=RECORD)
class TaskScore:
    """
    One score of a task of lm-eval.

    Args:
        task (`str`): Its name.
        task_version (`str`): Its version.
        metric (`str`): What was scored, such as `acc` or `acc_norm`.
        value (`float`): The score.
        standard_error (`float`, *optional*): If lm-eval gives one.
        samples (`int`): Number of samples scored.
        higher_is_better (`bool`): Which way it goes.
        few_shot (`int`): Examples shown before each sample.
    """

    task: str
    task_version: str
    metric: str
    value: float
    standard_error: float | None
    samples: int
    higher_is_better: bool
    few_shot: int


@dataclass(config=RECORD)
class TaskResult(Origin):
    """
    Scores of lm-eval, with their origin; lm-eval is among the versions.

    Args:
        scores (`list[TaskScore]`): One for each task and metric.
        bos (`str`): Whether and how a beginning-of-text token stands before a sample.
        context (`int`): The most tokens that the model is shown.
        limit (`int`, *optional*): Samples taken of each task, if not all.
        data (`str`): Where the samples come from, with a hash of what was read.
        dtype (`str`): Type of weights and computation.
        seed (`int`): Seed of lm-eval.
        seconds (`float`): Duration.
    """

    scores: list[TaskScore]
    bos: str
    context: int
    limit: int | None
    data: str
    dtype: str
    seed: int
    seconds: float
