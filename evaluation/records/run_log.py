"""The log of a training run, one JSON object a line: all that the pictures of runs are drawn from."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from entropy_gpt.evaluation.errors import RecordError
from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.measuring.perplexity import perplexity_of
from modeling_entropy_gpt.layers import LEARNED_SCALARS


LOG_NAME = "training_log.jsonl"
SCHEMA_VERSION = 1
ACTIONS = ("stop", "rollback")


@dataclass(frozen=True)
class RunDescription:
    """
    The settings of a run, and where it ran.

    Args:
        notation (`str`): The architecture in the paper's notation.
        config (`dict`): The model's configuration.
        parameters (`int`): Number of trainable parameters; tied ones count once.
        max_steps (`int`): Optimiser steps that were planned.
        tokens_per_step (`int`): Tokens of an optimiser step.
        context (`int`): Length of a sequence in tokens.
        seed (`int`): Seed of the weights and of the order of the training data.
        versions (`dict[str, str]`, *optional*): Versions of Python and of the packages that compute.
        git_revision (`str`, *optional*): Commit of this project.
        machine (`str`, *optional*): Processor and number of threads.
    """

    notation: str
    config: dict
    parameters: int
    max_steps: int
    tokens_per_step: int
    context: int
    seed: int
    versions: dict[str, str] | None
    git_revision: str | None
    machine: str | None


@dataclass(frozen=True)
class TrainingRecord:
    """
    Figures of training at a step; `None` where one was not logged.

    Args:
        step (`int`): Optimiser steps done.
        loss (`float`, *optional*): With the penalties, if there are any.
        cross_entropy_loss (`float`, *optional*): Without it.
        entropy_loss (`float`, *optional*): The entropy penalty.
        penalized_share (`float`, *optional*): Part of the heads (or rows) outside of the tolerance.
        log_sum_loss (`float`, *optional*): Mean square of what rows' log-sum-exp of scores is off their shift.
        learning_rate (`float`, *optional*): Learning rate of the step.
        grad_norm (`float`, *optional*): Before clipping.
    """

    step: int
    loss: float | None
    cross_entropy_loss: float | None
    entropy_loss: float | None
    penalized_share: float | None
    log_sum_loss: float | None
    learning_rate: float | None
    grad_norm: float | None

    @property
    def cross_entropy(self) -> float | None:
        """The cross-entropy, which without a penalty is the loss."""
        has_penalty = self.entropy_loss is not None or self.log_sum_loss is not None
        return self.loss if self.cross_entropy_loss is None and not has_penalty else self.cross_entropy_loss


PENALTY_FIGURES = ("entropy_loss", "penalized_share", "log_sum_loss")
TRAINING_FIGURES = tuple(figure.name for figure in dataclasses.fields(TrainingRecord) if figure.name != "step")


@dataclass(frozen=True)
class EvaluationRecord:
    """
    An evaluation.

    Args:
        step (`int`): Optimiser steps done.
        loss (`float`): Cross-entropy in nats.
        perplexity (`float`): Its exponential, if not logged itself.
    """

    step: int
    loss: float
    perplexity: float


@dataclass(frozen=True)
class EntropyRecord:
    """
    What the heads and layers did at a step. Numbers of heads are `(layers, heads)`; NaN where a layer has no FFN.

    Args:
        step (`int`): Optimiser steps done.
        entropies (`list[list[float]]`): Mean row entropy of each head, in nats.
        maximum (`float`): That of uniform attention under the causal mask.
        context_maximum (`float`): The logarithm of the context.
        learned (`dict[str, list]`):
            The numbers of each kind of learned scalars ([`LEARNED_SCALARS`]) that the model has, by name: of each
            layer, or of each head.
        residual_scale (`list[float]`, *optional*): Standard deviation of the residual stream behind each block.
    """

    step: int
    entropies: list[list[float]]
    maximum: float
    context_maximum: float
    learned: dict[str, list]
    residual_scale: list[float] | None

    @property
    def headwise_entropy(self) -> HeadwiseEntropy:
        """The entropies, with what is derived from them."""
        return HeadwiseEntropy(self.entropies, self.maximum)


@dataclass(frozen=True)
class Alarm:
    """What was wrong with the entropies of a layer."""

    step: int
    layer: int
    text: str


@dataclass(frozen=True)
class Divergence:
    """A loss or gradient that was not finite, and what was done: `"stop"` or `"rollback"`."""

    step: int
    text: str
    action: str


@dataclass(frozen=True)
class RunLog:
    """
    A run, as far as it went. Steps are counted on after a rollback, so those that it undid are there too. Records of
    other kinds than those below are passed over.

    Args:
        path (`Path`): The file.
        description ([`RunDescription`]): The settings of the run.
        training (`list[TrainingRecord]`): By step.
        evaluations (`list[EvaluationRecord]`): By step.
        entropies (`list[EntropyRecord]`): By step.
        alarms (`list[Alarm]`): As they came.
        divergences (`list[Divergence]`): As they came.
    """

    path: Path
    description: RunDescription
    training: list[TrainingRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    entropies: list[EntropyRecord] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    divergences: list[Divergence] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "RunLog":
        """
        Reads a run's folder, or its log itself. The run may be still going on, or have died: a last line that is cut
        counts as not written.

        Raises:
            `RecordError`: If there is no log, or it is empty, of another schema or damaged.
        """
        path = path.resolve()
        path = path / LOG_NAME if path.is_dir() else path
        if not path.is_file():
            raise RecordError(f"There is no {path}. Give the folder of a training run, which holds its {LOG_NAME}.")
        *lines, rest = path.read_bytes().split(b"\n")
        if _is_whole(rest):
            lines.append(rest)
        if not lines:
            raise RecordError(f"{path} is empty. The run has not begun to write it, or died before: run it (again).")
        log = cls(path, _read_description(lines[0], path))
        for number, line in enumerate(lines[1:], 2):
            try:
                log._add(_read_object(line))
            except ValueError as error:
                raise RecordError(
                    f"{path}, line {number} is damaged: {error}. Delete this line to read the others."
                ) from error
        return log

    @property
    def place(self) -> Path:
        """The run's folder, or the file, if it bears a name of its own."""
        return self.path.parent if self.path.name == LOG_NAME else self.path

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.description.config["n_layer"]

    @property
    def last_step(self) -> int:
        """The last step of which anything was logged."""
        records = (self.training, self.evaluations, self.entropies, self.divergences)
        return max((record.step for kind in records for record in kind), default=0)

    @property
    def diverged_at(self) -> int | None:
        """Where it ceased to be finite for good: where it was stopped for it, or from where on no loss is finite."""
        steps = [divergence.step for divergence in self.divergences if divergence.action == "stop"]
        losses = [(record.step, record.cross_entropy) for record in self.training if record.cross_entropy is not None]
        losses = sorted([*losses, *((record.step, record.loss) for record in self.evaluations)], reverse=True)
        steps += [step for step, _ in itertools.takewhile(lambda loss: not math.isfinite(loss[1]), losses)]
        return min(steps, default=None)

    @property
    def rollbacks(self) -> list[int]:
        """The steps from which it went back to an earlier state."""
        return [divergence.step for divergence in self.divergences if divergence.action == "rollback"]

    @property
    def has_losses(self) -> bool:
        """Whether any loss was logged, of training or of an evaluation."""
        return bool(self.evaluations) or any(record.cross_entropy is not None for record in self.training)

    @property
    def has_penalty(self) -> bool:
        """Whether anything about a penalty on attention rows was logged."""
        return any(getattr(record, name) is not None for record in self.training for name in PENALTY_FIGURES)

    @property
    def has_thresholds(self) -> bool:
        """Whether thresholds were logged, as of a run with the penalty."""
        return any("thresholds" in record.learned for record in self.entropies)

    def nearest_entropies(self, step: int) -> EntropyRecord:
        """The entropies recorded nearest to a step; the earlier ones of two."""
        return min(self.entropies, key=lambda record: abs(record.step - step))

    def _add(self, entry: dict):
        """
        Adds what a line holds.

        Raises:
            `ValueError`: If it is not what a log holds.
        """
        kind, step = entry.get("kind"), _whole_number(entry, "step")
        if kind == "log":
            figures = {name: _number_or_none(entry, name) for name in TRAINING_FIGURES}
            if any(figure is not None for figure in figures.values()):
                _put(self.training, TrainingRecord(step, **figures))
            if (loss := _number_or_none(entry, "eval_loss")) is not None:
                logged = _number_or_none(entry, "eval_perplexity")
                _put(self.evaluations, EvaluationRecord(step, loss, perplexity_of(loss) if logged is None else logged))
        elif kind == "entropy":
            _put(self.entropies, self._read_entropies(step, entry))
        elif kind == "alarm":
            self.alarms.append(Alarm(step, _whole_number(entry, "layer"), _text(entry, "text")))
        elif kind == "divergence":
            action = _text(entry, "action")
            if action not in ACTIONS:
                raise ValueError(f"action {action!r} is none of {', '.join(ACTIONS)}")
            self.divergences.append(Divergence(step, _text(entry, "text"), action))

    def _read_entropies(self, step: int, entry: dict) -> EntropyRecord:
        heads = (self.layers, self.description.config["n_head"])
        layers = heads[:1]
        learned = {
            scalar.name: _numbers_or_none(entry, scalar.name, heads if scalar.by_head else layers)
            for scalar in LEARNED_SCALARS
        }
        return EntropyRecord(
            step,
            _numbers(entry, "entropies", heads),
            _number(entry, "maximum"),
            _number(entry, "context_maximum"),
            {name: numbers for name, numbers in learned.items() if numbers is not None},
            _numbers_or_none(entry, "residual_scale", layers),
        )


def run_titles(runs: list[RunLog]) -> list[str]:
    """The architecture of each run; with the folder's name where several have it, or its path if need be."""
    notations = [run.description.notation for run in runs]
    named = [(run.description.notation, run.place.name) for run in runs]
    return [
        notation
        if notations.count(notation) == 1
        else f"{notation} ({run.place.name if named.count((notation, run.place.name)) == 1 else run.place})"
        for notation, run in zip(notations, runs, strict=True)
    ]


def _read_description(line: bytes, path: Path) -> RunDescription:
    try:
        entry = _read_object(line)
        if entry.get("kind") != "run":
            raise ValueError("it does not describe the run")
    except ValueError as error:
        raise RecordError(f"{path}, line 1 is damaged: {error}. Give the log of a training run.") from error
    if (schema := entry.get("schema_version")) != SCHEMA_VERSION:
        raise RecordError(
            f"{path}, line 1: schema version {schema}, where {SCHEMA_VERSION} is read. Use the version of "
            "entropy-gpt that wrote it."
        )
    try:
        config = entry.get("config")
        if not isinstance(config, dict):
            raise ValueError("config is no object")
        for name in ("n_layer", "n_head"):
            if _whole_number(config, name) == 0:
                raise ValueError(f"{name} is 0")
        names = ("parameters", "max_steps", "tokens_per_step", "context", "seed")
        return RunDescription(
            notation=_text(entry, "notation"),
            config=config,
            **{name: _whole_number(entry, name) for name in names},
            **{name: entry.get(name) for name in ("versions", "git_revision", "machine")},
        )
    except ValueError as error:
        raise RecordError(f"{path}, line 1 is damaged: {error}. Run the training again.") from error


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _read_object(line: bytes) -> dict:
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("no JSON object")
    return entry


def _put(records: list, record: TrainingRecord | EvaluationRecord | EntropyRecord):
    if records and records[-1].step == record.step:
        records.pop()
    records.append(record)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(entry: dict, name: str) -> float:
    if not _is_number(value := entry.get(name)):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return float(value)


def _number_or_none(entry: dict, name: str) -> float | None:
    return None if entry.get(name) is None else _number(entry, name)


def _whole_number(entry: dict, name: str) -> int:
    value = _number(entry, name)
    if not value.is_integer() or value < 0:
        raise ValueError(f"{name} is {entry[name]}, which is no whole number from 0")
    return int(value)


def _text(entry: dict, name: str) -> str:
    if not isinstance(value := entry.get(name), str):
        raise ValueError(f"{name} is {value!r}, which is no text")
    return value


def _numbers(entry: dict, name: str, shape: tuple[int, ...]) -> list:
    """Nested lists of numbers of this shape; null is NaN."""

    def read(value, shape: tuple[int, ...]):
        if not shape and (value is None or _is_number(value)):
            return math.nan if value is None else float(value)
        if not shape or not isinstance(value, list) or len(value) != shape[0]:
            raise ValueError(f"{name} is not {' x '.join(map(str, full_shape))} numbers")
        return [read(part, shape[1:]) for part in value]

    full_shape = shape
    return read(entry.get(name), shape)


def _numbers_or_none(entry: dict, name: str, shape: tuple[int, ...]) -> list | None:
    return None if entry.get(name) is None else _numbers(entry, name, shape)
