"""Conversion of a trained GPT-2 to a simpler architecture: plan, simplify, heal, finish, save."""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.calibration import Calibration, calibrate, fingerprint
from entropy_gpt.conversion.divergence import Divergence, Reference
from entropy_gpt.conversion.errors import ConversionError, NotFiniteError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.simplification import (
    Plan,
    Step,
    measure_pruning_damage,
    plan_conversion,
    set_training_fields,
)
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.origin import collect_origin, git_revision, peak_memory, recorded_versions
from entropy_gpt.evaluation.records.conversion_report import ConversionReport, StepRecord
from entropy_gpt.evaluation.records.measurement import MeasuredText, describe_model, measure_model
from entropy_gpt.evaluation.records.results import RESULTS, Conditions, ModelResult, TrainingResult, save_results
from entropy_gpt.evaluation.showing.conversion_page import PICTURE, format_perplexity, report_markdown
from entropy_gpt.training.claims import claimed
from entropy_gpt.training.errors import DivergedError
from entropy_gpt.training.files import begun_move, delete, empty_folder, put_in_place, written_whole
from entropy_gpt.training.library_bars import library_bars_hidden
from entropy_gpt.training.model_tokenizer import has_tokenizer
from entropy_gpt.training.progress import SILENT, Progress
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .convert_inputs import (
    CHECKPOINTS,
    KEPT_STATISTICS,
    REPORT,
    ConversionOptions,
    Text,
    check_amount,
    check_options,
    check_output,
    find_base_model,
    find_context,
    find_target,
    name_source,
    read_text,
)
from .options import read_arguments, with_argument_names
from .output_folder import CONVERSION


# What an exact step is checked on: sequences, and tokens of each. And the KL, in nats per token, that rounding leaves.
SAMPLE_SEQUENCES, SAMPLE_TOKENS = 4, 128
LARGEST_ROUNDING = 1e-6


@dataclass(frozen=True)
class Conversion:
    """
    A conversion that was checked and can begin.

    Args:
        options ([`ConversionOptions`]): The options.
        original ([`EntropyGPTForCausalLM`]): The model to convert, in float32, on the GPU if there is one.
        target ([`EntropyGPTConfig`]): The configuration to convert it to.
    """

    options: ConversionOptions
    original: EntropyGPTForCausalLM
    target: EntropyGPTConfig

    @property
    def plan(self) -> Plan:
        """The steps from the original to the target."""
        return plan_conversion(self.original.config, self.target)


@with_argument_names
def convert(
    source: str | Path,
    *,
    to: str,
    output: str | Path,
    text: str | Path | None = None,
    split: str = "train",
    config: str | None = None,
    text_column: str = "text",
    tokenizer: str | Path | None = None,
    eos_token: str | None = None,
    activation: str | None = None,
    final_norm: str | None = None,
    settings: Mapping[str, Any] | None = None,
    prune_by_damage: bool = False,
    naive: bool = False,
    context: int | None = None,
    calibration_tokens: int = 65536,
    evaluation_tokens: int = 16384,
    calibration: str | Path | None = None,
    heal_steps: int = 0,
    schedule: str = "none",
    distill: bool = False,
    distill_temperature: float = 1.0,
    hidden_state_weight: float = 0.0,
    residual_scale_weight: float = 0.0,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> ConversionReport:
    """
    Converts a trained GPT-2 to a simpler architecture, step by step, as `entropy-gpt convert` does.

    Each step is fitted to text and measured against the original on other text, next to its naive version: weights
    copied, nothing fitted. Healing trains the result. An interrupted conversion continues when it is called again
    with the same arguments. The result is evaluated on text kept apart, for its card.

    Args:
        source (`str` or `Path`): A GPT-2 or EntropyGPT: a folder, a repository on the Hub, or a nanoGPT checkpoint.
        to (`str`): The target architecture in the paper's notation, such as `"EReg(SM(t)+ScFuFFN)"`.
        output (`str` or `Path`): The folder for model, tokenizer and report.
        text (`str` or `Path`, *optional*):
            Text similar to the training text of the source: a text or data file (JSON lines, CSV, TSV, Parquet), a
            folder of such, or a data set on the Hub. Default: Python's standard library.
        split, config, text_column (`str`): The split, configuration and column of a data set.
        tokenizer (`str` or `Path`, *optional*):
            The tokenizer's folder, file or repository. Default: the source. Not needed where the text is not.
        eos_token (`str`, *optional*): The tokenizer's token for the end of a text, if it names none itself.
        activation (`str`, *optional*):
            The activation function of a nanoGPT file: `"gelu"` (default) or `"gelu_new"`, the approximation by tanh
            that nanoGPT used before June 2023.
        final_norm (`str`, *optional*):
            The norm before the head: `"layernorm"`, `"static"` or `"none"`. Default: that of the source.
        settings (`dict`, *optional*):
            Configuration fields that act only in training, such as `{"resid_pdrop": 0.0}`.
        prune_by_damage (`bool`): Prune as many FFNs as `to` says, but those whose removal does the least damage.
        naive (`bool`): Copy weights and fit no norm and no linear map, to measure what fitting gains.
        context (`int`, *optional*): Tokens of a sequence. Default: the model's positions, up to 1024.
        calibration_tokens (`int`): Tokens that the steps are fitted to.
        evaluation_tokens (`int`): Tokens that each step is measured on, and the result is evaluated on.
        calibration (`str` or `Path`, *optional*):
            A folder that keeps the statistics of the source, so that another conversion of it need not collect them.
        heal_steps (`int`): Optimiser steps of healing; 0 heals nothing.
        schedule (`str`):
            When healing removes: `"none"` before its first step, `"gate"` gradually and everywhere at once,
            `"staircase"` one part after another.
        distill (`bool`): Whether healing also learns from the original's predictions, at equal weight.
        distill_temperature (`float`): The temperature of these predictions.
        hidden_state_weight (`float`): Weight of the distance to the original's residual stream.
        residual_scale_weight (`float`): Weight of the loss that holds the residual stream's scale, for a static or
            missing norm before the head.
        learning_rate (`float`): Peak learning rate of healing: 5 % warm-up, then linear decay.
        batch_size (`int`): Sequences of a healing step.
        seed (`int`): Seed of the order of the healing text.
        overwrite (`bool`): Whether to replace an earlier conversion in `output`.
        progress (`Progress`): Follows the stages of the work; by default nobody does.

    Returns:
        [`ConversionReport`]: What each step cost, what healing gained, and under which conditions; also saved as
        `conversion_report.json` in `output`.

    Raises:
        `UserError`: If an argument, the source, the text or the output can't be used. Messages name the
            option of the command and the argument: `--heal-steps` is `heal_steps`.
        `DivergedError`: If healing diverges, or predictions are not finite after a step.

    Example:

    ```python
    import entropy_gpt

    report = entropy_gpt.convert(
        "openai-community/gpt2", to="EReg(SM(t)+ScFuFFN)", text="my_texts", output="my_model", heal_steps=1000
    )
    print([(step.title, step.kl) for step in report.steps])
    ```
    """
    options = read_arguments(ConversionOptions, locals())
    return perform(prepare(options, progress), progress)


@library_bars_hidden()
def prepare(options: ConversionOptions, progress: Progress) -> Conversion:
    """
    Checks the options, loads the model and finds its target. Writes nothing.

    Raises:
        `UserError`: If the options, the source, the target or the output can't be used.
    """
    check_options(options)
    check_output(options)
    with progress.stage("loading the model") as line:
        original = load_language_model(options.source, options.activation).float()
        original.to("cuda" if torch.cuda.is_available() else "cpu")
        line.say(f"{original.config.notation}, {original.num_parameters():,} parameters")
    target = find_target(original.config, options)
    plan_conversion(original.config, target)  # to refuse a target that no steps lead to
    return Conversion(options, original, target)


@library_bars_hidden()
def perform(conversion: Conversion, progress: Progress) -> ConversionReport:
    """
    Converts, and leaves the output folder.

    Raises:
        `UserError`: If the text can't be used.
        `DivergedError`: If healing diverges, or predictions are not finite after a step.
    """
    options = conversion.options
    with claimed(options.work, lambda: _goes_on(options), options.output):
        check_output(options)  # another command may have written there meanwhile
        if not _needs_text(conversion):
            if options.text is not None:
                raise ConversionError(f"--text {options.text} has no effect without a --tokenizer: give both.")
            return _import(conversion)
        text = read_text(options, conversion.original.config, progress)
        try:
            return convert_with_text(conversion, text, progress)
        except NotFiniteError as error:
            raise DivergedError(str(error)) from error


def _needs_text(conversion: Conversion) -> bool:
    """Nothing is fitted where no step is taken, and nothing can be measured without a tokenizer."""
    options = conversion.options
    takes_steps = bool(conversion.plan.steps or options.heal_steps)
    return takes_steps or options.tokenizer is not None or has_tokenizer(options.source)


def _import(conversion: Conversion) -> ConversionReport:
    """Saves a model whose architecture stays as it is, without a tokenizer; nothing is measured."""
    options, original = conversion.options, conversion.original
    started = time.perf_counter()
    model = set_training_fields(original, conversion.target)
    context = find_context(options, original.config)
    conditions = _describe_conditions(options, model, "no text", "", original.config.vocab_size, context, 0)
    report = _make_report(options, original, model, conditions, started, original_nats=None)
    delete(CONVERSION.content(options.output))  # of an earlier attempt
    _save(options, model.cpu(), None, report, _evaluate(options, model, report, None, SILENT))
    return _put_in_place(options)


def convert_with_text(conversion: Conversion, text: Text, progress: Progress) -> ConversionReport:
    """
    Converts a model with text that is already tokenised, and leaves the output folder.

    Raises:
        `ConversionError`: If no steps lead to the target, there is too little text, or predictions are not finite.
        `DivergedError`: If healing diverges.
    """
    options = conversion.options
    check_amount(text, conversion.original, conversion.plan)
    _begin_work(options, conversion.original, text, progress)
    if not _is_complete(options):
        try:
            _convert(options, conversion.original, conversion.target, text, progress)
        except ConversionError:  # the next attempt would end the same way
            delete(options.work)
            raise
    return _put_in_place(options)


def _put_in_place(options: ConversionOptions) -> ConversionReport:
    """Moves everything from the folder of unfinished work to the output folder, and deletes the former."""
    put_in_place(CONVERSION.content(options.output), options.output, last=CONVERSION.record)
    delete(options.work)
    return ConversionReport.load(options.output / CONVERSION.record)


def _is_complete(options: ConversionOptions) -> bool:
    """Whether an earlier attempt has left everything, and was interrupted while it put that in place."""
    content = CONVERSION.content(options.output)
    return content.exists() or begun_move(content).exists()


def _goes_on(options: ConversionOptions) -> bool:
    """Whether the folder of unfinished work holds more than settings."""
    return any((options.work / name).exists() for name in (KEPT_STATISTICS, CHECKPOINTS)) or _is_complete(options)


def _convert(
    options: ConversionOptions,
    original: EntropyGPTForCausalLM,
    target: EntropyGPTConfig,
    text: Text,
    progress: Progress,
):
    """Leaves everything that the output is going to hold in the folder of unfinished work."""
    started = time.perf_counter()
    measure = _Measurement(original, text, progress)
    calibrator = _Calibrator(text, options.calibration or options.work / KEPT_STATISTICS, progress)
    original_nats = measure(original, "the original")[0].nats

    damage = {}
    if options.prune_by_damage:
        target, damage = _choose_ffns(original, target, calibrator, text, progress)
    plan = plan_conversion(original.config, target)
    records: list[StepRecord] = []
    model = original
    with _counted_steps(plan, options, text, progress) as begin_step:
        for step in plan.simplifications:
            begin_step()
            model = _take(step, model, calibrator, measure, records, options.naive)
        model = set_training_fields(model, target)
        healing = None
        if options.heal_steps:
            from .heal import heal  # conversions that train nothing do without accelerate

            begin_step()
            model, healing = heal(options, original, model, calibrator(original), text, progress)
            divergence, *_ = measure(model, "healing")
            records.append(_record(f"healed, {options.heal_steps:,} steps", model, [divergence], healing.seconds))
        for step in plan.finish:
            begin_step()
            model = _take(step, model, calibrator, measure, records, options.naive)

    conditions = _describe_conditions(
        *(options, model, text.name, text.revision, len(text.tokenizer), text.context),
        sum(batch.numel() - len(batch) for batch in text.validation),
    )
    report = _make_report(
        *(options, original, model, conditions, started),
        original_nats=original_nats,
        pruning_damage={str(layer): kl for layer, kl in damage.items()},
        calibration_tokens=text.calibration_tokens,
        steps=records,
        healing=healing,
    )
    result = _evaluate(options, model, report, text.evaluated, progress)
    _save(options, model.cpu(), text.tokenizer, report, result)


def _evaluate(
    options: ConversionOptions,
    model: EntropyGPTForCausalLM,
    report: ConversionReport,
    text: MeasuredText | None,
    progress: Progress,
) -> ModelResult:
    """The model's entry in `results.json`; without text, what it is and how it was made."""
    name, training = options.output.name, _describe_training(options, report)
    if text is not None:
        return measure_model(model, name, text, training, options.seed, progress)
    width = report.conditions.context - 1
    result = describe_model(model, name, Windows(width, width, separate=False, bos=False))
    return replace(result, training=training)


def _describe_conditions(
    options: ConversionOptions,
    model: EntropyGPTForCausalLM,
    corpus: str,
    revision: str,
    vocab_size: int,
    context: int,
    evaluated_tokens: int,
) -> Conditions:
    return Conditions(
        corpus=corpus,
        corpus_revision=revision,
        vocab_size=vocab_size,
        context=context,
        evaluated_tokens=evaluated_tokens,
        dtype=str(model.dtype).removeprefix("torch."),
        seed=options.seed,
        **collect_origin(model.device),
    )


def _make_report(
    options: ConversionOptions,
    original: EntropyGPTForCausalLM,
    model: EntropyGPTForCausalLM,
    conditions: Conditions,
    started: float,
    **measured,
) -> ConversionReport:
    """The report with what both models are, and what was `measured`: the other fields of a [`ConversionReport`]."""
    return ConversionReport(
        source=options.source,
        source_notation=original.config.notation,
        target_notation=model.config.notation,
        source_final_normalization=original.config.final_normalization,
        target_final_normalization=model.config.final_normalization,
        original_parameters=original.num_parameters(),
        source_operations=count_operations(original.config, conditions.context),
        target_operations=count_operations(model.config, conditions.context),
        naive=options.naive,
        seconds=time.perf_counter() - started,
        peak_memory_bytes=peak_memory(),
        conditions=conditions,
        **measured,
    )


@contextmanager
def _counted_steps(
    plan: Plan, options: ConversionOptions, text: Text, progress: Progress
) -> Iterator[Callable[[], None]]:
    """A stage over all steps, by the tokens that go through a model; yields what is called as each step begins."""
    # A backward pass takes as long as two forward passes.
    healing = 3 * options.heal_steps * options.batch_size * text.context
    work = [_count_tokens(step, options, text) for step in plan.simplifications]
    work += [healing] * bool(healing) + [_count_tokens(step, options, text) for step in plan.finish]
    numbers = itertools.count()
    with progress.stage("all steps of the conversion", sum(work)) as line:

        def begin_step():
            number = next(numbers)
            line.reach(sum(work[:number]))
            line.say(f"step {number + 1} of {len(work)}")

        yield begin_step


def _count_tokens(step: Step, options: ConversionOptions, text: Text) -> int:
    """Tokens that go through a model for a step: it is fitted, and measured with its naive version."""
    alone = is_naive(step, options.naive)
    measured = sum(batch.numel() for batch in text.validation) * (1 if alone or step.naive is None else 2)
    return measured + text.calibration_tokens * (step.calibrated and not alone)


def _begin_work(options: ConversionOptions, original: EntropyGPTForCausalLM, text: Text, progress: Progress):
    """Makes the folder of unfinished work. One that an equal conversion left is kept; any other is deleted first."""
    settings = {
        **{name: str(value) for name, value in vars(options).items()},
        "original": fingerprint(original, text.calibration, None),
        "corpus": text.revision,
        "versions": recorded_versions(),
        "git_revision": git_revision(),
    }
    notes = options.work / "settings.json"
    if notes.exists() and notes.read_text(encoding="utf-8") == json.dumps(settings):
        with progress.stage("resuming earlier work"):
            return
    if begun_move(CONVERSION.content(options.output)).exists():
        empty_folder(options.output)
    if options.work.exists():
        empty_folder(options.work)
    with written_whole(notes) as path:
        path.write_text(json.dumps(settings), encoding="utf-8")


class _Measurement:
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


class _Calibrator:
    """Collects the statistics of models, or loads those that were kept in a folder."""

    def __init__(self, text: Text, folder: Path, progress: Progress):
        self.batches, self.folder, self.progress = text.calibration, folder, progress

    def __call__(self, model: EntropyGPTForCausalLM, hidden_activation: str | None = None) -> Calibration:
        path = self.folder / f"{fingerprint(model, self.batches, hidden_activation)}.safetensors"
        if not path.exists():
            with self.progress.stage("calibrating", sum(map(len, self.batches))) as line:
                calibration = calibrate(model, self.batches, hidden_activation, line.advance)
            with written_whole(path) as temporary:
                calibration.save(temporary)
        return Calibration.load(path)


def _take(
    step: Step,
    model: EntropyGPTForCausalLM,
    calibrator: _Calibrator,
    measure: _Measurement,
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
        calibration = calibrator(model, step.hidden_activation) if step.calibrated else None
        simpler = step.apply(model, calibration)
    seconds = time.perf_counter() - started
    others = [] if alone or step.naive is None else [step.naive(model)]
    if kept := step.exact and measure.is_kept(model, simpler):
        divergences = [measure.last, *measure.naive(others, step.title)]
    else:
        divergences = measure(simpler, step.title, *others)
    records.append(_record(step.title, simpler, divergences, seconds, kept))
    return simpler


def is_naive(step: Step, wanted: bool) -> bool:
    """
    Whether a step is taken in its naive version alone, if that is wanted. Thresholds have none: they are always
    measured, and change no prediction.
    """
    return wanted and step.calibrated and step.naive is not None


def _record(
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


def _choose_ffns(
    original: EntropyGPTForCausalLM,
    target: EntropyGPTConfig,
    calibrator: _Calibrator,
    text: Text,
    progress: Progress,
) -> tuple[EntropyGPTConfig, dict[int, float]]:
    """
    Finds the FFNs whose pruning does the least damage on calibration text.

    Returns:
        The target with these FFNs pruned, and the damage by layer: KL to the original, in nats per token.
    """
    calibration = calibrator(original)
    batches = text.calibration[:: max(1, len(text.calibration) // len(text.validation))]
    with progress.stage("measuring each FFN", sum(map(len, batches))) as line:
        damage = measure_pruning_damage(original, batches, calibration, line.advance)
    pruned = original.config.pruned_ffn_layers
    least = sorted(damage, key=damage.get)[: len(target.pruned_ffn_layers) - len(pruned)]
    target = copy.deepcopy(target)
    target.pruned_ffn_layers = sorted([*pruned, *least])
    return target, damage


def _save(
    options: ConversionOptions,
    model: EntropyGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast | None,
    report: ConversionReport,
    result: ModelResult,
):
    with written_whole(CONVERSION.content(options.output)) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        report.save(folder / CONVERSION.record)
        save_results([result], folder / RESULTS)
        (folder / f"{REPORT}.md").write_text(report_markdown(report), encoding="utf-8")
        if report.healing is not None and find_spec("matplotlib"):
            from entropy_gpt.evaluation.showing.plots import plot_healing

            plot_healing(report).savefig(folder / PICTURE, format="png")


def _describe_training(options: ConversionOptions, report: ConversionReport) -> TrainingResult:
    """How the model was made, for its entry in `results.json`."""
    conditions, healing = report.conditions, report.healing
    return TrainingResult(
        steps=healing.steps if healing else 0,
        tokens=healing.tokens if healing else 0,
        seconds=healing.seconds if healing else 0.0,
        hyperparameters={**(healing.settings if healing else {}), **({"fitted": False} if report.naive else {})},
        converted_from=report.source_notation,
        text=f"{conditions.corpus} ({conditions.corpus_revision})" if conditions.corpus_revision else None,
        started_from=name_source(options.source),
        base_model=find_base_model(options.source),
    )
