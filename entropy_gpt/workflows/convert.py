"""Conversion of a trained GPT-2 to a simpler architecture: plan, simplify, heal, finish, save."""

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.calibration import fingerprint
from entropy_gpt.conversion.errors import ConversionError, NotFiniteError
from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.conversion.planning import Plan, Step, plan_conversion
from entropy_gpt.conversion.simplification import measure_pruning_damage, set_training_fields
from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.evaluation.origin import git_revision, recorded_versions
from entropy_gpt.evaluation.records.conversion_report import ConversionReport, StepRecord
from entropy_gpt.evaluation.records.results import RESULTS, ModelResult, save_results
from entropy_gpt.evaluation.showing.conversion_page import PICTURE, report_markdown
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
    find_context,
    find_target,
    read_text,
)
from .convert_report import describe_conditions, evaluate_result, make_report
from .convert_steps import Calibrator, Measurement, is_naive, record_step, take_step
from .options import read_arguments, with_argument_names
from .output_folder import CONVERSION


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
    freeze_embeddings: bool = False,
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
        freeze_embeddings (`bool`): Whether healing leaves the embeddings as they are, and a head that is tied to them.
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
    conditions = describe_conditions(options, model, "no text", "", original.config.vocab_size, context, 0)
    report = make_report(options, original, model, conditions, started, original_nats=None)
    delete(CONVERSION.content(options.output))  # of an earlier attempt
    _save(options, model.cpu(), None, report, evaluate_result(options, model, report, None, SILENT))
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
    measure = Measurement(original, text, progress)
    calibrator = Calibrator(text, options.calibration or options.work / KEPT_STATISTICS, progress)
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
            model = take_step(step, model, calibrator, measure, records, options.naive)
        model = set_training_fields(model, target)
        healing = None
        if options.heal_steps:
            from .heal import heal  # conversions that train nothing do without accelerate

            begin_step()
            model, healing = heal(options, original, model, calibrator(original), text, progress)
            divergence, *_ = measure(model, "healing")
            records.append(record_step(f"healed, {options.heal_steps:,} steps", model, [divergence], healing.seconds))
        for step in plan.finish:
            begin_step()
            model = take_step(step, model, calibrator, measure, records, options.naive)

    conditions = describe_conditions(
        *(options, model, text.name, text.revision, len(text.tokenizer), text.context),
        sum(batch.numel() - len(batch) for batch in text.validation),
    )
    report = make_report(
        *(options, original, model, conditions, started),
        original_nats=original_nats,
        pruning_damage={str(layer): kl for layer, kl in damage.items()},
        calibration_tokens=text.calibration_tokens,
        steps=records,
        healing=healing,
    )
    result = evaluate_result(options, model, report, text.evaluated, progress)
    _save(options, model.cpu(), text.tokenizer, report, result)


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
        "original": fingerprint(original, text.calibration, None, with_head=True),
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


def _choose_ffns(
    original: EntropyGPTForCausalLM,
    target: EntropyGPTConfig,
    calibrator: Calibrator,
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
