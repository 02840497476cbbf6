"""Steps of a conversion: fitted to statistics, taken, and measured against the original."""

import time
from pathlib import Path

from entropy_gpt.conversion.calibration import Calibration, calibrate, fingerprint
from entropy_gpt.conversion.divergence import Divergence, Reference
from entropy_gpt.conversion.errors import NotFiniteError
from entropy_gpt.conversion.planning import Step
from entropy_gpt.evaluation.records.conversion_report import StepRecord
from entropy_gpt.evaluation.showing.conversion_page import format_perplexity
from entropy_gpt.training.files import written_whole
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .convert_inputs import Text


# What an exact step is checked on: sequences, and tokens of each. And the KL, in nats per token, that rounding leaves.
SAMPLE_SEQUENCES, SAMPLE_TOKENS = 4, 128
LARGEST_ROUNDING = 1e-6


class Measurement:
    """Compares models with the original on validation text."""

    def __init__(self, original: EntropyGPTForCausalLM, text: Text, progress: Progress):
        self.reference, self.progress = Reference(original, text.validation), progress
        self.sample = text.validation[0][:SAMPLE_SEQUENCES, :SAMPLE_TOKENS]
        self.last: Divergence | None = None

    def __call__(self, model: EntropyGPTForCausalLM, after: str, *others: EntropyGPTForCausalLM) -> list[Divergence]:
        with self.progress.stage(f"measuring {after}", sum(map(len, self.reference.batches))) as line:
            found = self.reference.compare([model, *others], line.advance)
            line.say(f"KL {found[0].kl:.4f}, perplexity {format_perplexity(found[0].nats)}")
        if not found[0].is_finite:
            raise NotFiniteError(f"After {after}, the model's predictions are not finite: choose another target.")
        self.last = found[0]
        return found

    def naive(self, models: list[EntropyGPTForCausalLM], of: str) -> list[Divergence]:
        """What the naive versions of a step cost, if there are any."""
        if not models:
            return []
        with self.progress.stage(f"measuring {of}, naively", sum(map(len, self.reference.batches))) as line:
            return self.reference.compare(models, line.advance)

    def is_kept(self, before: EntropyGPTForCausalLM, after: EntropyGPTForCausalLM) -> bool:
        """Whether a step has kept the predictions on a sample of the text, up to rounding."""
        return Reference(before, [self.sample]).compare([after])[0].kl < LARGEST_ROUNDING


class Calibrator:
    """Collects the statistics of models, or loads those that were kept in a folder."""

    def __init__(self, text: Text, folder: Path, progress: Progress):
        self.batches, self.folder, self.progress = text.calibration, folder, progress

    def __call__(
        self, model: EntropyGPTForCausalLM, hidden_activation: str | None = None, largest_scores: bool = False
    ) -> Calibration:
        path = self.folder / f"{fingerprint(model, self.batches, hidden_activation, largest_scores)}.safetensors"
        if not path.exists():
            with self.progress.stage("calibrating", sum(map(len, self.batches))) as line:
                calibration = calibrate(model, self.batches, hidden_activation, largest_scores, line.advance)
            with written_whole(path) as temporary:
                calibration.save(temporary)
        return Calibration.load(path)


def take_step(
    step: Step,
    model: EntropyGPTForCausalLM,
    calibrator: Calibrator,
    measure: Measurement,
    records: list[StepRecord],
    naive: bool,
) -> EntropyGPTForCausalLM:
    """
    Takes a step, measures it with its naive version, and adds the record. An exact step is checked on a sample of the
    text, and measured only if the check fails.

    Args:
        step ([`Step`]): The step.
        model ([`EntropyGPTForCausalLM`]): The model before it.
        calibrator: Gives the statistics to fit to.
        measure: Compares with the original.
        records (`list[StepRecord]`): The records so far; one is added.
        naive (`bool`): Whether a step that could be fitted is taken in its naive version alone.

    Returns:
        [`EntropyGPTForCausalLM`]: The model after it.
    """
    started = time.perf_counter()
    alone = is_naive(step, naive)
    if alone:
        simpler = step.naive(model)
    else:
        calibration = calibrator(model, step.hidden_activation, step.largest_scores) if step.calibrated else None
        simpler = step.apply(model, calibration)
    seconds = time.perf_counter() - started
    others = [] if alone or step.naive is None else [step.naive(model)]
    if kept := step.exact and measure.is_kept(model, simpler):
        divergences = [measure.last, *measure.naive(others, step.title)]
    else:
        divergences = measure(simpler, step.title, *others)
    records.append(record_step(step.title, simpler, divergences, seconds, kept))
    return simpler


def is_naive(step: Step, wanted: bool) -> bool:
    """
    Whether a step is taken in its naive version alone, if that is wanted. Thresholds have none: they are always
    measured, and change no prediction.
    """
    return wanted and step.calibrated and step.naive is not None


def record_step(
    title: str, model: EntropyGPTForCausalLM, divergences: list[Divergence], seconds: float, kept: bool = False
) -> StepRecord:
    found, *naive = divergences
    is_finite = bool(naive) and naive[0].is_finite
    return StepRecord(
        title=title,
        kl=found.kl,
        nats=found.nats,
        naive_kl=naive[0].kl if is_finite else None,
        naive_nats=naive[0].nats if is_finite else None,
        naive_diverged=bool(naive) and not is_finite,
        parameters=model.num_parameters(),
        seconds=seconds,
        kept=kept,
    )
