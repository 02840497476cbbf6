"""The model as a program: the same logits as torch's in every architecture, whole and token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program import linear, program
from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.attention import scale_scores
from entropy_gpt.evaluation.private_inference.program.contests import subtract_maximum
from entropy_gpt.evaluation.private_inference.program.fixed_point import Float64Arithmetic
from entropy_gpt.evaluation.private_inference.program.nonlinear import piecewise_gelu
from entropy_gpt.evaluation.private_inference.program.program import (
    LOGITS,
    TABLES,
    TOKENS,
    build_steps,
    weight_shapes,
)
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from modeling_entropy_gpt import layers
from tests.architectures import ARCHITECTURES, make_config, make_model
from tests.slow import in_turn, slow_but


LENGTH = 12
JAX = ["SM+LN+G", "SM+LN+LeakyR+FFNi[0]", "EReg(SM(t)+ScFuFFN)", "Pow4+LN+G"]
EXACT = PrivateSettings(softmax="stock", gelu="tanh")


def clear_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


def run(model, private: PrivateSettings, tokens: np.ndarray, span: Span, kept: dict | None = None, xp=np) -> dict:
    config, weights = prepare_weights(model)
    rows = np.eye(config.vocab_size, dtype=np.float32)[tokens]
    ops = Arithmetic(xp) if private.softmax == "efficient" else Float64Arithmetic(xp)
    return run_steps(build_steps(config, private, span), ops, {**weights, **(kept or {}), TOKENS: rows})


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 101, LENGTH)


@pytest.mark.parametrize(("notation", "softmax"), in_turn(ARCHITECTURES, ["stock", "tuned"]))
def test_logits_are_the_models_own(notation, softmax, tokens):
    model = make_model(notation)
    private = PrivateSettings(softmax=softmax, gelu="tanh")
    logits = run(model, private, tokens, Span(0, LENGTH, LENGTH))[LOGITS]
    assert np.abs(logits - clear_logits(model, tokens)).max() < 2e-4


@pytest.mark.parametrize("singular", [False, True])
def test_ffns_are_absorbed_unless_they_are_singular(singular, tokens):
    model = make_model("EReg(SM(t)+ScFuFFN)", n_layer=4)
    if singular:
        with torch.no_grad():
            block = model.transformer.h[2]
            scales = block.residual_scaling.ffn_alpha * block.residual_scaling.ffn_beta
            block.mlp.c_fused.weight[:] = -scales * torch.eye(model.config.n_embd)
    config, _ = prepare_weights(model)
    assert config.pruned_ffn_layers == ([] if singular else [1, 2])
    logits = run(model, EXACT, tokens, Span(0, LENGTH, LENGTH))[LOGITS]
    assert np.abs(logits - clear_logits(model, tokens)).max() < 2e-4


@pytest.mark.parametrize("rows", [1, 34, 100])
def test_embedding_in_parts_changes_nothing(rows, tokens, monkeypatch):
    model = make_model("SM+ScFuFFN")
    span = Span(0, LENGTH, LENGTH)
    whole = run(model, PrivateSettings(), tokens, span)[LOGITS]
    monkeypatch.setattr(linear, "MOST_EMBEDDED", rows)
    assert np.array_equal(run(model, PrivateSettings(), tokens, span)[LOGITS], whole)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_the_cheap_forms_stay_near(notation, tokens):
    model = make_model(notation)
    logits = run(model, PrivateSettings(), tokens, Span(0, LENGTH, LENGTH))[LOGITS]
    clear = clear_logits(model, tokens)
    assert np.abs(logits - clear).max() < 0.01 * np.abs(clear).max()


@pytest.mark.parametrize("notation", slow_but(JAX[-1:], JAX))
def test_jax_computes_the_same_as_numpy(notation, tokens):
    jnp = pytest.importorskip("jax.numpy")
    model = make_model(notation)
    for private in (EXACT, PrivateSettings()):
        ours = run(model, private, tokens, Span(0, LENGTH, LENGTH))[LOGITS]
        theirs = run(model, private, tokens, Span(0, LENGTH, LENGTH), xp=jnp)[LOGITS]
        assert np.abs(ours - np.asarray(theirs)).max() < 1e-3


@pytest.mark.parametrize("notation", slow_but(ARCHITECTURES[::3], ARCHITECTURES))
def test_one_position_and_one_token_more_are_as_the_whole(notation, tokens):
    model = make_model(notation)
    clear = clear_logits(model, tokens)
    last = run(model, EXACT, tokens, Span(0, LENGTH))[LOGITS]
    assert last.shape == (1, 101)
    assert np.abs(last - clear[-1:]).max() < 2e-4
    kept = run(model, EXACT, tokens[:8], Span(0, 8))
    for position in range(8, LENGTH):
        kept = run(model, EXACT, tokens[position : position + 1], Span(position, 1), kept)
        assert np.abs(kept[LOGITS] - clear[position : position + 1]).max() < 2e-4
    several = run(model, EXACT, tokens[8:], Span(8, LENGTH - 8, LENGTH - 8), kept_before(kept, 8))[LOGITS]
    assert np.abs(several - clear[8:]).max() < 2e-4


@pytest.mark.parametrize("asked", slow_but([1, 12], [1, 5, 11, 12, 15]))
def test_temperatures_go_with_positions(asked):
    """Of tokens whose keys are kept, too, and where they multiply scores for some rows and queries for others."""
    model, tokens = make_model("SM(t)+ScFuFFN"), np.random.default_rng(1).integers(2, 101, 20)
    private = PrivateSettings()
    clear = clear_logits(model, tokens)
    kept = run(model, private, tokens[:asked], Span(0, asked, asked))
    logits = [kept[LOGITS]]
    for position in range(asked, len(tokens)):
        kept = run(model, private, tokens[position : position + 1], Span(position, 1), kept)
        logits.append(kept[LOGITS])
    assert np.abs(np.concatenate(logits) - clear).max() < 0.01 * np.abs(clear).max()
    several = run(model, private, tokens[asked:], Span(asked, len(tokens) - asked, 2), kept_before(kept, asked))
    assert np.abs(several[LOGITS] - clear[-2:]).max() < 0.01 * np.abs(clear).max()


def kept_before(kept: dict, position: int) -> dict:
    return {name: part[:, :position] for name, part in kept.items() if name.endswith((".keys", ".values"))}


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_a_client_knows_the_shapes_of_weights_from_the_config(notation):
    config, weights = prepare_weights(make_model(notation))
    assert {name: weight.shape for name, weight in weights.items()} == weight_shapes(config)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_embeddings_stay_as_they_are_to_the_last_bit(notation):
    """Else a public checkpoint's would not be public any more."""
    model = make_model(notation)
    _, weights = prepare_weights(model)
    for name in TABLES:
        assert np.array_equal(weights[name], model.get_submodule(f"transformer.{name}").weight.detach().numpy())


def test_the_model_is_left_as_it_is(tokens):
    model = make_model("SM+LN+G")
    before = clear_logits(model, tokens)
    prepare_weights(model)
    assert np.array_equal(before, clear_logits(model, tokens))


def test_gelu_is_finer_where_no_norm_scales_its_errors(tokens, monkeypatch):
    model, private = make_model("SM+G", n_layer=6), PrivateSettings(softmax="stock")

    def error() -> float:
        logits = run(model, private, tokens, Span(0, LENGTH, LENGTH))[LOGITS]
        return np.abs(logits - clear_logits(model, tokens)).max()

    fine = error()
    monkeypatch.setattr(program, "fine_gelu", piecewise_gelu)
    assert fine < error() / 5


@given(st.data())
def test_temperatures_of_early_rows_divide_their_scores(data):
    heads, queries, start = (data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 7), (0, 4)))
    early, keys = data.draw(st.integers(1, queries)), start + queries
    rng = np.random.default_rng(0)
    scores, factors = rng.normal(size=(heads, queries, keys)), rng.uniform(0.1, 3, (heads, keys))
    scaled = scores * np.where(np.arange(queries) < early, factors[:, start:], 1.0)[:, :, None]
    visible = np.tri(queries, keys, start, dtype=bool)
    expected = subtract_maximum(Arithmetic(np), scaled[:, visible], queries, keys, (keys,) if keys > 1 else ())
    found = scale_scores(Arithmetic(np), scores[:, visible], factors, queries, keys, early)
    found = subtract_maximum(Arithmetic(np), found, queries, keys, (keys,) if keys > 1 else ())
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("softmax", ["efficient", "stock", "tuned"])
def test_scores_that_are_low_everywhere_do_not_lose_attention(softmax, tokens):
    model = make_model("SM+LN+R")
    with torch.no_grad():  # a row's scores all move together with its query's share of the keys' common part
        for block in model.transformer.h:
            block.attn.c_attn.bias[: model.config.n_embd] = -20.0
            block.attn.c_attn.bias[model.config.n_embd : 2 * model.config.n_embd] = 20.0
    logits = run(model, PrivateSettings(softmax=softmax), tokens, Span(0, LENGTH, LENGTH))[LOGITS]
    clear = clear_logits(model, tokens)
    assert np.abs(logits - clear).max() < 0.01 * np.abs(clear).max()


def test_what_has_no_private_form_is_refused():
    config = make_config("SM+LN+G")
    config.activation_function = "silu"
    with pytest.raises(PrivateInferenceError, match=r"activation_function='silu'.*gelu_new.*identity"):
        build_steps(config, PrivateSettings(), Span(0, 4))
    with pytest.raises(PrivateInferenceError, match=r"65 tokens are not possible.*n_positions=64"):
        build_steps(make_config("SM"), PrivateSettings(), Span(60, 5))


def test_no_weight_is_a_constant_of_the_program():
    """What a step closes over would be public: equal architectures with other weights have equal steps."""
    first, second = (prepare_weights(make_model("EReg(SM(t)+ScFuFFN)"))[0] for _ in range(2))
    steps = [build_steps(config, PrivateSettings(), Span(0, LENGTH)) for config in (first, second)]
    for ours, theirs in zip(*steps, strict=True):
        assert (ours.inputs, ours.outputs) == (theirs.inputs, theirs.outputs)
        for step in (ours, theirs):
            keywords = getattr(step.function, "keywords", {})
            assert all(
                callable(value) or isinstance(value, int | float | tuple | Span | None) for value in keywords.values()
            )


def test_the_gelus_by_tanh_are_those_of_the_layers():
    assert program.TANH_GELUS == layers.TANH_GELUS
