"""Exact folding for inference: what is an affine map beside another affine map becomes part of it.

Each fold takes a model, keeps its function and leaves less of it; [`fold`] does all of them. After it, a softmax-only
model consists of embeddings, linear maps and softmax. All is computed in double precision.

- weight or spectral normalisation: into plain weights, `W * scale`;
- static norm `(x - mean(x)) / s * g + b`, with `C = I - 1/n` that takes the mean off: into the next linear map,
  `W' = C diag(g / s) W` and `b' = b W + bias`; the final one into a head of its own, with a bias;
- temperature of a head: into its queries (one for each position stays a product with constants);
- `x -> beta x + FFN(x) / alpha`: 1 / alpha into the FFN, and beta into a scale S that the residual stream runs short
  of, `z = x / S`: maps that read the stream are multiplied by S, those that write to it divided by it;
- two linear maps without an activation between them: into one.
"""

import copy

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.blocks import EntropyGPTBlock, EntropyGPTFusedFFN, EntropyGPTMLP
from modeling_entropy_gpt.layers import EntropyGPTNormalizedConv1D, EntropyGPTStaticLayerNorm

from .assembly import assemble
from .errors import ConversionError


def fold(model: EntropyGPTForCausalLM) -> EntropyGPTForCausalLM:
    """
    A model that computes the same with less, for inference: without dropout, thresholds and entropy penalty.

    Args:
        model ([`EntropyGPTForCausalLM`]): Any architecture; it is not changed.

    Returns:
        [`EntropyGPTForCausalLM`]: A model of its own, in the same dtype, in evaluation mode.

    Raises:
        `ConversionError`: If a scale of the FFN's residual sum that is to be folded is 0.
    """
    folded = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for step in FOLDS:
            step(folded)
    config = folded.config
    config.entropy_regularization = False
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    tensors = {name: t.to(model.dtype) for name, t in folded.state_dict().items() if "entropy_threshold" not in name}
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return assemble(EntropyGPTForCausalLM, config, tensors).eval()


def fold_weight_normalization(model: EntropyGPTForCausalLM):
    """Weight and spectral normalisation into plain weights."""
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if isinstance(linear, EntropyGPTNormalizedConv1D):
                plain = Conv1D(linear.nf, linear.nx)
                plain.weight, plain.bias = nn.Parameter(linear.weight * linear.scale()), linear.bias
                setattr(parent, name, plain)
    model.config.weight_normalization, model.config.weight_normalization_targets = None, []


def fold_static_norms(model: EntropyGPTForCausalLM):
    """The static norms of the blocks into the linear maps that follow them."""
    if model.config.normalization != "static":
        return
    for block in model.transformer.h:
        _absorb_norm(block.ln_1, block.attn.c_attn)
        block.ln_1 = nn.Identity()
        if block.mlp is not None:
            _absorb_norm(block.ln_2, _reading(block))
            block.ln_2 = nn.Identity()
    model.config.normalization = "none"


def fold_final_static_norm(model: EntropyGPTForCausalLM):
    """A static final norm into the head, which is then not tied any more and has a bias."""
    if model.config.final_normalization != "static":
        return
    matrix, shift = _affine(model.transformer.ln_f)
    head = nn.Linear(model.config.n_embd, model.config.vocab_size, dtype=matrix.dtype)
    bias = model.lm_head.weight @ shift
    head.bias = nn.Parameter(bias if model.lm_head.bias is None else bias + model.lm_head.bias)
    head.weight = nn.Parameter(model.lm_head.weight @ matrix.mT)
    model.lm_head, model.transformer.ln_f = head, nn.Identity()
    model.config.final_normalization = "none"
    model.config.tie_word_embeddings, model.config.head_bias = False, True


def fold_head_temperatures(model: EntropyGPTForCausalLM):
    """Temperatures that do not depend on the position into the queries."""
    if model.config.attention_temperature != "head":
        return
    for block in model.transformer.h:
        factors = torch.exp(-block.attn.temperature.log_temperature).expand(-1, block.attn.head_dim).flatten()
        width = model.config.n_embd
        block.attn.c_attn.weight[:, :width] *= factors
        block.attn.c_attn.bias[:width] *= factors
        block.attn.temperature = None
    model.config.attention_temperature = "none"


def fold_residual_scaling(model: EntropyGPTForCausalLM):
    """
    Alpha into the FFN, and beta into the scale of the residual stream, up to the head. Not where LayerNorms read the
    stream in the blocks: their epsilon stands for another scale.

    Raises:
        `ConversionError`: If an alpha or a beta is 0.
    """
    config = model.config
    if not config.ffn_residual_scaling or config.normalization == "layernorm":
        return
    scale = torch.ones((), dtype=torch.double)
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_attn.weight *= scale
        block.attn.c_proj.weight /= scale
        block.attn.c_proj.bias /= scale
        if block.mlp is None:
            continue
        for name in ("ffn_alpha", "ffn_beta"):
            if getattr(block.residual_scaling, name) == 0:
                raise ConversionError(
                    f"{name}=0 in layer {layer} can't be folded, since weights are divided by it: set it to a small "
                    "number, or take the model as it is, not folded."
                )
        reading, writing = _reading(block), _writing(block)
        reading.weight *= scale
        scale = scale * block.residual_scaling.ffn_beta
        writing.weight /= scale * block.residual_scaling.ffn_alpha
        writing.bias /= scale * block.residual_scaling.ffn_alpha
        block.residual_scaling = None
    if config.final_normalization == "layernorm":
        # LayerNorm takes the scale off, but for its epsilon and the sign.
        config.layer_norm_epsilon = model.transformer.ln_f.eps = config.layer_norm_epsilon / scale.item() ** 2
        model.transformer.ln_f.weight *= scale.sign()
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight * scale)
        config.tie_word_embeddings = False
    config.ffn_residual_scaling = False


def fuse_linear_ffns(model: EntropyGPTForCausalLM):
    """FFNs without an activation into one linear map each."""
    config = model.config
    if config.ffn_type == "fused" or config.activation_function != "identity":
        return
    config.ffn_type = "fused"
    for block in model.transformer.h:
        if isinstance(block.mlp, EntropyGPTMLP):
            first, second = block.mlp.c_fc, block.mlp.c_proj
            fused = EntropyGPTFusedFFN(config).eval()
            fused.c_fused.weight = nn.Parameter(first.weight @ second.weight)
            fused.c_fused.bias = nn.Parameter(first.bias @ second.weight + second.bias)
            block.mlp = fused


# In this order: plain weights before they are multiplied, norms before the stream behind them is scaled.
FOLDS = (
    fold_weight_normalization,
    fold_static_norms,
    fold_final_static_norm,
    fold_head_temperatures,
    fuse_linear_ffns,
    fold_residual_scaling,
)


def _reading(block: EntropyGPTBlock) -> Conv1D:
    """The linear map of the FFN that reads the residual stream."""
    return block.mlp.c_fused if isinstance(block.mlp, EntropyGPTFusedFFN) else block.mlp.c_fc


def _writing(block: EntropyGPTBlock) -> Conv1D:
    """The linear map of the FFN that writes to the residual stream."""
    return block.mlp.c_fused if isinstance(block.mlp, EntropyGPTFusedFFN) else block.mlp.c_proj


def _affine(norm: EntropyGPTStaticLayerNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix M and the vector b such that the norm of rows x is `x M + b`."""
    size = len(norm.weight)
    centering = torch.eye(size, dtype=norm.weight.dtype, device=norm.weight.device) - 1 / size
    return centering * (norm.weight / norm.standard_deviation), norm.bias


def _absorb_norm(norm: EntropyGPTStaticLayerNorm, linear: Conv1D):
    matrix, shift = _affine(norm)
    linear.bias = nn.Parameter(shift @ linear.weight + linear.bias)
    linear.weight = nn.Parameter(matrix @ linear.weight)
