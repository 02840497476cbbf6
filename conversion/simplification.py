"""From one architecture to a simpler one: a function for each step. [`planning`] chooses those that lead to a target.

Every step takes a model and gives a new one, which shares with it the parameters that the step leaves alone. Copy it
(`copy.deepcopy`) before training it together with the original. Steps fitted to data take a [`Calibration`] of
the model they are given. [`divergence`] measures their loss; the other steps are exact. Each fitted step has a naive
version, which copies weights and fits nothing, to show what the calibration is worth.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import LEARNED_SCALARS, EntropyGPTLearnableLeakyReLU, EntropyGPTNormalizedConv1D

from .assembly import assemble
from .calibration import Calibration
from .divergence import Reference
from .errors import ConversionError
from .folding import fold_final_static_norm, fold_static_norms


Model = EntropyGPTForCausalLM

# Tried on held-out rows, as parts of each feature's own second moment.
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
ADDABLE_SCALARS = tuple(scalar for scalar in LEARNED_SCALARS if scalar.neutral is not None)
ENTROPY_FIELDS = ("entropy_coefficient", "entropy_tolerance", "entropy_maximum", "entropy_penalty")
# What a target may have otherwise than its source without a step: it acts in training alone.
TRAINING_FIELDS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "detect_divergence", "log_sum_coefficient")
TRAINING_FIELDS += ENTROPY_FIELDS


def make_norms_static(model: Model, calibration: Calibration | None) -> Model:
    """
    LayerNorms of the blocks to static ones: a constant in place of each row's standard deviation, the one nearest to
    it over the calibration's rows but for first positions and ends of text (without a calibration: 1).
    """
    names = [f"transformer.{name}" for name, _ in model.transformer.named_modules() if name.endswith(("ln_1", "ln_2"))]
    return _with_static_norms(model, names, calibration, normalization="static")


def make_final_norm_static(model: Model, calibration: Calibration | None) -> Model:
    """The same for the norm before the head."""
    return _with_static_norms(model, ["transformer.ln_f"], calibration, final_normalization="static")


def remove_static_norms(model: Model) -> Model:
    """Static norms of the blocks into the linear maps behind them. Exact."""
    return _fold(model, fold_static_norms)


def remove_final_static_norm(model: Model) -> Model:
    """The static norm before the head into the head, which is then untied and has a bias. Exact."""
    return _fold(model, fold_final_static_norm)


def drop_norms(model: Model) -> Model:
    """Norms of the blocks left out, nothing taken in by the weights: the naive version of removing them."""
    tensors = {name: t for name, t in model.state_dict().items() if ".ln_1." not in name and ".ln_2." not in name}
    return _rebuild(model, tensors, normalization="none")


def drop_final_norm(model: Model) -> Model:
    """The norm before the head left out: the naive version of removing it."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "ln_f" not in name}
    return _rebuild(model, tensors, final_normalization="none")


def replace_activation(model: Model, name: str, calibration: Calibration | None) -> Model:
    """
    Another activation in every FFN. With a calibration (of `hidden_activation=name`), the second linear map is fitted
    anew: least squares of what the FFN wrote, over the new features.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model with full FFNs.
        name (`str`): Any activation of the configuration but `"identity"`, which [`linearize_ffns`] is for.
        calibration ([`Calibration`], *optional*): Without it, weights stay as they are.
    """
    tensors = _without_slopes(model)
    if name == "learnable_leaky_relu":
        slope = EntropyGPTLearnableLeakyReLU().negative_slope.detach().to(model.dtype)
        tensors.update({f"{ffn}.act.negative_slope": slope.clone() for ffn in _ffn_names(model)})
    if calibration is not None:
        for ffn in _ffn_names(model):
            weight, bias = fit_linear_map(calibration, ffn)
            tensors[f"{ffn}.c_proj.weight"], tensors[f"{ffn}.c_proj.bias"] = (
                weight.to(model.dtype),
                bias.to(model.dtype),
            )
    return _rebuild(model, tensors, activation_function=name)


def linearize_ffns(model: Model, calibration: Calibration | None) -> Model:
    """
    No activation in the FFNs. With a calibration, each FFN becomes the linear map nearest to it in least squares over
    its inputs: the first of its two maps is kept, the second is solved for.
    """
    tensors = _without_slopes(model)
    if calibration is not None:
        for ffn in _ffn_names(model):
            weight, bias = fit_linear_map(calibration, ffn)
            first, first_bias = (tensors[f"{ffn}.c_fc.{name}"].double().cpu() for name in ("weight", "bias"))
            root = _root(calibration.tensors[f"{ffn}.fit"].double()[1:, 1 : 1 + len(weight)])  # whose rows count
            second = torch.linalg.pinv(root @ first) @ (root @ weight)
            tensors[f"{ffn}.c_proj.weight"] = second.to(model.dtype)
            tensors[f"{ffn}.c_proj.bias"] = (bias - first_bias @ second).to(model.dtype)
    return _rebuild(model, tensors, activation_function="identity")


def fuse_ffns(model: Model) -> Model:
    """The two linear maps of FFNs without an activation into one. Exact."""
    tensors = model.state_dict()
    for ffn in _ffn_names(model):
        first, first_bias, second, second_bias = (
            tensors.pop(f"{ffn}.{name}").double()
            for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
        )
        tensors[f"{ffn}.c_fused.weight"] = (first @ second).to(model.dtype)
        tensors[f"{ffn}.c_fused.bias"] = (first_bias @ second + second_bias).to(model.dtype)
    return _rebuild(model, tensors, ffn_type="fused")


def add_scalars(model: Model, **setting: str | bool) -> Model:
    """
    Learned scalars, each at the value at which the model computes what it did. Exact.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model without them.
        setting: The field of the configuration that brings them, such as `attention_temperature="head"`.
    """
    scalars = [scalar for scalar in ADDABLE_SCALARS if scalar.setting in setting]
    changes = setting | {scalar.start: scalar.neutral for scalar in scalars}
    tensors = model.state_dict()
    for layer, block in enumerate(assemble_like(model, **changes).transformer.h):
        for scalar in scalars:
            if (parameter := scalar.get(block)) is not None:
                value = math.log(scalar.neutral) if scalar.is_logarithm else scalar.neutral
                name = f"transformer.h.{layer}.{scalar.place}"
                tensors[name] = torch.full(parameter.shape, value, dtype=model.dtype)
    return _rebuild(model, tensors, **changes)


def replace_attention(
    model: Model, function: str, log_sum_coefficient: float, calibration: Calibration | None
) -> Model:
    """
    Another attention function, and shifts of the scores where it has some. With a calibration, each head and position
    has the shift with which the largest score of a row is 0, in the median: there, power4 and power2 touch softmax's
    exponential. For softmax it is the median of the row's log-sum-exp. Without, shifts are 0.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model with softmax.
        function (`str`): As `attention_function` of the configuration.
        log_sum_coefficient (`float`): The target's, above 0 of which softmax has shifts too.
        calibration ([`Calibration`], *optional*): Of this model, with the largest scores.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("attention_shift")}
    config = change_config(model.config, {"attention_function": function, "log_sum_coefficient": log_sum_coefficient})
    for layer in range(config.n_layer if config.has_attention_shift else 0):
        name = f"transformer.h.{layer}.attn"
        shift = torch.zeros(config.n_head, config.n_positions)
        if calibration is not None:
            shift = calibration.shift(name, config.n_positions, function)
        tensors[f"{name}.shift.attention_shift"] = shift.to(model.dtype)
    return _rebuild(model, tensors, attention_function=function, log_sum_coefficient=log_sum_coefficient)


def add_thresholds(model: Model, calibration: Calibration, **fields) -> Model:
    """
    Entropy regularisation, every threshold at its head's measured entropy, so that a head is first drawn to stay as it
    is. What the model computes does not change.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model without thresholds.
        calibration ([`Calibration`]): Of this model.
        fields: `entropy_coefficient`, `entropy_tolerance`, `entropy_maximum`, `entropy_penalty`.
    """
    tensors = model.state_dict()
    maximum = fields.get("entropy_maximum", model.config.entropy_maximum)
    for layer in range(model.config.n_layer):
        name = f"transformer.h.{layer}.attn"
        tensors[f"{name}.threshold.entropy_threshold"] = calibration.threshold(name, maximum).to(model.dtype)
    return _rebuild(model, tensors, entropy_regularization=True, **fields)


def normalize_weights(model: Model, kind: str, targets: list[str]) -> Model:
    """
    Weight or spectral normalisation, gains set to what is divided by. Exact.

    Args:
        model ([`EntropyGPTForCausalLM`]): A model without it.
        kind (`str`): `"weight"` or `"spectral"`.
        targets (`list[str]`): Some of `q`, `k`, `v`, `o`, `ffn`.

    Raises:
        `ConversionError`: If a column of weights is zero.
    """
    tensors = model.state_dict()
    normalized = assemble_like(model, weight_normalization=kind, weight_normalization_targets=targets)
    for name, module in normalized.named_modules():
        if not isinstance(module, EntropyGPTNormalizedConv1D):
            continue
        groups = tensors[f"{name}.weight"].double().unflatten(1, (len(module.normalized_groups), -1)).unbind(dim=1)
        chosen = [group for group, keep in zip(groups, module.normalized_groups, strict=True) if keep]
        if not all(group.norm(dim=0).all() for group in chosen):
            raise ConversionError(f"{name}.weight has columns of zeros, which can't be normalised: leave it out.")
        if kind == "weight":
            tensors[f"{name}.gain"] = torch.stack([group.norm(dim=0) for group in chosen]).to(model.dtype)
            continue
        parts = [torch.linalg.svd(group, full_matrices=False) for group in chosen]
        tensors[f"{name}.gain"] = torch.stack([values[:1] for _, values, _ in parts]).to(model.dtype)
        tensors[f"{name}.singular_vectors"] = torch.stack([right[0] for _, _, right in parts]).to(model.dtype)
    return _rebuild(model, tensors, weight_normalization=kind, weight_normalization_targets=list(targets))


def prune_ffns(model: Model, layers: Sequence[int], calibration: Calibration | None) -> Model:
    """
    No FFN in the layers given. With a calibration, the mean of what each wrote stays, as part of the bias of the
    attention before it.

    Raises:
        `ConversionError`: If the residual stream is scaled (beta) in the layer of one of these FFNs.
    """
    tensors = model.state_dict()
    for layer in layers:
        block = f"transformer.h.{layer}"
        scaling = f"{block}.residual_scaling"
        if model.config.ffn_residual_scaling and (beta := tensors[f"{scaling}.ffn_beta"].item()) != 1:
            raise ConversionError(
                f"The FFN of layer {layer} can't be pruned: its residual stream is scaled by {beta:.3g}. "
                "Fold that into the weights first (entropy_gpt.conversion.folding.fold)."
            )
        if calibration is not None:
            moments = calibration.tensors[f"{block}.mlp.fit"].double()
            mean = moments[0, len(moments) :] / moments[0, 0]
            if model.config.ffn_residual_scaling:
                mean = mean / tensors[f"{scaling}.ffn_alpha"].item()
            bias = tensors[f"{block}.attn.c_proj.bias"]
            tensors[f"{block}.attn.c_proj.bias"] = (bias.double() + mean.to(bias.device)).to(bias.dtype)
        prefixes = (f"{block}.mlp.", f"{block}.ln_2.", f"{scaling}.")
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    return _rebuild(model, tensors, pruned_ffn_layers=sorted({*model.config.pruned_ffn_layers, *layers}))


def measure_pruning_damage(
    model: Model, batches: Sequence[torch.Tensor], calibration: Calibration, on_blocks: Callable = lambda count: None
) -> dict[int, float]:
    """What pruning each FFN alone costs: KL to the model with all of them, in nats, by layer."""
    layers = [layer for layer, block in enumerate(model.transformer.h) if block.mlp is not None]
    pruned = [prune_ffns(model, [layer], calibration) for layer in layers]
    damages = Reference(model, batches).compare(pruned, on_blocks)
    return {layer: damage.kl for layer, damage in zip(layers, damages, strict=True)}


def set_training_fields(model: Model, target: EntropyGPTConfig) -> Model:
    """The model with its target's fields for training alone: dropout and the entropy penalty."""
    return _rebuild(model, model.state_dict(), **{name: getattr(target, name) for name in TRAINING_FIELDS})


def fit_linear_map(calibration: Calibration, ffn: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Least squares of what an FFN writes over its features, with the ridge that is best on the held-out rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weight, `(features, n_embd)`, and bias, `(n_embd,)`, in double precision.
    """
    fit, held_out = (calibration.tensors[f"{ffn}.{split}"].double() for split in ("fit", "held_out"))
    size = len(fit)
    inputs, outputs = fit[:, :size] / fit[0, 0], fit[:, size:] / fit[0, 0]
    # Features that never vary from zero would make the system singular.
    diagonal = inputs.diagonal().clone()
    diagonal[1:] += torch.finfo(torch.float32).eps * diagonal[1:].mean() + torch.finfo(torch.double).tiny
    diagonal[0] = 0.0  # the bias is not shrunk
    solutions = [torch.linalg.solve(inputs + torch.diag(ridge * diagonal), outputs) for ridge in RIDGES]
    best = min(solutions, key=lambda solution: _squared_error(solution, held_out))
    return best[1:].clone(memory_format=torch.contiguous_format), best[0].clone()


def assemble_like(model: Model, **changes) -> Model:
    """A model without memory (on the meta device) of the same configuration but for the changes."""
    config = change_config(model.config, changes)
    with torch.device("meta"):
        return EntropyGPTForCausalLM(config)


def _rebuild(model: Model, tensors: dict[str, torch.Tensor], **changes) -> Model:
    tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    config = change_config(model.config, changes)
    rebuilt = assemble(EntropyGPTForCausalLM, config, tensors, model.generation_config).eval()
    rebuilt.set_attn_implementation(model.config._attn_implementation)
    return rebuilt


def change_config(config: EntropyGPTConfig, changes: dict) -> EntropyGPTConfig:
    """A copy of a configuration with other values of some fields."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _with_static_norms(model: Model, names: list[str], calibration: Calibration | None, **changes) -> Model:
    tensors = model.state_dict()
    for name in names:
        constant = 1.0 if calibration is None else calibration.norm_constant(name)
        tensors[f"{name}.standard_deviation"] = torch.tensor(constant, dtype=model.dtype)
    return _rebuild(model, tensors, **changes)


def _fold(model: Model, fold: Callable[[Model], None]) -> Model:
    folded = copy.deepcopy(model).double()
    with torch.no_grad():
        fold(folded)
    tensors = {name: tensor.to(model.dtype) for name, tensor in folded.state_dict().items()}
    if folded.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return assemble(EntropyGPTForCausalLM, folded.config, tensors, model.generation_config).eval()


def _without_slopes(model: Model) -> dict[str, torch.Tensor]:
    """The weights but for those of an activation that is replaced."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".act.negative_slope")}


def _ffn_names(model: Model) -> list[str]:
    return [f"transformer.h.{layer}.mlp" for layer, block in enumerate(model.transformer.h) if block.mlp is not None]


def _root(moments: torch.Tensor) -> torch.Tensor:
    """The matrix whose square is the second moments, kept from being singular."""
    values, vectors = torch.linalg.eigh(moments)
    return (vectors * values.clamp(min=torch.finfo(torch.float32).eps * values[-1]).sqrt()) @ vectors.mT


def _squared_error(solution: torch.Tensor, moments: torch.Tensor) -> float:
    """Sum of the squared errors over the rows of the moments, less the sum of the squared outputs."""
    size = len(moments)
    inputs, outputs = moments[:, :size], moments[:, size:]
    return ((solution * (inputs @ solution)).sum() - 2 * (solution * outputs).sum()).item()
