"""The weights that a program is given: all that they can take over is done before, in the clear."""

import copy

import numpy as np
from torch import nn

from entropy_gpt.conversion.folding import absorb_linear_ffns, fold
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

from .attention_functions import prepare_function
from .program import bounds_name, check_config, checked_parts, weight_shapes


# The bound of what nobody has audited: it lets nearly all pass.
BOUNDLESS = 2.0**30


def prepare_weights(model: EntropyGPTForCausalLM) -> tuple[EntropyGPTConfig, dict[str, np.ndarray]]:
    """
    Everything that weights can take over: what [`fold`] folds, linear FFNs where [`absorb_linear_ffns`] can, the scale
    of the scores, what an attention function adds to them, and the gains and biases of LayerNorms.

    Returns:
        `tuple`: The config of the program, and its weights by name in float32. The bounds of its check let nearly all
        pass; [`audit`] finds those of the model.

    Raises:
        `PrivateInferenceError`: If the program does not know an operation of the architecture.
        `ConversionError`: As [`fold`].
    """
    check_config(model.config)
    folded = fold(copy.deepcopy(model).double())
    absorb_linear_ffns(folded)
    config, weights = folded.config, {}
    body = folded.transformer
    weights["wte"], weights["wpe"] = body.wte.weight, body.wpe.weight
    for layer, block in enumerate(body.h):
        name = f"h.{layer}."
        matrix, bias = _absorb_gain(block.ln_1, block.attn.c_attn.weight, block.attn.c_attn.bias)
        scaling = block.attn.scaling
        if block.attn.shift is not None:
            shift = block.attn.shift.attention_shift
            scaling, weights[name + "shift"] = prepare_function(config.attention_function, scaling, shift)
        matrix[:, : config.n_embd] *= scaling
        bias[: config.n_embd] *= scaling
        weights[name + "qkv.weight"], weights[name + "qkv.bias"] = matrix, bias
        if block.attn.temperature is not None:
            weights[name + "inverse_temperature"] = (-block.attn.temperature.log_temperature).exp()
        weights[name + "output.weight"] = block.attn.c_proj.weight
        weights[name + "output.bias"] = block.attn.c_proj.bias
        if block.mlp is None:
            continue
        if config.ffn_type == "fused":
            linear = block.mlp.c_fused
            matrix, bias = _absorb_gain(block.ln_2, linear.weight, linear.bias)
            weights[name + "ffn.weight"], weights[name + "ffn.bias"] = matrix, bias
        else:
            matrix, bias = _absorb_gain(block.ln_2, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
            weights[name + "ffn_in.weight"], weights[name + "ffn_in.bias"] = matrix, bias
            weights[name + "ffn.weight"] = block.mlp.c_proj.weight
            weights[name + "ffn.bias"] = block.mlp.c_proj.bias
            if config.activation_function == "learnable_leaky_relu":
                weights[name + "slope"] = block.mlp.act.negative_slope
        if block.residual_scaling is not None:
            # Where LayerNorms read the stream, beta stays; alpha is part of the FFN all the same.
            weights[name + "beta"] = block.residual_scaling.ffn_beta
            for part in ("ffn.weight", "ffn.bias"):
                weights[name + part] = weights[name + part] / block.residual_scaling.ffn_alpha
    head_bias = folded.lm_head.bias
    head_bias = head_bias if head_bias is not None else folded.lm_head.weight.new_zeros(config.vocab_size)
    matrix, bias = _absorb_gain(body.ln_f, folded.lm_head.weight.mT, head_bias)
    weights["head.weight"], weights["head.bias"] = matrix, bias
    weights = {name: weight.detach().float().numpy().copy() for name, weight in weights.items()}
    shapes, bounds = weight_shapes(config), map(bounds_name, checked_parts(config))
    return config, weights | {name: np.full(shapes[name], BOUNDLESS, np.float32) for name in bounds}


def _absorb_gain(norm, matrix, bias):
    """A copy of the linear map that takes over the gain and the bias of a LayerNorm before it."""
    if isinstance(norm, nn.Identity):
        return matrix.detach().clone(), bias.detach().clone()
    return norm.weight[:, None].detach() * matrix.detach(), (norm.bias @ matrix + bias).detach()
