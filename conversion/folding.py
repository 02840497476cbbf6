"""Exact folding for inference: an affine map next to another one becomes part of it.

Each fold takes a model, keeps its function and leaves less of it; [`fold`] does all of them. After it, a softmax-only
model consists of embeddings, linear maps and softmax. All is computed in double precision.

- weight or spectral normalisation: into plain weights, `W * scale`;
- static norm `(x - mean(x)) / s * g + b`, with `C = I - 1/n` that takes the mean off: into the next linear map,
  `W' = C diag(g / s) W` and `b' = b W + bias`; the final one into a head of its own, with a bias;
- temperature of a head: into its queries (one for each position stays a product with constants);
- shifts of scores: those of softmax, which cancel, are dropped; others stay constants that scores are less by;
- `x -> beta x + FFN(x) / alpha`: 1 / alpha into the FFN, and beta into a scale S that the residual stream runs short
  of, `z = x / S`: maps that read the stream are multiplied by S, those that write to it divided by it;
- two linear maps without an activation between them: into one;
- linear FFNs of a model without norms, by [`absorb_linear_ffns`] and for private inference alone: into the basis in
  which the residual stream is written.
"""

import copy
import functools
import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from modeling_entropy_gpt.blocks import EntropyGPTBlock, EntropyGPTFusedFFN, EntropyGPTMLP
from modeling_entropy_gpt.layers import EntropyGPTNormalizedConv1D, EntropyGPTStaticLayerNorm

from .assembly import assemble, inference_state
from .errors import ConversionError, NotFiniteError


# By how much a basis that linear FFNs are absorbed into may stretch or shrink a direction of the stream. With 18
# fractional bits the answers of a model of six layers, trained for 1,000 steps, err as much with 8 as with 1, by a
# twentieth more with 16, and by a sixth more with 32.
MOST_STRETCHED = 16.0
MOST_NAMES_SHOWN = 5


def fold(model: EntropyGPTForCausalLM) -> EntropyGPTForCausalLM:
    """
    A model that computes the same with less, for inference: without dropout, thresholds and penalties.

    Args:
        model ([`EntropyGPTForCausalLM`]): Any architecture; it is not changed.

    Returns:
        [`EntropyGPTForCausalLM`]: A model of its own, in the same dtype, in evaluation mode.

    Raises:
        `ConversionError`: If a scale of the FFN's residual sum that is to be folded is 0.
        `NotFiniteError`: If a tensor of the model or of the result is not finite.
    """
    _check_finite(model.state_dict(), "The model to fold is damaged, or diverged in training")
    folded = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for step in FOLDS:
            step(folded)
    config = folded.config
    config.entropy_regularization, config.log_sum_coefficient = False, 0.0
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    tensors = {name: tensor.to(model.dtype) for name, tensor in inference_state(folded).items()}
    if not config.has_attention_shift:  # a softmax's, which acts in training alone
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("attention_shift")}
    _check_finite(tensors, f"A norm constant or a temperature is 0, or {model.dtype} too narrow for what is folded")
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    return assemble(EntropyGPTForCausalLM, config, tensors, model.generation_config).eval()


def _check_finite(tensors: dict[str, torch.Tensor], cause: str):
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        more = f" and {len(bad) - MOST_NAMES_SHOWN} more" if len(bad) > MOST_NAMES_SHOWN else ""
        raise NotFiniteError(f"Not finite: {', '.join(bad[:MOST_NAMES_SHOWN])}{more}. {cause}.")


def fold_weight_normalization(model: EntropyGPTForCausalLM):
    """Weight and spectral normalisation into plain weights."""
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if isinstance(linear, EntropyGPTNormalizedConv1D):
                plain = Conv1D(linear.nf, linear.nx)
                plain.weight, plain.bias = nn.Parameter(linear.normalized_weight()), linear.bias
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


def list_absorbable_ffns(config: EntropyGPTConfig) -> list[int]:
    """
    The layers, of a folded model, whose FFN the residual stream's basis can take over: linear ones with no norm before
    them, but for the first and the last one, which write in the new basis and in the old one again.
    """
    if config.normalization != "none" or config.ffn_type != "fused" or config.ffn_residual_scaling:
        return []
    return [layer for layer in range(config.n_layer) if layer not in config.pruned_ffn_layers][1:-1]


@torch.no_grad()
def absorb_linear_ffns(model: EntropyGPTForCausalLM) -> float:
    """
    Prunes the FFNs of [`list_absorbable_ffns`] from a folded model, in place, and leaves its logits as they are.

    Such an FFN is a linear map `x -> x M` of the stream, `M = I + W`. Written in a basis B of its own in each layer,
    `z = x B` with `B' = inv(M) B` after it, the stream passes unchanged: maps that read it are multiplied by `inv(B)`,
    maps that write to it by B. The first FFN writes in the first basis, the last one goes back to the old. The first
    basis is the one with which both stretch and shrink the stream least: with `U S V` the singular value decomposition
    of all M together, it is `U sqrt(S)`.

    Args:
        model ([`EntropyGPTForCausalLM`]): From [`fold`], preferably in double precision.

    Returns:
        `float`: By how much one of the bases stretches or shrinks a direction at most, which errors of rounding grow
        with; 1 without such FFNs. Above [`MOST_STRETCHED`] nothing is done.
    """
    layers, blocks = list_absorbable_ffns(model.config), model.transformer.h
    if not layers:
        return 1.0
    maps = {layer: _residual_map(blocks[layer]) for layer in layers}
    bases = _choose_bases([*maps.values()])
    stretched = max(map(_stretch, bases))
    if not stretched <= MOST_STRETCHED:
        return stretched
    first, *_, last = [layer for layer in range(model.config.n_layer) if blocks[layer].mlp is not None]
    basis, *later = bases
    _set_residual_map(blocks[first], _residual_map(blocks[first]) @ basis, blocks[first].mlp.c_fused.bias @ basis)
    for layer in range(first + 1, last + 1):
        attention = blocks[layer].attn
        attention.c_attn.weight = nn.Parameter(torch.linalg.solve(basis, attention.c_attn.weight))
        attention.c_proj.weight = nn.Parameter(attention.c_proj.weight @ basis)
        attention.c_proj.bias = nn.Parameter(attention.c_proj.bias @ basis)
        if layer in maps:
            basis = later.pop(0)
            attention.c_proj.bias += blocks[layer].mlp.c_fused.bias @ basis
            blocks[layer].mlp = None
    _set_residual_map(
        blocks[last], torch.linalg.solve(basis, _residual_map(blocks[last])), blocks[last].mlp.c_fused.bias
    )
    model.config.pruned_ffn_layers = sorted([*model.config.pruned_ffn_layers, *layers])
    return stretched


def _choose_bases(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    """The basis before the first of these maps, and the one after each; not finite where a map has no inverse."""
    product = functools.reduce(torch.matmul, maps)
    if not product.isfinite().all():
        return [product]
    left, values, _ = torch.linalg.svd(product)
    bases = [left * values.sqrt()]
    for matrix in maps:
        inverse, info = torch.linalg.inv_ex(matrix)
        bases.append(inverse @ bases[-1] if info == 0 else torch.full_like(matrix, torch.nan))
    return bases


def _stretch(basis: torch.Tensor) -> float:
    """By how much a basis stretches or shrinks a direction at most; infinite where it has no inverse."""
    if not basis.isfinite().all():
        return math.inf
    values = torch.linalg.svdvals(basis)
    return torch.stack([values[0], 1 / values[-1]]).max().item()


def _residual_map(block: EntropyGPTBlock) -> torch.Tensor:
    """The matrix M of a linear FFN with its residual sum, `x M + b`."""
    weight = block.mlp.c_fused.weight
    return torch.eye(len(weight), dtype=weight.dtype, device=weight.device) + weight


def _set_residual_map(block: EntropyGPTBlock, matrix: torch.Tensor, bias: torch.Tensor):
    block.mlp.c_fused.weight = nn.Parameter(matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    block.mlp.c_fused.bias = nn.Parameter(bias)


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
