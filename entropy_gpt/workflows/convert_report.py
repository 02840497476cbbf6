"""What a conversion leaves on record: its report, its conditions, and the evaluation of its result."""

import time
from dataclasses import replace

from entropy_gpt.evaluation.measuring.operation_counts import count_operations
from entropy_gpt.evaluation.measuring.perplexity import Windows
from entropy_gpt.evaluation.origin import collect_origin, peak_memory
from entropy_gpt.evaluation.records.conversion_report import ConversionReport
from entropy_gpt.evaluation.records.measurement import MeasuredText, describe_model, measure_model
from entropy_gpt.evaluation.records.results import Conditions, ModelResult, TrainingResult
from entropy_gpt.training.progress import Progress
from modeling_entropy_gpt import EntropyGPTForCausalLM

from .convert_inputs import ConversionOptions, find_base_model, name_source


def evaluate_result(
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


def describe_conditions(
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


def make_report(
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
