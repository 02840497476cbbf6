"""The steps that lead from one architecture to another: which there are, and in which order they are taken."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from huggingface_hub.errors import StrictDataclassError

from modeling_entropy_gpt import EntropyGPTConfig
from modeling_entropy_gpt.notation import parse_notation

from .calibration import Calibration
from .errors import ConversionError
from .simplification import (
    ADDABLE_SCALARS,
    ENTROPY_FIELDS,
    Model,
    add_scalars,
    add_thresholds,
    change_config,
    drop_final_norm,
    drop_norms,
    fuse_ffns,
    linearize_ffns,
    make_final_norm_static,
    make_norms_static,
    normalize_weights,
    prune_ffns,
    remove_final_static_norm,
    remove_static_norms,
    replace_activation,
    replace_attention,
)


@dataclass(frozen=True)
class Step:
    """
    One step of a plan.

    Args:
        title (`str`): What it does.
        apply: Makes the new model out of the old one and its calibration (`None` if `calibrated` is not set).
        naive: Makes what a copy of the weights would give; `None` where there is nothing to compare with.
        calibrated (`bool`): Whether it is fitted to a calibration.
        hidden_activation (`str`, *optional*): What the calibration has to be taken with.
        largest_scores (`bool`): Whether the calibration has to have the largest scores.
        exact (`bool`): Whether it keeps every prediction, up to rounding.
    """

    title: str
    apply: Callable[[Model, Calibration | None], Model]
    naive: Callable[[Model], Model] | None = None
    calibrated: bool = False
    hidden_activation: str | None = None
    exact: bool = False
    largest_scores: bool = False


@dataclass(frozen=True)
class Plan:
    """
    How to get from one architecture to another.

    Args:
        simplifications (`tuple[Step, ...]`): Steps that lose something, and those that add what is trained.
        finish (`tuple[Step, ...]`): Exact steps that training should go before: folding of static norms, and
            normalisation of the weights that come out of it.
    """

    simplifications: tuple[Step, ...]
    finish: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return self.simplifications + self.finish


def target_config(source: EntropyGPTConfig, notation: str, **fields) -> EntropyGPTConfig:
    """
    The configuration of another architecture with the sizes and settings of a model.

    Args:
        source ([`EntropyGPTConfig`]): Of the model there is.
        notation (`str`): The architecture wanted, as `EntropyGPTConfig.from_notation` reads it.
        fields: What the notation leaves open: `final_normalization`, and any of `TRAINING_FIELDS`.

    Raises:
        `ConversionError`: If the notation is not understood, or can't be had.
    """
    try:
        config = change_config(source, {**parse_notation(notation, source.n_layer), **fields})
        if config.final_normalization == "none" != source.final_normalization:  # it becomes part of the head
            config.tie_word_embeddings, config.head_bias = False, True
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        raise ConversionError(str(error.__cause__ or error)) from error
    return config


def plan_conversion(source: EntropyGPTConfig, target: EntropyGPTConfig) -> Plan:
    """
    The steps from one architecture to another.

    Args:
        source ([`EntropyGPTConfig`]): Of the model there is.
        target ([`EntropyGPTConfig`]): Of the model wanted, with the same sizes.

    Raises:
        `ConversionError`: If the target has what the source has lost, and no step brings back.
    """
    _check_reachable(source, target)
    simplifications, finish = [], []
    if layers := sorted({*target.pruned_ffn_layers} - {*source.pruned_ffn_layers}):
        title = f"FFN of {'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))} pruned"
        simplifications.append(
            Step(title, lambda m, c: prune_ffns(m, layers, c), lambda m: prune_ffns(m, layers, None), True)
        )
    if source.normalization == "layernorm" != target.normalization:
        simplifications.append(
            Step("LayerNorms static", make_norms_static, lambda m: make_norms_static(m, None), True)
        )
    if source.final_normalization == "layernorm" != target.final_normalization:
        simplifications.append(
            Step("final norm static", make_final_norm_static, lambda m: make_final_norm_static(m, None), True)
        )
    simplifications += _ffn_steps(source, target)
    simplifications += _scalar_steps(source, target)
    simplifications += _attention_steps(source, target)
    if target.entropy_regularization and not source.entropy_regularization:
        fields = {name: getattr(target, name) for name in ENTROPY_FIELDS}
        simplifications.append(
            Step("thresholds, at entropies", lambda m, c: add_thresholds(m, c, **fields), None, True, exact=True)
        )
    if target.normalization == "none" != source.normalization:
        finish.append(Step("norms folded away", lambda m, _: remove_static_norms(m), drop_norms, exact=True))
    if target.final_normalization == "none" != source.final_normalization:
        finish.append(
            Step("final norm folded away", lambda m, _: remove_final_static_norm(m), drop_final_norm, exact=True)
        )
    if target.weight_normalization != source.weight_normalization:
        kind, targets = target.weight_normalization, target.weight_normalization_targets
        finish.append(Step(f"{kind} normalisation", lambda m, _: normalize_weights(m, kind, targets), exact=True))
    return Plan(tuple(simplifications), tuple(finish))


def _attention_steps(source: EntropyGPTConfig, target: EntropyGPTConfig) -> Iterable[Step]:
    function, coefficient = target.attention_function, target.log_sum_coefficient
    if function != source.attention_function:
        yield Step(
            f"{source.attention_function} to {function}, shifts at the largest scores",
            lambda m, c: replace_attention(m, function, coefficient, c),
            lambda m: replace_attention(m, function, coefficient, None),
            True,
            largest_scores=True,
        )
    elif target.has_attention_shift and not source.has_attention_shift:
        yield Step(
            "shifts, at the log-sums",
            lambda m, c: replace_attention(m, function, coefficient, c),
            None,
            True,
            exact=True,
            largest_scores=True,
        )
    elif source.has_attention_shift and not target.has_attention_shift:
        yield Step("no shifts", lambda m, _: replace_attention(m, function, coefficient, None), exact=True)


def _ffn_steps(source: EntropyGPTConfig, target: EntropyGPTConfig) -> Iterable[Step]:
    if (name := target.activation_function) != source.activation_function:
        title = f"{source.activation_function} to {name}"
        if name == "identity":
            yield Step(title, linearize_ffns, lambda m: linearize_ffns(m, None), True)
        else:
            yield Step(
                title,
                lambda m, c: replace_activation(m, name, c),
                lambda m: replace_activation(m, name, None),
                True,
                hidden_activation=name,
            )
    if target.ffn_type != source.ffn_type:
        yield Step("FFNs fused", lambda m, _: fuse_ffns(m), exact=True)


def _scalar_steps(source: EntropyGPTConfig, target: EntropyGPTConfig) -> Iterable[Step]:
    missing = [scalar for scalar in ADDABLE_SCALARS if scalar.is_in(target) and not scalar.is_in(source)]
    for setting, group in groupby(missing, key=lambda scalar: scalar.setting):
        first, *others = group
        title = f"{' and '.join(scalar.name for scalar in (first, *others))}, at {first.neutral:g}"
        added = {setting: getattr(target, setting)}
        yield Step(title, lambda m, _, added=added: add_scalars(m, **added), exact=True)


def _check_reachable(source: EntropyGPTConfig, target: EntropyGPTConfig):
    order = ("layernorm", "static", "none")
    lost = {
        "normalization": order.index(target.normalization) < order.index(source.normalization),
        "final_normalization": order.index(target.final_normalization) < order.index(source.final_normalization),
        "activation_function": source.activation_function == "identity" != target.activation_function,
        "ffn_type": source.ffn_type == "fused" != target.ffn_type,
        "pruned_ffn_layers": not {*source.pruned_ffn_layers} <= {*target.pruned_ffn_layers},
        "entropy_regularization": source.entropy_regularization and not target.entropy_regularization,
        "attention_function": source.attention_function not in ("softmax", target.attention_function),
        **{
            scalar.setting: scalar.is_in(source) and getattr(source, scalar.setting) != getattr(target, scalar.setting)
            for scalar in ADDABLE_SCALARS
        },
        "weight_normalization": source.weight_normalization is not None
        and (source.weight_normalization, source.weight_normalization_targets)
        != (target.weight_normalization, target.weight_normalization_targets),
    }
    if names := [name for name, is_lost in lost.items() if is_lost]:
        changes = ", ".join(f"{name} {getattr(source, name)!r} to {getattr(target, name)!r}" for name in names)
        raise ConversionError(
            f"{source.notation} can't become {target.notation}: no step leads from {changes}. Steps only simplify: "
            "layernorm to static to none, an activation to another or to none, two linear maps to one, softmax to "
            "another attention function."
        )
    if source.weight_normalization is not None and source.notation != target.notation:
        raise ConversionError(
            f"{source.notation} has normalised weights, which the steps do not take: fold them into plain weights "
            "first (entropy_gpt.conversion.folding.fold)."
        )
