"""The README.md of a model's folder, out of its results and nothing else."""

import math
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from entropy_gpt.evaluation.measuring.operation_counts import ACTIVATION_TITLES, LINEAR_ACTIVATIONS
from entropy_gpt.evaluation.records.conditions import (
    describe_check,
    describe_origin,
    describe_windows,
    harness_facts,
    list_facts,
    list_settings,
)
from entropy_gpt.evaluation.records.results import Architecture, Conditions, ModelResult, PrivateCost, TrainingResult
from modeling_entropy_gpt import EntropyGPTConfig
from modeling_entropy_gpt.releases import TESTED

from .measures import Measure, flops_measures, format_number, head_measures, prediction_measures, task_measure
from .page import escape_markdown


TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
FOLDER = "path/to/this/folder"
PROMPT = "import "
MEGA = 1e6

ATTENTIONS = {
    "softmax": "softmax attention",
    "power4": "attention by fourth powers in place of exponentials, which needs no maximum",
    "power2": "attention by squares in place of exponentials, which needs no maximum",
    "clamped": "softmax attention of clamped scores, which needs no maximum",
}
TEMPERATURES = {
    "none": "",
    "head": " with a learnable temperature for each head",
    "position": " with a learnable temperature for each head and position",
}
NORMS = {"layernorm": "LayerNorm", "static": "a norm that divides by a measured constant", "none": "no norm"}


@dataclass(frozen=True)
class Group:
    """
    Numbers that depend on the same, as the card shows them.

    Args:
        name (`str`): What they are about.
        rows (`list[tuple[str, str]]`): Name and value of each.
        conditions (`str`): What they depend on.
    """

    name: str
    rows: list[tuple[str, str]]
    conditions: str


def model_card(
    result: ModelResult,
    licence: str | None = None,
    repository: str | None = None,
    picture: str | None = None,
    folded: str | None = None,
    folded_from: str | None = None,
    adapter: bool = False,
) -> ModelCard:
    """
    What a model is, how to load it, how it was trained, what was measured, and what it is not for.

    Args:
        result ([`ModelResult`]): All that is known of it.
        licence (`str`, *optional*): Licence of its weights, by the Hub's name for it, such as `"apache-2.0"`.
        repository (`str`, *optional*): Where it loads from, if not from the folder of the card.
        picture (`str`, *optional*): A file next to the card that shows the entropies of its heads.
        folded (`str`, *optional*): A folder next to the card that holds the model folded.
        folded_from (`str`, *optional*): Title of the model that this is the folded one of, and was measured as.
        adapter (`bool`): Whether the folder holds an adapter for PEFT, and the model was measured with it merged in.

    Raises:
        `ValueError`: If it was not measured how it predicts and what its heads do.
    """
    if missing := list_missing(result):
        raise ValueError(
            f"{result.name}: {' and '.join(missing)} are not in its results, and a card shows them. Measure them with "
            "entropy-gpt evaluate."
        )
    architecture = result.architecture
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["entropy-gpt", "private-inference", "custom_code"],
        license=licence,
        base_model=result.training and result.training.base_model,
        model_name=repository or result.name,
        eval_results=list_scores(result),
    )
    return ModelCard.from_template(
        metadata,
        template_path=TEMPLATE,
        title=f"EntropyGPT {escape_markdown(result.title)}",
        notation=escape_markdown(architecture.notation),
        softmax=_config(architecture).attention_function == "softmax",
        words=describe_architecture(architecture),
        sizes={name: f"{size:,}" for name, size in architecture.sizes.items()},
        place=repository or FOLDER,
        prompt=PROMPT,
        transformers=TESTED,
        training=escape_markdown(describe_training(result.training)),
        groups=[_prediction(result), _heads(result), *_tasks(result), _operations(result)],
        picture=picture,
        adapter=adapter,
        folded=folded,
        folded_from=folded_from and escape_markdown(folded_from),
        costs=[_describe_cost(cost) for cost in result.costs],
        cost_origin=escape_markdown(" ".join(dict.fromkeys(map(_cost_origin, result.costs)))),
        licence=_licence(licence),
    )


def list_missing(result: ModelResult) -> list[str]:
    """What a card shows and the result lacks."""
    return [name for name in ("likelihood", "heads") if getattr(result, name) is None]


def describe_architecture(architecture: Architecture) -> str:
    """An architecture in words."""
    config = _config(architecture)
    parts = [
        ATTENTIONS[config.attention_function] + TEMPERATURES[config.attention_temperature],
        f"{NORMS[config.normalization]} in the blocks, {NORMS[architecture.final_normalization]} before the head",
        _describe_ffn(config),
    ]
    if config.weight_normalization is not None:
        parts.append(
            f"{config.weight_normalization} normalisation of {', '.join(config.weight_normalization_targets)}"
        )
    if config.entropy_regularization:
        parts.append("trained with a penalty on the entropies of its attention heads, with a learnable threshold each")
    return "; ".join(parts)


def _config(architecture: Architecture) -> EntropyGPTConfig:
    return EntropyGPTConfig.from_notation(architecture.notation, n_layer=architecture.n_layer)


def describe_training(training: TrainingResult | None) -> str:
    """How a model was trained, as far as it is on record."""
    if training is None:
        return "This is not on record."
    source = "" if training.started_from is None else f" ({training.started_from})"
    came = "From scratch" if training.started_from is None else f"Going on from {training.started_from}"
    if training.converted_from is not None:
        if not training.steps:
            return f"Converted from a trained {training.converted_from}{source}, and not trained since."
        came = f"Converted from a trained {training.converted_from}{source}, and healed"
    text = "" if training.text is None else f", on {training.text}"
    return (
        f"{came}{text}: {training.steps:,} steps, {training.tokens:,} tokens, {training.seconds:,.0f} seconds "
        f"({list_settings(training.hyperparameters)})."
    )


def list_scores(result: ModelResult) -> list[EvalResult]:
    """What the Hub reads from a card; numbers that are not finite are left out, since it takes none."""
    likelihood, conditions = result.likelihood.likelihood, result.likelihood.conditions
    values = {
        "perplexity": ("perplexity per token", likelihood.perplexity),
        "word_perplexity": ("perplexity per word", likelihood.word_perplexity),
        "bits_per_byte": ("bits per byte", likelihood.bits_per_byte),
    }
    scores = [
        _score(
            metric, name, value, conditions.corpus, conditions.corpus_revision, describe_windows(likelihood.windows)
        )
        for metric, (name, value) in values.items()
    ]
    if result.tasks is not None:
        scores += [
            _score(score.metric, score.metric, score.value, score.task, score.task_version, result.tasks.bos)
            for score in result.tasks.scores
        ]
    return [score for score in scores if math.isfinite(score.metric_value)]


def _score(metric: str, name: str, value: float, data: str, revision: str, conditions: str) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=data,
        dataset_name=data,
        dataset_revision=revision,
        metric_type=metric,
        metric_name=name,
        metric_value=value,
        metric_config=conditions,
    )


def _describe_ffn(config: EntropyGPTConfig) -> str:
    if len(config.pruned_ffn_layers) == config.n_layer:
        return "no FFN"
    name = config.activation_function
    between = "nothing" if name in LINEAR_ACTIVATIONS else ACTIVATION_TITLES.get(name, name)
    maps = "one linear map" if config.ffn_type == "fused" else f"two linear maps with {between} between them"
    where = f", in all but layers {', '.join(map(str, config.pruned_ffn_layers))}" if config.pruned_ffn_layers else ""
    scales = ", with learnable scales in their residual sum" if config.ffn_residual_scaling else ""
    return f"FFNs of {maps}{scales}{where}"


def _prediction(result: ModelResult) -> Group:
    likelihood, conditions = result.likelihood.likelihood, result.likelihood.conditions
    return Group(
        "Prediction",
        _rows(prediction_measures([result])),
        escape_markdown(
            f"{_text(conditions)}: {likelihood.tokens:,} tokens, {likelihood.words:,} words, {likelihood.bytes:,} "
            f"bytes, in {describe_windows(likelihood.windows)}. {_origin(conditions)}"
        ),
    )


def _heads(result: ModelResult) -> Group:
    heads, conditions = result.heads.heads, result.heads.conditions
    return Group(
        "Attention heads",
        _rows(head_measures([result])),
        escape_markdown(
            f"{_text(conditions)}: {heads.rows:,} rows of each head, in blocks of {conditions.context:,} tokens. "
            f"Uniform attention has {heads.entropy.maximum:.2f} nats; a head is overloaded from 3/4 of that on, and "
            f"collapsed below a twentieth. {_origin(conditions)}"
        ),
    )


def _tasks(result: ModelResult) -> list[Group]:
    if result.tasks is None or not result.tasks.scores:
        return []
    rows = []
    for score in result.tasks.scores:
        measure = task_measure([result], score.task, score.metric, score.few_shot)
        shown = f"{measure.show(score.value)} {measure.details[0]}".strip()
        rows.append((escape_markdown(f"{score.task}, {score.metric}"), escape_markdown(shown)))
    tasks = result.tasks
    origin = describe_origin(tasks)
    return [Group("Tasks of lm-eval", rows, escape_markdown(f"{list_facts(harness_facts(tasks))}. {origin}."))]


def _operations(result: ModelResult) -> Group:
    """Of a forward pass: what secure computation would have to hide."""
    operations = result.operations
    rows = [
        (f"{operation.name}{where}", escape_markdown(operation.text))
        for where, kinds in (("", operations.nonlinear), (" (around the blocks)", operations.apart))
        for operation in kinds
    ]
    rows += [(f"FLOPs: {measure.title}", measure.show(measure.values[0])) for measure in flops_measures([result])]
    return Group("Operations of a forward pass", rows, f"Counted for {operations.context:,} tokens.")


def _rows(measures: list[Measure]) -> list[tuple[str, str]]:
    return [(escape_markdown(measure.title), measure.show(measure.values[0])) for measure in measures]


def _text(conditions: Conditions) -> str:
    return f"On {conditions.corpus} ({conditions.corpus_revision})"


def _origin(conditions: Conditions) -> str:
    seed = "" if conditions.seed is None else f"seed {conditions.seed}, "
    origin = describe_origin(conditions)
    return f"Vocabulary of {conditions.vocab_size:,}; {seed}{conditions.dtype}; {origin}."


def _describe_cost(cost: PrivateCost) -> dict[str, str]:
    return {
        "protocol": escape_markdown(cost.protocol),
        "prompt": f"{cost.context:,}",
        "answers": f"{cost.answers:,}",
        "megabytes": f"{cost.total_bytes / MEGA:,.1f}",
        "rounds": f"{cost.rounds:,}",
        "seconds": format_number(cost.seconds),
        "network": escape_markdown(cost.network),
        "agreement": "It was not compared with the clear."
        if cost.check is None
        else f"Compared with the clear: {describe_check(cost.check)}.",
    }


def _cost_origin(cost: PrivateCost) -> str:
    return f"Measured with {describe_origin(cost)}."


def _licence(licence: str | None) -> str:
    code = "The Python files: Apache-2.0."
    weights = "no licence was stated" if licence is None else licence
    return f"{code} The weights: {escape_markdown(weights)}."
