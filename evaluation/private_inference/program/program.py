"""
The model as a sequence of steps that both parties run: what each computes, from which variables, into which.

A step is a function of tensors, written once for JAX (from which the engine's code is compiled) and for numpy (which
emulates the ring). One step is one operation of one layer, so that its traffic can be measured apart; equal steps of
different layers are compiled once. The weights are inputs, never constants: constants are public.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from typing import Literal, Self

import numpy as np
from pydantic.dataclasses import dataclass as record

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD

from .arithmetic import Arithmetic, alternate, checksum
from .attention import (
    divide_and_merge,
    divide_visible,
    divide_widely_and_merge,
    scale_queries,
    scale_scores,
    score,
    score_shifted,
    score_visible,
    score_visible_shifted,
    split_heads,
    visible_weights,
    weigh_and_merge,
    weigh_divided_and_merge,
    weigh_visible,
    whole_attention,
    whole_softmax,
)
from .attention_functions import LEAST_SUM, MOST_SUM
from .contests import choose_levels, subtract_maximum
from .division import choose_division
from .linear import (
    add_linear,
    add_linear_to_scaled,
    begin_stream,
    choose,
    compute_logits,
    draw,
    embed,
    linear,
    normalize,
)
from .nonlinear import (
    erf_gelu,
    exponentiate,
    fine_gelu,
    leaky_relu,
    learnable_leaky_relu,
    piecewise_gelu,
    relu,
    tanh_gelu,
)
from .reciprocals import reciprocal_by_chords
from .settings import PrivateSettings
from .steps import Span, Step
from .visible import put_apart, visible_keys


# As the model's layers have them, which an engine's process does not import: that would take seconds and torch.
TANH_GELUS = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh")
ACTIVATIONS = (*TANH_GELUS, "gelu", "relu", "leaky_relu", "learnable_leaky_relu", "identity", "linear")
Norm = Literal["layernorm", "static", "none"]

# The weights that embed tokens and positions.
TABLES = ("wte", "wpe")
# The inputs and outputs of the whole. Both parties learn the last one, whether numbers were out of range.
TOKENS, EMBEDDINGS, LOGITS, TOKEN, OUT_OF_RANGE = "tokens", "embeddings", "logits", "token", "out of range"
# What the client adds to the logits, where the token is drawn.
NOISE = "noise"
# The residual stream: rows of numbers with their checksum behind, which is computed apart in each product that is
# added to the stream.
STREAM, LOGITS_CHECKSUM = "hidden", "logits checksum"
# What the check looks at: the residual stream before and after the last block, and the logits. Sums of this many
# neighbours are compared with bounds, each in two comparisons, and so is what each row's checksum is off by. The first
# has a row for every token. It looks at scores too, by `checked_parts`: softmax brings any scores back into range.
CHECKED = {"before": 8, "after": 1, LOGITS: 64}


@record(config=RECORD, frozen=True)
class ProgramConfig:
    """
    What a program depends on of an [`EntropyGPTConfig`], under the same names: numbers and words, which need neither
    torch nor transformers. What takes a `ProgramConfig` takes the whole configuration too.
    """

    n_layer: int
    n_embd: int
    n_head: int
    n_positions: int
    vocab_size: int
    inner_size: int
    ffn_type: Literal["mlp", "fused"]
    ffn_residual_scaling: bool
    pruned_ffn_layers: list[int]
    activation_function: str
    normalization: Norm
    final_normalization: Norm
    layer_norm_epsilon: float
    attention_temperature: Literal["none", "head", "position"]
    attention_function: Literal["softmax", "power4", "power2", "clamped"]

    @classmethod
    def of(cls, config) -> Self:
        """Out of the whole configuration."""
        return cls(**{part.name: getattr(config, part.name) for part in fields(cls)})


def check_config(config: ProgramConfig):
    """
    Raises:
        `PrivateInferenceError`: If the program does not know an operation of the architecture.
    """
    if config.activation_function not in ACTIVATIONS and len(config.pruned_ffn_layers) < config.n_layer:
        raise PrivateInferenceError(
            f"activation_function={config.activation_function!r} has no private form; there are those of "
            f"{', '.join(ACTIVATIONS)}. Convert the model to one of them (entropy-gpt convert)."
        )


def weight_shapes(config: ProgramConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what [`prepare_weights`] makes, from its config alone: all that a client knows of them."""
    width, inner, vocabulary = config.n_embd, config.inner_size, config.vocab_size
    shapes = {"wte": (vocabulary, width), "wpe": (config.n_positions, width)}
    for layer in range(config.n_layer):
        maps = {"qkv": (width, 3 * width), "output": (width, width)}
        if layer not in config.pruned_ffn_layers:
            if config.ffn_type == "mlp":
                maps["ffn_in"] = (width, inner)
            maps["ffn"] = (inner if config.ffn_type == "mlp" else width, width)
        for name, shape in maps.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        if config.attention_temperature == "position":
            shapes[f"h.{layer}.inverse_temperature"] = (config.n_head, config.n_positions)
        if config.attention_function != "softmax":
            shapes[f"h.{layer}.shift"] = (config.n_head, config.n_positions)
        if layer in config.pruned_ffn_layers:
            continue
        if config.ffn_type == "mlp" and config.activation_function == "learnable_leaky_relu":
            shapes[f"h.{layer}.slope"] = (1,)
        if config.ffn_residual_scaling:
            shapes[f"h.{layer}.beta"] = (1,)
    shapes |= {"head.weight": (width, vocabulary), "head.bias": (vocabulary,)}
    for part, count in CHECKED.items():
        shapes[bounds_name(part)] = (math.ceil((vocabulary if part == LOGITS else width) / count),)
        shapes[bounds_name(checksum_name(part))] = (1,)
    return shapes | {bounds_name(scores_name(layer)): (config.n_head,) for layer in range(config.n_layer)}


def scores_name(layer: int) -> str:
    """The scores of a layer as a part of what the check looks at."""
    return f"h.{layer}.scores"


def is_scores(part: str) -> bool:
    """Whether one of [`checked_parts`] is the scores of a layer."""
    return part.endswith(".scores")


def checksum_name(part: str) -> str:
    """What the checksums of one of `CHECKED` are off by, as a part of what the check looks at."""
    return f"{part}.checksum"


def checked_parts(config: ProgramConfig) -> list[str]:
    """All that the check looks at."""
    return [*CHECKED, *map(checksum_name, CHECKED), *map(scores_name, range(config.n_layer))]


def is_factor(name: str) -> bool:
    """Whether a variable is a weight that others are multiplied by; the rest of the weights are added."""
    return name == "wte" or name.endswith((".weight", ".slope", ".beta", ".inverse_temperature"))


def sums_name(part: str) -> str:
    """The variable with the sums of one of [`checked_parts`]."""
    return f"sums.{part}"


def bounds_name(part: str) -> str:
    """The weight with the bounds of these sums."""
    return f"bounds.{part}"


def tables_bytes(vocab_size: int, n_positions: int, n_embd: int) -> int:
    """Bytes of the embeddings in single precision, the most that is sent to a client with "client_table"."""
    return (vocab_size + n_positions) * n_embd * np.dtype(np.float32).itemsize


def build_steps(config: ProgramConfig, settings: PrivateSettings, span: Span, prepared: bool = False) -> list[Step]:
    """
    The program for some tokens: from "tokens" (one-hot rows) or "embeddings" to "logits" or "token". The keys and
    values of each layer stay in variables, for the tokens that follow.

    Args:
        config ([`ProgramConfig`]): That of [`prepare_weights`].
        settings ([`PrivateSettings`]): The form of each operation.
        span ([`Span`]): The tokens.
        prepared (`bool`): Whether products are prepared. Then they are the same ones for shorter spans.

    Raises:
        `PrivateInferenceError`: If the model has fewer positions, or an operation has no private form.
    """
    check_config(config)
    if not span.length >= 1 or span.end > config.n_positions:
        raise PrivateInferenceError(
            f"{span.end} tokens are not possible: this model has n_positions={config.n_positions}. Shorten the prompt "
            "or generate less."
        )
    return list(_steps(config, settings, span, prepared))


def _steps(config: ProgramConfig, settings: PrivateSettings, span: Span, prepared: bool) -> Iterator[Step]:
    if settings.embeds_at_home:
        yield Step("check", None, begin_stream, (EMBEDDINGS,), (STREAM,))
    else:
        yield Step("embedding", None, partial(embed, span=span), (TOKENS, "wte", "wpe"), (STREAM,))
    before, after, _ = CHECKED
    for layer in range(config.n_layer):
        if layer == config.n_layer - 1:
            yield _sum_up((STREAM,), before)
        # What the last block finds out about the tokens before the answers, nobody asks for.
        queries = span.answers if layer == config.n_layer - 1 else span.length
        yield from _attention(config, settings, span, queries, layer, prepared)
        if layer not in config.pruned_ffn_layers:
            yield from _ffn(config, settings, layer)
    yield _sum_up((STREAM,), after)
    read, norm = _norm(config.final_normalization, config, None)
    yield from norm
    yield Step("head", None, compute_logits, (read, "head.weight", "head.bias"), (LOGITS, LOGITS_CHECKSUM))
    if settings.answer == "token":
        yield Step("argmax", None, choose, (LOGITS,), (TOKEN,))
    elif settings.answer == "sampled":
        yield Step("argmax", None, draw, (LOGITS, NOISE), (TOKEN,))
    yield _sum_up((LOGITS, LOGITS_CHECKSUM), LOGITS)
    inputs = tuple(name(part) for part in checked_parts(config) for name in (sums_name, bounds_name))
    attention_sums = tuple(f"h.{layer}.sums" for layer in range(config.n_layer) if _keeps_sums(config, settings))
    check = partial(find_out_of_range, attention_sums=len(attention_sums))
    yield Step("check", None, check, (*inputs, *attention_sums), (OUT_OF_RANGE,))


def _sum_up(variables: tuple[str, ...], part: str) -> Step:
    """The sums of one of `CHECKED`; each party adds up its own shares, and nothing is sent."""
    function = partial(sum_logits if part == LOGITS else sum_stream, count=CHECKED[part])
    return Step("check", None, function, variables, (sums_name(part), sums_name(checksum_name(part))))


def _keeps_sums(config, settings) -> bool:
    """Whether the sums of attention weights are within a range that has to be checked."""
    return config.attention_function != "softmax" and settings.softmax == "efficient"


def _attention(config, settings, span: Span, queries: int, layer: int, prepared: bool) -> Iterator[Step]:
    name = f"h.{layer}."
    read, norm = _norm(config.normalization, config, layer)
    yield from norm
    kept = (name + "keys", name + "values") if span.start else ()
    temperatures = (name + "inverse_temperature",) if config.attention_temperature == "position" else ()
    start, early = span.end - queries, 0
    if temperatures and not prepared and settings.softmax == "efficient" and config.attention_function == "softmax":
        # Where fewer scores are visible than a query has numbers, temperatures multiply scores.
        early = min(max(config.n_embd // config.n_head - start, 0), queries)
    is_apart = queries < span.length or (prepared and layer == config.n_layer - 1)
    split = partial(split_heads, heads=config.n_head, queries=queries, is_apart=is_apart)
    inputs = (read, name + "qkv.weight", name + "qkv.bias", *kept)
    outputs = ("queries", name + "keys", name + "values")
    yield Step("query, key, value", layer, split, inputs, outputs)
    if temperatures and early < queries:
        scale = partial(scale_queries, start=start, early=early)
        yield Step("temperatures", layer, scale, ("queries", *temperatures), ("queries",))
    checked = sums_name(scores_name(layer))
    if config.attention_function != "softmax":
        yield from _attend_without_maximum(config.attention_function, settings, span, queries, layer)
    elif settings.softmax != "efficient":
        yield Step("scores", layer, score, ("queries", name + "keys"), ("scores",))
        yield Step("check", layer, sum_rows, ("scores",), (checked,))
        whole = partial(whole_softmax, per_row=settings.softmax == "tuned")
        yield Step("softmax", layer, whole, ("scores",), ("weights",))
        yield Step("values", layer, weigh_and_merge, ("weights", name + "values"), ("attended",))
    else:
        yield Step("scores", layer, score_visible, ("queries", name + "keys"), ("visible",))
        rows = {"queries": queries, "keys": span.end}
        yield Step("check", layer, partial(sum_visible_rows, **rows), ("visible",), (checked,))
        if early:
            scale = partial(scale_scores, **rows, early=early)
            yield Step("temperatures", layer, scale, ("visible", *temperatures), ("visible",))
        levels = choose_levels(config.n_head, queries, span.end, settings.network)
        maximum = partial(subtract_maximum, **rows, levels=levels)
        yield Step("maximum", layer, maximum, ("visible",), ("visible",))
        yield Step("exponential", layer, exponentiate, ("visible",), ("visible",))
        sizes = (config.n_head, queries, span.end, config.n_embd // config.n_head)
        chosen = (False, reciprocal_by_chords) if prepared else choose_division(*sizes, settings.network)
        yield from _divide(*chosen, rows, layer)
    inputs = ("attended", name + "output.weight", name + "output.bias", STREAM)
    yield Step("output", layer, add_linear, inputs, (STREAM,))


def _divide(is_early: bool, reciprocal: Callable, rows: dict[str, int], layer: int) -> Iterator[Step]:
    inputs, queries = ("visible", f"h.{layer}.values"), rows["queries"]
    if is_early:
        yield Step("division", layer, partial(divide_visible, **rows, reciprocal=reciprocal), inputs[:1], inputs[:1])
        yield Step("values", layer, partial(weigh_divided_and_merge, queries=queries), inputs, ("attended",))
        return
    yield Step("values", layer, partial(weigh_visible, queries=queries), inputs, ("attended", "sums"))
    divide = partial(divide_and_merge, keys=rows["keys"], reciprocal=reciprocal)
    yield Step("division", layer, divide, ("attended", "sums"), ("attended",))


def _attend_without_maximum(function: str, settings, span: Span, queries: int, layer: int) -> Iterator[Step]:
    name, start, checked = f"h.{layer}.", span.end - queries, sums_name(scores_name(layer))
    inputs = ("queries", name + "keys", name + "shift")
    if settings.softmax != "efficient":
        yield Step("scores", layer, partial(score_shifted, start=start), inputs, ("scores",))
        yield Step("check", layer, sum_rows, ("scores",), (checked,))
        whole = partial(whole_attention, function=function, per_row=settings.softmax == "tuned")
        yield Step("attention function", layer, whole, ("scores",), ("weights",))
        yield Step("values", layer, weigh_and_merge, ("weights", name + "values"), ("attended",))
        return
    yield Step("scores", layer, partial(score_visible_shifted, start=start), inputs, ("visible",))
    yield Step("check", layer, partial(sum_visible_rows, queries=queries, keys=span.end), ("visible",), (checked,))
    weights = partial(visible_weights, function=function, queries=queries, keys=span.end)
    yield Step("attention function", layer, weights, ("visible",), ("visible",))
    weigh = partial(weigh_visible, queries=queries)
    yield Step("values", layer, weigh, ("visible", name + "values"), ("attended", name + "sums"))
    yield Step("division", layer, divide_widely_and_merge, ("attended", name + "sums"), ("attended",))


def _norm(norm: Norm, config, layer: int | None) -> tuple[str, list[Step]]:
    """Where a sublayer, or the head, reads the residual stream, and the step that writes there."""
    if norm != "layernorm":
        return STREAM, []
    function = partial(normalize, epsilon=config.layer_norm_epsilon)
    return "normalized", [Step("norm", layer, function, (STREAM,), ("normalized",))]


def _ffn(config, settings, layer: int) -> Iterator[Step]:
    name = f"h.{layer}."
    read, norm = _norm(config.normalization, config, layer)
    yield from norm
    if config.ffn_type == "mlp":
        yield Step("FFN", layer, linear, (read, name + "ffn_in.weight", name + "ffn_in.bias"), ("inner",))
        read, activation = "inner", config.activation_function
        if activation == "learnable_leaky_relu":
            yield Step("activation", layer, relu, ("inner",), ("positive",))
            inputs = ("inner", "positive", name + "slope")
            yield Step("activation", layer, learnable_leaky_relu, inputs, ("inner",))
        elif activation not in ("identity", "linear"):
            yield Step("activation", layer, _activation(config, settings.gelu), ("inner",), ("inner",))
    inputs = (read, name + "ffn.weight", name + "ffn.bias", STREAM)
    if config.ffn_residual_scaling:
        yield Step("FFN", layer, add_linear_to_scaled, (*inputs, name + "beta"), (STREAM,))
    else:
        yield Step("FFN", layer, add_linear, inputs, (STREAM,))


def _activation(config, gelu: str) -> Callable:
    if config.activation_function in ("relu", "leaky_relu"):
        return relu if config.activation_function == "relu" else leaky_relu
    # Errors of each layer add up where no norm scales them: of a model trained so, 1 in 50 most likely tokens changed.
    piecewise = piecewise_gelu if config.normalization == "layernorm" else fine_gelu
    return {"piecewise": piecewise, "tanh": tanh_gelu, "erf": erf_gelu}[gelu]


def sum_stream(ops: Arithmetic, stream, count: int):
    """Sums of `count` neighbouring numbers each, and what the checksum of each row is off by."""
    hidden = stream[:, :-1]
    return sum_neighbours(ops, hidden, count), checksum(ops.xp, hidden) - stream[:, -1:]


def sum_logits(ops: Arithmetic, logits, kept, count: int):
    """Sums of differences of neighbouring logits, and what their checksums are off by from those that were kept."""
    return sum_alternating(ops, logits, count), checksum(ops.xp, logits) - kept


def sum_neighbours(ops: Arithmetic, hidden, count: int):
    """Sums of `count` neighbouring numbers each of `(length, width)`; the last ones may be of fewer."""
    missing = -hidden.shape[1] % count
    if missing:
        hidden = ops.xp.concatenate([hidden, ops.xp.zeros((len(hidden), missing), hidden.dtype)], axis=1)
    return hidden.reshape(len(hidden), -1, count).sum(axis=-1)


def sum_alternating(ops: Arithmetic, logits, count: int):
    """Sums of differences of neighbouring logits: what all logits of a row have in common means nothing."""
    return sum_neighbours(ops, alternate(ops.xp, logits), count)


def sum_rows(ops: Arithmetic, scores):
    """Sums of the visible scores of each row `(queries, heads)`."""
    return ops.xp.where(visible_keys(*scores.shape[1:]), scores, 0.0).sum(axis=-1).T


def sum_visible_rows(ops: Arithmetic, visible, queries: int, keys: int):
    """The same of visible scores `(heads, visible)`."""
    return put_apart(ops, visible, visible_keys(queries, keys)).sum(axis=-1).T


def find_out_of_range(ops: Arithmetic, *tensors, attention_sums: int = 0):
    """
    Whether any number of `(length, sums)` is beyond the bound of its column, or one of attention's sums above the most
    that its reciprocal takes, or below half of the least: rounding takes less.

    Args:
        tensors: Sums and `(sums,)` bounds in turns, then sums of attention weights.
        attention_sums (`int`): Number of the latter.
    """
    checked = tensors[: len(tensors) - attention_sums]
    pairs = zip(checked[::2], checked[1::2], strict=True)
    margins = [margin.reshape(-1) for sums, bounds in pairs for margin in (bounds - sums, bounds + sums)]
    for sums in tensors[len(checked) :]:
        margins += [(MOST_SUM - sums).reshape(-1), (sums - LEAST_SUM / 2).reshape(-1)]
    return ops.any_negative(ops.xp.concatenate(margins))
