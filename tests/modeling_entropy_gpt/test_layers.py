"""Activations; normalised linear maps: what their buffers follow, the types and devices of tools, and zeros."""

import copy

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers.activations import ACT2FN

from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.layers import LEARNED_SCALARS, TANH_GELUS, EntropyGPTNormalizedConv1D, build_activation
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_config, make_model, make_tokens
from tests.slow import in_turn


SPECTRAL = "SM+ScFFN+SN(QK+FFN)"
NORMALIZED = (SPECTRAL, "SM+ScFuFFN+SN(QKVO+FFN)", "SM+ScFFN+WN(QKV+FFN)")


@pytest.mark.parametrize("name", [*TANH_GELUS, "gelu", "relu", "silu"])
def test_activations_are_those_of_transformers(name):
    numbers = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    got, expected = build_activation(name)(numbers), ACT2FN[name](numbers)
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad(values.sum(), numbers, create_graph=True)[0] for values in (got, expected)]
    torch.testing.assert_close(*slopes)
    if name != "relu":
        torch.testing.assert_close(*(torch.autograd.grad(slope.sum(), numbers)[0] for slope in slopes))


def stale(model):
    """Singular vectors behind the weights, as after a step of training: an update would move them."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("singular_vectors"):
                buffer.copy_(torch.nn.functional.normalize(torch.randn_like(buffer), dim=-1))
    return model


def singular_vectors(model):
    return {name: t.clone() for name, t in model.named_buffers() if "singular_vectors" in name}


def train(model, steps=3):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    for _ in range(steps):
        tokens = make_tokens()
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("training", "grad", "frozen", "moves"),
    [
        (True, True, False, True),
        (True, True, True, False),
        (True, False, False, False),
        (False, True, False, False),
    ],
)
def test_singular_vectors_move_where_weights_are_trained(training, grad, frozen, moves):
    model = stale(make_model(SPECTRAL)).train(training)
    model.transformer.h.requires_grad_(not frozen)
    before = singular_vectors(model)
    with torch.set_grad_enabled(grad):
        model(make_tokens())
    after = singular_vectors(model)
    assert all(torch.equal(after[name], before[name]) != moves for name in before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_moves_singular_vectors_once(use_reentrant):
    model = stale(make_model(SPECTRAL, **NO_DROPOUT))
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(0)
    train(model)
    torch.manual_seed(0)
    train(twin)
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize(("notation", "include_buffers"), in_turn(NORMALIZED, [False, True]))
def test_a_model_made_without_memory_loads(notation, include_buffers, tmp_path, compared):
    model = make_model(notation)
    model.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=include_buffers):
        empty = EntropyGPTForCausalLM(make_config(notation))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    loaded = load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}).eval()
    tokens = make_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    compared("accelerate", f"logits of {notation} after init_empty_weights and load_checkpoint_and_dispatch", "equal")


@pytest.mark.parametrize("notation", NORMALIZED)
@pytest.mark.parametrize(("parameters", "buffers"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_parameters_and_buffers_of_different_types(notation, parameters, buffers):
    """As PEFT's preparation for training on quantised weights leaves them, or a cast of parameters alone."""
    model = make_model(notation, **NO_DROPOUT)
    tokens = make_tokens()
    expected = model(tokens).logits
    for tensor in model.parameters():
        tensor.data = tensor.data.to(parameters)
    for tensor in model.buffers():
        tensor.data = tensor.data.to(buffers)
    found = model(tokens).logits
    assert found.dtype == parameters
    assert (found.float() - expected).norm() / expected.norm() < 0.05
    train(model, 1)
    assert {name: t.dtype for name, t in model.named_buffers()} == dict.fromkeys(dict(model.named_buffers()), buffers)


@pytest.mark.parametrize("kind", ["weight", "spectral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_weights_stay_zero_and_are_trained_on(kind, dtype):
    """A feature without weights, and a group of features without any: no division by their length."""
    linear = EntropyGPTNormalizedConv1D(8, 6, kind, [True, False, True, True])
    linear.weight.data.normal_()
    linear.weight.data[:, 0] = 0
    linear.weight.data[:, 4:6] = 0
    linear.initialize()
    linear.to(dtype)
    assert all(tensor.isfinite().all() for tensor in linear.state_dict().values())
    weight = linear.normalized_weight()
    assert weight.isfinite().all()
    assert not weight[:, [0, 4, 5]].any()
    (linear(torch.randn(3, 6, dtype=dtype)) ** 2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in linear.parameters())


def test_singular_vectors_are_found_once_there_are_weights():
    linear = EntropyGPTNormalizedConv1D(8, 6, "spectral", [True, True])
    linear.weight.data.zero_()
    linear.initialize()
    linear.update_singular_vectors()
    linear.weight.data.normal_()
    linear.update_singular_vectors(50)
    for group in linear.normalized_weight().chunk(2, dim=1):
        torch.testing.assert_close(torch.linalg.svdvals(group)[0], torch.tensor(1.0))


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_learned_scalar_is_on_the_list(notation):
    """What blocks learn beyond linear maps and norms, where the configuration says so, and only there."""
    model = make_model(notation)
    ordinary = ("weight", "bias", "gain")
    found = {
        name.split(".", 3)[3]
        for name, _ in model.named_parameters()
        if name.startswith("transformer.h.") and not name.endswith(ordinary)
    }
    assert found == {scalar.place for scalar in LEARNED_SCALARS if scalar.is_in(model.config)}
    for scalar in LEARNED_SCALARS:
        parameters = [scalar.get(block) for block in model.transformer.h]
        assert any(parameter is not None for parameter in parameters) == scalar.is_in(model.config)


@pytest.mark.parametrize("scalar", LEARNED_SCALARS, ids=lambda scalar: scalar.name)
def test_learned_scalars_begin_where_the_configuration_says(scalar):
    notation = "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)"
    start = {} if scalar.start is None else {scalar.start: 0.25}
    model = EntropyGPTForCausalLM(make_config(notation, log_sum_coefficient=1e-3, **start))
    values = scalar.get(model.transformer.h[0])
    values = values.exp() if scalar.is_logarithm else values
    torch.testing.assert_close(values, torch.full_like(values, 0.25 if start else 0.01))
