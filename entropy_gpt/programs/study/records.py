"""What the study measured: a record for each run, with all settings of the run."""

from dataclasses import field
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.measuring.entropy_diagnostics import HeadwiseEntropy
from entropy_gpt.evaluation.origin import Origin
from entropy_gpt.evaluation.private_inference.agreement import Agreement
from entropy_gpt.evaluation.records.results import LikelihoodResult, PrivateCost


TRAINED, CONVERTED, ANSWERED, TIMED = KINDS = ("trained", "converted", "answered", "timed")


@dataclass(config=RECORD)
class StudyRun(StoredRecord):
    """
    A run of the study.

    Args:
        name (`str`): What distinguishes it from others.
        kind (`str`): One of `KINDS`.
        settings (`dict`): All its settings.
        source (`str`, *optional*): Name of the run whose model was converted, or answered.
        notation (`str`): The architecture.
        parameters (`int`): Tied ones count once.
        tokens (`int`): Seen in training, without those of the source.
        seconds_per_step (`float`, *optional*): Seconds of a step of training.
        cpu_seconds_per_step (`float`, *optional*): Seconds of the processor; the median, of a run that was timed.
        diverged (`str`, *optional*): What went wrong in training; there is no model then.
        events (`list[str]`): What the guard reported in the course of training.
        validation ([`LikelihoodResult`], *optional*): On documents of the training text that were kept apart.
        test (`dict[str, LikelihoodResult]`): On other text of the same kind, by its name.
        transfer (`dict[str, LikelihoodResult]`): On text of another kind.
        heads ([`HeadwiseEntropy`], *optional*): Mean entropies on the validation text.
        origin ([`Origin`], *optional*): What computed it, of a run that was timed.
        cost ([`PrivateCost`], *optional*): Of one answer between two processes, checked; of runs that answered.
        agreement ([`Agreement`], *optional*): Of answers in the emulated ring with those in the clear; of the same.
    """

    KIND: ClassVar[str] = "a run of the study"
    SCHEMA_VERSION: ClassVar[int] = 1

    name: str
    kind: str
    settings: dict[str, Any]
    source: str | None
    notation: str
    parameters: int
    tokens: int = 0
    seconds_per_step: float | None = None
    diverged: str | None = None
    events: list[str] = field(default_factory=list)
    validation: LikelihoodResult | None = None
    test: dict[str, LikelihoodResult] = field(default_factory=dict)
    heads: HeadwiseEntropy | None = None
    cost: PrivateCost | None = None
    agreement: Agreement | None = None
    cpu_seconds_per_step: float | None = None
    transfer: dict[str, LikelihoodResult] = field(default_factory=dict)
    origin: Origin | None = None

    @property
    def validation_nats(self) -> float:
        """Negative log-likelihood of a token; infinite for a run that diverged."""
        if self.validation is None:
            return float("inf")
        likelihood = self.validation.likelihood
        return likelihood.nats / likelihood.tokens

    @property
    def test_nats(self) -> float:
        """Negative log-likelihood of a token of all test texts together; infinite for a run that diverged."""
        return _mean_nats(self.test)

    @property
    def transfer_nats(self) -> float:
        """The same of text of another kind."""
        return _mean_nats(self.transfer)


def _mean_nats(results: dict[str, LikelihoodResult]) -> float:
    if not results:
        return float("inf")
    parts = [result.likelihood for result in results.values()]
    return sum(part.nats for part in parts) / sum(part.tokens for part in parts)


@dataclass(config=RECORD)
class Study(StoredRecord):
    """
    All finished runs.

    Args:
        protocol (`str`): Hash of what the protocol says.
        runs (`dict[str, StudyRun]`): By name.
        groups (`dict[str, list[str]]`): Names of the finished runs of each group of the protocol, in its order.
        missing (`dict[str, int]`): Rows of each group that are not measured, where there are any.
        tokenizer (`str`, *optional*): Hash of the tokenizer that all runs share.
        pins (`str`, *optional*): Hash of the list of the packages that all runs are trained on, if they are.
    """

    KIND: ClassVar[str] = "the study"
    SCHEMA_VERSION: ClassVar[int] = 1

    protocol: str
    runs: dict[str, StudyRun] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    pins: str | None = None

    def group(self, *names: str) -> list[StudyRun]:
        """The finished runs of a group, or of several, one after the other."""
        return [self.runs[run] for name in names for run in self.groups.get(name, ())]
