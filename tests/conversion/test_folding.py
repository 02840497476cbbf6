"""Folding: the same logits, nothing left of what was folded, and no fold without effect."""

import copy
import math

import pytest
import torch
from torch import nn

from entropy_gpt.conversion.errors import ConversionError, NotFiniteError
from entropy_gpt.conversion.folding import FOLDS, MOST_STRETCHED, absorb_linear_ffns, fold, list_absorbable_ffns
from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import EntropyGPTNormalizedConv1D, EntropyGPTStaticLayerNorm
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.slow import in_turn, slow_but


FOLDED = (
    *ARCHITECTURES,
    "SM(t_h)+StaticLN+ScFFN",
    "SM(t_h)+StaticLN+G+ScFFN+WN(QKVO+FFN)",
    "SM+StaticLN+ScFuFFNi1+SN(QK)",
    "SM+LN+G+ScFFN",
)


SOFTMAX_ONLY = ("EReg(SM(t_h)+StaticLN+ScFFN)", "SM+ScFuFFN", "SM(t_h)+ScFuFFNi1+WN(QK+FFN)")
# What a traced graph may hold beside softmax: products and sums, what moves numbers, and the mask that is added.
LINEAR = {"embedding", "addmm", "linear", "matmul", "mul", "add"}
MOVING = {"view", "reshape", "transpose", "expand", "contiguous", "unsqueeze", "to", "dropout", "getitem", "alias"}
MASK = {"where", "zeros"}


def make_asymmetric(notation, **fields):
    """Weights, scales and static norms that are far from what they start with."""
    model = make_model(notation, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("ffn_alpha", "ffn_beta")):
                parameter.fill_(0.5 + torch.rand(()).item())
            elif name.endswith("bias") and parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for module in model.modules():
            if isinstance(module, EntropyGPTStaticLayerNorm):
                module.standard_deviation.fill_(0.5 + torch.rand(()).item())
    return model


def largest_difference(model, twin):
    tokens = make_tokens(3, 23)
    expected = model(tokens).logits
    return ((twin(tokens).logits - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("notation", "final"), in_turn(FOLDED, ["layernorm", "static", "none"]))
@torch.no_grad()
def test_a_folded_model_gives_the_same_logits(notation, final, tmp_path):
    model = make_asymmetric(notation, final_normalization=final)
    before = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model).double()
    assert largest_difference(exact, fold(exact)) < 1e-12
    folded = fold(model)
    # Or what float32 itself rounds off, folded or not: in a few of these models it is more on some processors.
    rounding = largest_difference(exact, model)
    assert largest_difference(exact, folded) < max(1e-5, 4 * rounding) < 1e-4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    folded.save_pretrained(tmp_path)
    assert largest_difference(folded, EntropyGPTForCausalLM.from_pretrained(tmp_path)) == 0


def test_how_a_model_generates_outlives_its_folding():
    model = make_model("SM+ScFuFFN", use_cache=False)  # as after training with the Trainer
    model.generation_config.update(use_cache=True, max_new_tokens=7)
    folded = fold(model).generation_config
    assert (folded.use_cache, folded.max_new_tokens) == (True, 7)
    assert folded is not model.generation_config


@torch.no_grad()
def test_a_negative_scale_of_the_stream_is_kept():
    model = make_asymmetric("SM+ScFFN")
    model.transformer.h[1].residual_scaling.ffn_beta.neg_()
    assert largest_difference(model, fold(model)) < 1e-5


@pytest.mark.parametrize("final", ["layernorm", "none"])
@pytest.mark.parametrize("name", ["ffn_alpha", "ffn_beta"])
@torch.no_grad()
def test_a_scale_of_zero_is_named(name, final):
    model = make_asymmetric("SM+ScFFN", final_normalization=final)
    getattr(model.transformer.h[1].residual_scaling, name).zero_()
    with pytest.raises(ConversionError, match=f"{name}=0 in layer 1 can't be folded"):
        fold(model)


@torch.no_grad()
def test_a_scale_of_zero_stays_where_scales_are_not_folded():
    model = make_asymmetric("SM+LN+G+ScFFN")
    model.transformer.h[1].residual_scaling.ffn_beta.zero_()
    assert largest_difference(model, fold(model)) < 1e-5


@torch.no_grad()
def test_columns_of_zeros_under_weight_normalisation_stay_zero():
    model = make_asymmetric("SM+ScFFN+WN(QKV+FFN)")
    for name in ("attn.c_attn", "mlp.c_fc"):
        model.transformer.h[1].get_submodule(name).weight[:, 3] = 0
    assert model(make_tokens()).logits.isfinite().all()
    folded = fold(model)
    assert not folded.transformer.h[1].attn.c_attn.weight[:, 3].any()
    assert largest_difference(model, folded) < 1e-5


def zero_norm_constant(model):
    model.transformer.h[1].ln_1.standard_deviation.zero_()


def enormous_temperature(model):
    model.transformer.h[1].attn.temperature.log_temperature[2] = -1e5


def enormous_scale(model):
    model.transformer.h[1].residual_scaling.ffn_beta.fill_(1e30)
    model.transformer.h[2].residual_scaling.ffn_beta.fill_(1e30)


def damaged_weight(model):
    model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            zero_norm_constant,
            r"finite: transformer\.h\.1\.attn\.c_attn\.weight\. A norm constant or a temperature is 0",
        ),
        (enormous_temperature, r"finite: transformer\.h\.1\.attn\.c_attn\.weight, .*bias\. A norm constant"),
        (enormous_scale, r"finite: lm_head\.weight\. .* or torch\.float32 too narrow"),
        (damaged_weight, r"finite: transformer\.h\.1\.attn\.c_attn\.weight\. The model to fold is damaged"),
    ],
)
@torch.no_grad()
def test_what_is_not_finite_is_named(change, message):
    model = make_asymmetric("SM(t_h)+StaticLN+ScFFN", final_normalization="none")
    change(model)
    with pytest.raises(NotFiniteError, match=message):
        fold(model)


@pytest.mark.parametrize("step", FOLDS, ids=lambda step: step.__name__)
@torch.no_grad()
def test_each_fold_keeps_the_function_alone(step):
    """In double precision; with those before it, on whose result it builds."""
    model = make_asymmetric("SM(t_h)+StaticLN+ScFFN+WN(QKVO+FFN)", final_normalization="static").double()
    folded = copy.deepcopy(model)
    for earlier in FOLDS[: FOLDS.index(step)]:
        earlier(folded)
    parameters = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    step(folded)
    left = folded.state_dict()
    assert left.keys() != parameters.keys()
    assert largest_difference(model, folded) < 1e-12


@pytest.mark.parametrize("final", ["layernorm", "static", "none"])
@pytest.mark.parametrize(
    ("notation", "layers"),
    [
        ("EReg(SM(t)+ScFuFFN)", [1, 2, 3]),
        ("SM(t_h)+ScFFN", [1, 2, 3]),
        ("SM", [1, 2, 3]),
        ("SM+StaticLN+ScFuFFN", [1, 2, 3]),
        ("SM+ScFuFFNi2", [1]),
        ("SM+ScFuFFNi[0,2]", [3]),
        ("SM+ScFuFFNi[1,2,3]", []),
        ("SM+FFNi5", []),
        ("SM+R", []),
        ("SM+LN", []),
    ],
)
@torch.no_grad()
def test_linear_ffns_are_absorbed(notation, layers, final):
    model = make_asymmetric(notation, n_layer=5, final_normalization=final).double()
    for block in model.transformer.h:
        if block.mlp is not None:  # not so far from the residual sum's own part
            next(block.mlp.parameters()).mul_(0.5)
    folded = fold(model)
    assert list_absorbable_ffns(folded.config) == layers
    pruned = folded.config.pruned_ffn_layers
    assert 1 <= absorb_linear_ffns(folded) < MOST_STRETCHED
    assert folded.config.pruned_ffn_layers == sorted(pruned + layers)
    assert all(folded.transformer.h[layer].mlp is None for layer in layers)
    assert list_absorbable_ffns(folded.config) == []
    assert largest_difference(model, folded) < 1e-10


@pytest.mark.parametrize("stretch", [0.0, 1e-9, 1 / 300, 300, math.nan])
@torch.no_grad()
def test_ffns_that_stretch_or_shrink_the_stream_far_are_left(stretch):
    """x + FFN(x) that takes the stream off can't be undone, nor can bases of any scale be told in fixed point."""
    model = fold(make_model("SM+ScFuFFN", n_layer=3).double())
    weight = model.transformer.h[1].mlp.c_fused.weight
    weight.copy_(torch.eye(len(weight)) * (stretch - 1))
    assert_left(model)


@torch.no_grad()
def test_ffns_that_stretch_the_stream_between_are_left():
    """In the first and the last basis there is nothing to be seen of it."""
    model = fold(make_model("SM+ScFuFFN", n_layer=4).double())
    for layer, stretch in ((1, 1 / 300), (2, 300)):
        weight = model.transformer.h[layer].mlp.c_fused.weight
        weight.copy_(torch.eye(len(weight)) * (stretch - 1))
    assert_left(model)


@torch.no_grad()
def test_scales_that_were_not_folded_are_left():
    model = make_asymmetric("SM+ScFuFFN", n_layer=4)
    assert absorb_linear_ffns(model) == 1
    assert model.config.pruned_ffn_layers == []


def test_a_model_that_was_converted_here_can_do_without_ffns():
    model = EntropyGPTForCausalLM.from_pretrained("model_cards/models/converted")
    assert absorb_linear_ffns(fold(model.double())) < MOST_STRETCHED / 4


def assert_left(model):
    before = copy.deepcopy(model.state_dict())
    assert absorb_linear_ffns(model) > MOST_STRETCHED
    assert model.config.pruned_ffn_layers == []
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def forget_weight_normalization(model):
    for module in model.modules():
        if isinstance(module, EntropyGPTNormalizedConv1D):
            module.gain.copy_(module._normalized(module.weight).norm(dim=1))


def forget_norms(model):
    for block in model.transformer.h:
        block.ln_1 = block.ln_2 = nn.Identity()


def forget_final_norm(model):
    model.transformer.ln_f = nn.Identity()


def forget_final_bias(model):
    model.transformer.ln_f.bias.zero_()


def forget_temperatures(model):
    for block in model.transformer.h:
        block.attn.temperature.log_temperature.zero_()


def forget_alpha(model):
    for block in model.transformer.h:
        block.residual_scaling.ffn_alpha.fill_(1.0)


def forget_beta(model):
    for block in model.transformer.h:
        block.residual_scaling.ffn_beta.fill_(1.0)


def forget_inner_bias(model):
    for block in model.transformer.h:
        block.mlp.c_fc.bias.zero_()


@pytest.mark.parametrize(
    "forget",
    [
        forget_weight_normalization,
        forget_norms,
        forget_final_norm,
        forget_final_bias,
        forget_temperatures,
        forget_alpha,
        forget_beta,
        forget_inner_bias,
    ],
    ids=lambda forget: forget.__name__,
)
@torch.no_grad()
def test_what_is_folded_would_be_missed(forget):
    """The control: a fold that left out any part of what it removes would give other logits."""
    model = make_asymmetric("SM(t_h)+StaticLN+ScFFN+WN(QKVO+FFN)", final_normalization="static")
    if forget is forget_weight_normalization:
        for module in model.modules():
            if isinstance(module, EntropyGPTNormalizedConv1D):
                module.gain.mul_(1.5)
    without = copy.deepcopy(model)
    forget(without)
    assert largest_difference(fold(model), without) > 1e-2


def numeric_operations(model):
    """Names of the operations in the traced graph that yield numbers; the mask is made of truth values."""
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    graph = torch.export.export(model, (), {"input_ids": make_tokens()}, strict=False).graph
    operations = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and torch.is_tensor(value) and value.is_floating_point():
            operations.add(getattr(node.target, "overloadpacket", node.target).__name__)
    return operations


@pytest.mark.parametrize("notation", slow_but(SOFTMAX_ONLY[:1], SOFTMAX_ONLY))
def test_a_softmax_only_model_is_embeddings_linear_maps_and_softmax(notation):
    model = make_asymmetric(notation, final_normalization="static")
    assert numeric_operations(fold(model)) - LINEAR - MOVING - MASK == {"softmax"}
    # What the fold removes, or another architecture has, would show.
    assert {"mean", "div"} <= numeric_operations(model)
    assert {"layer_norm", "gelu"} <= numeric_operations(fold(make_asymmetric("SM+LN+G")))
