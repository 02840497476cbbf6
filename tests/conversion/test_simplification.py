"""Steps from one architecture to another: what they keep, what they fit, and which there are not."""

import copy

import pytest
import torch
from torch import nn

from entropy_gpt.conversion.calibration import calibrate
from entropy_gpt.conversion.divergence import Reference
from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.conversion.planning import plan_conversion, target_config
from entropy_gpt.conversion.simplification import (
    add_scalars,
    add_thresholds,
    fuse_ffns,
    linearize_ffns,
    make_final_norm_static,
    make_norms_static,
    measure_pruning_damage,
    normalize_weights,
    prune_ffns,
    remove_final_static_norm,
    remove_static_norms,
    replace_activation,
    set_training_fields,
)
from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import EntropyGPTNormalizedConv1D
from tests.architectures import ARCHITECTURES, make_model, make_tokens
from tests.slow import in_turn


def make_batches(blocks=40):
    return make_tokens(blocks, 32).split(8)


def largest_difference(model, twin):
    tokens = make_tokens(3, 23)
    with torch.no_grad():
        expected = model(tokens).logits
        return ((twin(tokens).logits - expected).abs().max() / expected.abs().max()).item()


EXACT = {
    "fuse": ("SM+LN", fuse_ffns, "SM+LN+FuFFN"),
    "scale": ("SM+LN+G", lambda m: add_scalars(m, ffn_residual_scaling=True), "SM+LN+G+ScFFN"),
    "head temperatures": ("SM+LN+G", lambda m: add_scalars(m, attention_temperature="head"), "SM(t_h)+LN+G"),
    "position temperatures": ("SM+R", lambda m: add_scalars(m, attention_temperature="position"), "SM(t)+R"),
    "static norms": ("SM+StaticLN+G+ScFFNi1", remove_static_norms, "SM+G+ScFFNi1"),
    "weight": ("SM+LN+G", lambda m: normalize_weights(m, "weight", ["q", "v", "ffn"]), "SM+LN+G+WN(QV+FFN)"),
    "spectral": ("SM+ScFuFFN", lambda m: normalize_weights(m, "spectral", ["k", "o"]), "SM+ScFuFFN+SN(KO)"),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_steps_keep_the_function_and_their_model(name):
    before, step, after = EXACT[name]
    model = make_model(before).double()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "standard_deviation"):
                module.standard_deviation.fill_(0.4)
    weights = copy.deepcopy(model.state_dict())
    result = step(model)
    assert result.config.notation == after
    assert model.config.notation == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    assert largest_difference(model, result) < 1e-9
    # Spectral normalisation follows the weights in training; a first step must find it where it is.
    for module in result.modules():
        if isinstance(module, EntropyGPTNormalizedConv1D) and module.kind == "spectral":
            weight = module.normalized_weight()
            module.update_singular_vectors(20)
            torch.testing.assert_close(module.normalized_weight(), weight)


def test_a_static_final_norm_goes_into_the_head():
    model = make_model("SM+LN+G", final_normalization="static")
    with torch.no_grad():
        model.transformer.ln_f.standard_deviation.fill_(0.3)
    result = remove_final_static_norm(model)
    assert (result.config.final_normalization, result.config.head_bias) == ("none", True)
    assert not result.config.tie_word_embeddings
    assert largest_difference(model, result) < 1e-5  # as for the folds, in single precision


def test_thresholds_start_where_the_heads_are():
    model, batches = make_model("SM+LN+G"), make_batches()
    for maximum in ("context", "causal"):
        fields = {"entropy_maximum": maximum, "entropy_penalty": "head_mean", "entropy_tolerance": 0.0}
        result = add_thresholds(model, calibrate(model, batches), **fields)
        assert largest_difference(model, result) == 0
        tokens = torch.cat(batches)
        # The mean over the whole text is each head's threshold, so the penalty of the mean is that of its scatter.
        outputs = result.transformer(tokens, output_entropies=True)
        means = torch.stack(outputs.attention_entropies).mean(dim=(1, 3))
        thresholds = torch.stack([block.attn.threshold.entropy_threshold for block in result.transformer.h])
        keys = outputs.visible_keys.float().log()
        largest = keys.max() if maximum == "context" else keys.mean()
        torch.testing.assert_close(thresholds * largest, means)


def test_a_linear_ffn_is_found_again():
    """Least squares over a map that is linear gives that map, and keeps the first of its two parts."""
    model, batches = make_model("SM+LN"), make_batches()
    wrong = copy.deepcopy(model)
    calibration = calibrate(model, batches)
    with torch.no_grad():
        for block in wrong.transformer.h:
            block.mlp.c_proj.weight.normal_()
            block.mlp.c_proj.bias.normal_()
    result = linearize_ffns(wrong, calibration)
    assert torch.equal(result.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_fc.weight)
    assert largest_difference(model, wrong) > 0.1
    assert largest_difference(model, result) < 1e-3


@pytest.mark.parametrize("inner", [None, 30])
def test_linear_ffns_are_the_least_squares_ones(inner):
    """Also where the hidden features are fewer than the outputs, so that not every map can be had."""
    model, batches = make_model("SM+LN+G", n_inner=inner, n_layer=1), make_batches(100)
    result = linearize_ffns(model, calibrate(model, batches))
    read = []
    handle = model.transformer.h[0].mlp.register_forward_hook(lambda m, a, o: read.append((a[0], o)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        handle.remove()
        u, y = (torch.cat([pair[i] for pair in read]).flatten(0, 1).double() for i in range(2))
        fitted, naive = (m.double().transformer.h[0].mlp for m in (result, linearize_ffns(model, None)))
        hidden = nn.functional.pad(fitted.c_fc(u), (0, 1), value=1.0)
        best = (hidden @ torch.linalg.lstsq(hidden, y, driver="gelsd").solution - y).square().mean()
        error, naive_error = ((mlp(u) - y).square().mean() for mlp in (fitted, naive))
    # A fifth of the rows was held out of the fit.
    assert best <= error < 1.02 * best
    assert error < naive_error / 2


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "learnable_leaky_relu", "silu"])
def test_another_activation_is_fitted(name):
    model, batches = make_model("SM+LN+G"), make_batches(160)
    fitted = replace_activation(model, name, calibrate(model, batches, name))
    naive = replace_activation(model, name, None)
    assert fitted.config.activation_function == name
    with_fit, without = Reference(model, make_batches()).compare([fitted, naive])
    assert with_fit.kl < without.kl / 3


def test_static_norms_are_fitted():
    model, batches = make_model("SM+LN+G"), make_batches()
    for step, field in ((make_norms_static, "normalization"), (make_final_norm_static, "final_normalization")):
        fitted, naive = step(model, calibrate(model, batches)), step(model, None)
        assert getattr(fitted.config, field) == "static"
        with_fit, without = Reference(model, make_batches()).compare([fitted, naive])
        assert with_fit.kl < without.kl / 3


def test_pruning_keeps_the_mean_and_is_chosen_by_damage():
    model, batches = make_model("SM+LN+G+ScFFN"), make_batches()
    calibration = calibrate(model, batches)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_proj.bias += 3.0
            block.residual_scaling.ffn_beta.fill_(1.0)
        model.transformer.h[1].mlp.c_proj.weight *= 1e-3
    calibration = calibrate(model, batches)
    damage = measure_pruning_damage(model, batches, calibration)
    assert min(damage, key=damage.get) == 1
    pruned, naive = prune_ffns(model, [1], calibration), prune_ffns(model, [1], None)
    assert pruned.config.pruned_ffn_layers == [1]
    with_mean, without = Reference(model, make_batches()).compare([pruned, naive])
    assert with_mean.kl == pytest.approx(damage[1], rel=0.5)
    assert with_mean.kl < without.kl / 10
    with torch.no_grad():
        model.transformer.h[1].residual_scaling.ffn_beta.fill_(0.5)
    with pytest.raises(ConversionError, match=r"layer 1 can't be pruned: .* scaled by 0.5"):
        prune_ffns(model, [1], calibration)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
def test_weights_of_zeros_are_not_normalised(kind):
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[:, 3] = 0
    with pytest.raises(ConversionError, match=r"h.1.attn.c_attn.weight has columns of zeros"):
        normalize_weights(model, kind, ["q"])
    assert largest_difference(model, normalize_weights(model, kind, ["k", "v"])) < 1e-5


def test_what_acts_in_training_alone_is_set_without_a_step():
    model = make_model("EReg(SM(t)+ScFuFFN)")
    fields = {"resid_pdrop": 0.3, "entropy_coefficient": 7.0, "entropy_maximum": "causal", "detect_divergence": True}
    target = target_config(model.config, "EReg(SM(t)+ScFuFFN)", **fields)
    assert plan_conversion(model.config, target).steps == ()
    result = set_training_fields(model, target)
    assert {name: getattr(result.config, name) for name in fields} == fields
    assert result.transformer.h[0].mlp.dropout.p == 0.3
    assert largest_difference(model, result) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("notation", ["EReg(SM(t)+ScFuFFNi1)", "SM+StaticLN+R+WN(QK)"])
def test_steps_run_where_the_model_is(notation):
    model, batches = make_model("SM+LN+G").cuda(), make_batches()
    target = target_config(model.config, notation, final_normalization="none")
    for step in plan_conversion(model.config, target).steps:
        calibration = (
            calibrate(model, batches, step.hidden_activation, step.largest_scores) if step.calibrated else None
        )
        model = step.apply(model, calibration)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}
    assert model(make_tokens().cuda()).logits.isfinite().all()


@pytest.mark.parametrize(("notation", "final"), in_turn(ARCHITECTURES, ["layernorm", "static", "none"]))
def test_every_architecture_is_reached_from_gpt2(notation, final, tmp_path):
    source, batches = make_model("SM+LN+G").double(), make_batches()
    target = target_config(source.config, notation, final_normalization=final)
    plan = plan_conversion(source.config, target)
    model = source
    for step in plan.steps:
        calibration = (
            calibrate(model, batches, step.hidden_activation, step.largest_scores) if step.calibrated else None
        )
        before, model = model, step.apply(model, calibration)
        if step.naive is not None:
            assert step.naive(before).config.notation == model.config.notation
        if not step.calibrated:
            assert largest_difference(before, model) < 1e-9
    assert (model.config.notation, model.config.final_normalization) == (notation, final)
    assert model.num_parameters() == EntropyGPTForCausalLM(target).num_parameters()  # as a dry run says
    model.save_pretrained(tmp_path)
    reloaded = EntropyGPTForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in reloaded.state_dict().items())
    assert largest_difference(model, reloaded) < 1e-12


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("SM+G", "SM+LN+G", "normalization 'none' to 'layernorm'"),
        ("SM", "SM+G", "activation_function 'identity' to 'gelu_new'"),
        ("SM+ScFuFFN", "SM", "ffn_type 'fused' to 'mlp', ffn_residual_scaling True to False"),
        ("SM+LN+FFNi1", "SM+LN", "pruned_ffn_layers"),
        ("SM(t)+LN+G", "SM+LN+G", "attention_temperature"),
        ("EReg(SM+LN+G)", "SM+LN+G", "entropy_regularization"),
        ("SM+LN+G+WN(QK)", "SM+LN+G", "weight_normalization"),
        ("SM+LN+G+WN(QK)", "SM+LN+R+WN(QK)", "has normalised weights"),
    ],
)
def test_what_no_step_brings_back_is_refused(source, target, message):
    config = make_model(source).config
    with pytest.raises(ConversionError, match=message):
        plan_conversion(config, target_config(config, target))


def test_targets_that_can_not_be_had_are_named():
    config = make_model("SM+LN+G").config
    with pytest.raises(ConversionError, match="Unknown token 'Sc'"):
        target_config(config, "SM+Sc")
    with pytest.raises(ConversionError, match="prunes the deepest 9 layers"):
        target_config(config, "SM+FFNi9")
    with pytest.raises(ConversionError, match="fused"):
        target_config(config, "SM+FuFFN+G")


def test_nothing_to_do_is_no_step():
    config = make_model("SM+LN+G").config
    assert plan_conversion(config, target_config(config, "SM+LN+G")).steps == ()


@torch.no_grad()
def test_divergence_is_that_of_all_logits(monkeypatch):
    model, other = make_model("SM+LN+G"), make_model("SM+LN+G")
    batches = make_batches(6)
    monkeypatch.setattr("entropy_gpt.conversion.divergence.MOST_LOGITS", 1000)
    same, found = Reference(model, batches).compare([model, other])
    tokens = torch.cat(batches)
    p, q = (m(tokens).logits[:, :-1].double().log_softmax(dim=-1) for m in (model, other))
    assert abs(same.kl) < 1e-9
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(dim=-1).mean().item(), rel=1e-5)
    assert found.nats == pytest.approx(-q.gather(-1, tokens[:, 1:, None]).mean().item(), rel=1e-5)
