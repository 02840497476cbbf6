"""Attention functions in softmax's place: values, entropies and gradients against their definition, everywhere."""

import math

import pytest
import torch

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM, EntropyGPTModel, blocks, modeling_entropy_gpt
from modeling_entropy_gpt.attention_functions import log_function, whole_attention
from modeling_entropy_gpt.entropy_attention import entropy_attention, row_log_sums
from tests.architectures import NO_DROPOUT, make_config, make_model, make_tokens
from tests.slow import in_turn, slow_cases


FUNCTIONS = ("power4", "power2", "clamped")
# transformers sets it
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
NOTATIONS = ("Pow4(t_h)+ScFuFFN", "Pow2(t)+ScFuFFN", "ClSM+LN+G")


def define(function: str, x: torch.Tensor) -> torch.Tensor:
    """f, as the paper of each would write it."""
    return {
        "power4": lambda: torch.relu(1 + x / 4) ** 4,
        "power2": lambda: torch.relu(1 + x / 2) ** 2,
        "clamped": lambda: x.clamp(-7.4, 3.0).exp(),
    }[function]()


def naive(query, key, value, shift, visible, function):
    """Output and entropies, by the definition."""
    scores = query @ key.mT * query.shape[-1] ** -0.5
    floors = (2.0**-8 / visible.sum(dim=-1, keepdim=True).clamp(min=1)).clamp(min=2.0**-17)
    weights = (define(function, scores - shift[..., None]) + floors) * visible
    sums = weights.sum(dim=-1, keepdim=True)
    probabilities = weights / sums.where(sums > 0, 1.0)
    positive = probabilities > 0
    logarithms = torch.where(positive, probabilities.where(positive, 1.0).log(), 0.0)
    return probabilities @ value, -(probabilities * logarithms).sum(dim=-1)


def make_states(batch_size=2, heads=3, length=7, keys=9, scale=2.0):
    def states(*shape):
        return (torch.randn(*shape, dtype=torch.double) * scale).requires_grad_()

    query, key, value = (states(batch_size, heads, size, 4) for size in (length, keys, keys))
    return query, key, value, states(batch_size, heads, length)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_output_entropies_and_every_gradient_are_those_of_the_definition(function):
    query, key, value, shift = states = make_states()
    visible = torch.ones(7, 9, dtype=torch.bool).tril(2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :2] = False
    visible = visible & mask[:, None, None]
    expected = naive(*states, visible, function)
    found = entropy_attention(query, key, value, mask, is_causal=True, function=function, shift=shift)
    upstream = [torch.randn_like(result) for result in expected]
    for found_result, expected_result in zip(found, expected, strict=True):
        torch.testing.assert_close(found_result, expected_result, rtol=1e-6, atol=1e-8)
    expected_gradients = torch.autograd.grad(expected, states, upstream)
    found_gradients = torch.autograd.grad(found, states, upstream)
    for found_gradient, expected_gradient in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found_gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_row_of_zeros_attends_alike_to_what_it_sees_and_has_no_gradient_by_its_scores(function):
    query, key, value, shift = states = make_states()
    shift = shift + 1000
    output, entropies = entropy_attention(query, key, value, is_causal=True, function=function, shift=shift)
    for row in range(7):
        seen = row + 3
        torch.testing.assert_close(output[:, :, row], value[:, :, :seen].mean(dim=2))
        torch.testing.assert_close(entropies[:, :, row], torch.full((2, 3), math.log(seen), dtype=torch.double))
    gradients = torch.autograd.grad(output.square().sum() + entropies.square().sum(), states)
    assert all(not gradient.any() for gradient in (gradients[0], gradients[1], gradients[3]))
    assert gradients[2].isfinite().all() and gradients[2].any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_row_that_sees_nothing_has_neither_output_nor_entropy(function):
    query, key, value, shift = states = make_states()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    output, entropies = entropy_attention(query, key, value, mask, function=function, shift=shift)
    assert not output[0].any() and not entropies[0].any() and output[1].any()
    gradients = torch.autograd.grad(output.sum() + entropies.sum() + row_log_sums(query, key, mask).sum(), states)
    assert all(gradient.isfinite().all() and not gradient[0].any() for gradient in gradients)


def test_powers_touch_the_exponential_at_their_shift():
    x = torch.zeros(1, dtype=torch.double, requires_grad=True)
    for function in FUNCTIONS:
        value = log_function(x, function)
        assert value.item() == 0 and torch.autograd.grad(value, x)[0].item() == 1


def test_log_sums_are_those_of_the_scores_that_a_row_sees():
    query, key, _, _ = make_states()
    scores = (query @ key.mT / 2).masked_fill(~torch.ones(7, 9, dtype=torch.bool).tril(2), -math.inf)
    torch.testing.assert_close(row_log_sums(query, key, is_causal=True), scores.logsumexp(dim=-1))


@pytest.mark.parametrize(
    ("notation", "implementation"),
    [*in_turn(NOTATIONS, ["eager", "sdpa"]), *slow_cases(*((notation, "flex_attention") for notation in NOTATIONS))],
)
@torch.no_grad()
def test_every_implementation_caches_and_padding_give_the_same(notation, implementation):
    model, tokens = make_model(notation), make_tokens(2, 17)
    whole = model(tokens, output_entropies=True)
    padded = torch.nn.functional.pad(tokens, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (5, 0))
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    model.set_attn_implementation(implementation)
    left = model(padded, attention_mask=mask, position_ids=positions, output_entropies=True)
    torch.testing.assert_close(left.logits[:, 5:], whole.logits, rtol=1e-4, atol=2e-4)
    torch.testing.assert_close(left.attention_entropies[1][..., 5:], whole.attention_entropies[1], rtol=0, atol=1e-4)
    plain = model(padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(plain.logits[:, 5:], whole.logits, rtol=1e-4, atol=2e-4)
    first = model(tokens[:, :11], use_cache=True)
    rest = model(tokens[:, 11:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, whole.logits[:, 11:], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("notation", NOTATIONS[:1])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_with_either_cache_equals_the_whole_forward(implementation, notation):
    model, tokens = make_model(notation), make_tokens(2, 9)
    model.set_attn_implementation(implementation)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)


def test_what_computes_softmax_alone_is_refused_by_name():
    model, tokens = make_model("Pow4+ScFuFFN"), make_tokens()
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|sdpa' computes softmax alone.*'power4'"):
        model(tokens)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="is_causal=False with attention_function='power4'"):
        model(tokens, is_causal=False)
    bias = torch.zeros(1, 1, tokens.shape[1], tokens.shape[1])
    bias[..., 0] = 0.5
    with pytest.raises(ValueError, match=r"attention_mask holds 0\.5: an additive mask has 0"):
        model(tokens, attention_mask=bias)


def test_a_dropped_probability_is_scaled_as_softmax_does():
    query, key, value, shift = make_states()
    torch.manual_seed(0)
    _, probabilities, _ = whole_attention(query, key, value, None, False, 0.5, 0.5, "power4", shift)
    _, kept, _ = whole_attention(query, key, value, None, False, 0.5, 0.0, "power4", shift)
    assert 0.3 < (probabilities == 0).double().mean() < 0.7
    torch.testing.assert_close(probabilities[probabilities > 0], 2 * kept[probabilities > 0])


@pytest.mark.parametrize("notation", ["EReg(Pow4(t_h)+ScFuFFN)", "SM+ScFuFFN", "ClSM+LN+G"])
def test_the_penalty_is_the_mean_square_of_log_sums_less_shifts(notation):
    model = make_model(notation, log_sum_coefficient=0.5, **NO_DROPOUT).train()
    tokens = make_tokens(2, 12)
    outputs = model(tokens, labels=tokens, output_entropies=True)
    body = model.transformer(tokens, output_entropies=True)
    expected = torch.stack(body.log_sum_deviations).square().mean()
    torch.testing.assert_close(outputs.log_sum_loss, expected)
    loss = outputs.cross_entropy_loss + 0.5 * expected
    if model.config.entropy_regularization:
        loss = loss + model.config.entropy_coefficient * outputs.entropy_loss
    torch.testing.assert_close(outputs.loss, loss)
    outputs.loss.backward()
    assert all(block.attn.shift.attention_shift.grad[:, :12].any() for block in model.transformer.h)
    evaluated = model.eval()(tokens, labels=tokens)
    torch.testing.assert_close(evaluated.loss, evaluated.cross_entropy_loss, rtol=0, atol=0)
    assert evaluated.log_sum_loss is None


@pytest.mark.parametrize("notation", ["SM+LN+G", "Pow4+LN+G"])
def test_every_shift_has_a_gradient_of_a_loss_computed_elsewhere(notation):
    """A loss that leaves the penalty out: ranks that train together wait for every gradient."""
    model = make_model(notation, log_sum_coefficient=0.5, **NO_DROPOUT).train()
    model(make_tokens(1, 6), output_entropies=True).logits.sum().backward()
    assert all(block.attn.shift.attention_shift.grad is not None for block in model.transformer.h)


def test_log_sums_of_softmax_come_with_its_attention(monkeypatch):
    """Without a second pass over the scores, and as the pass of their own would have them."""
    monkeypatch.setattr(blocks, "row_log_sums", lambda *arguments: pytest.fail("computed twice"))
    model, tokens = make_model("SM+LN+G", log_sum_coefficient=0.5), make_tokens(2, 9)
    found = model.transformer(tokens, output_entropies=True).log_sum_deviations
    monkeypatch.undo()
    model.set_attn_implementation("eager")
    expected = model.transformer(tokens, output_entropies=True).log_sum_deviations
    torch.testing.assert_close(found, expected)


def test_autocast_does_not_round_the_scores_of_eager_attention():
    query, key, value, shift = make_states(scale=4.0)
    query, key = query.float(), key.float()
    arguments = (query, key, value.float(), None, False, 0.5, 0.0, "power4", shift.float())
    exact = whole_attention(*arguments)[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(whole_attention(*arguments)[2], exact, rtol=0, atol=0)


def test_a_function_that_does_not_go_with_its_shift_is_an_error():
    query, key, value, shift = make_states()
    with pytest.raises(ValueError, match=r"function='powr4' is unknown: .* softmax, power4, power2, clamped"):
        entropy_attention(query, key, value, function="powr4", shift=shift)
    with pytest.raises(ValueError, match="function='power4' needs a shift"):
        entropy_attention(query, key, value, function="power4")
    with pytest.raises(ValueError, match="softmax does not depend on the shift, which requires a gradient"):
        entropy_attention(query, key, value, shift=shift.detach().requires_grad_())


def test_keys_are_counted_only_where_somebody_reads_the_numbers(monkeypatch):
    model, counted = make_model("Pow4+LN+G"), []
    count = modeling_entropy_gpt.count_visible_keys
    monkeypatch.setattr(modeling_entropy_gpt, "count_visible_keys", lambda *a: counted.append(a) or count(*a))
    model(make_tokens(1, 5))
    assert not counted
    model(make_tokens(1, 5), output_entropies=True)
    assert counted


def test_the_penalty_does_not_depend_on_packing_or_padding():
    model = make_model("Pow4+ScFuFFN", log_sum_coefficient=0.5, **NO_DROPOUT).train()
    first, second = make_tokens(1, 9), make_tokens(1, 5)
    lengths = (8, 4)  # predicted tokens
    alone = [model(tokens, labels=tokens).log_sum_loss for tokens in (first, second)]
    expected = sum(loss * count for loss, count in zip(alone, lengths, strict=True)) / sum(lengths)
    packed = torch.cat([first, second], dim=1)
    labels = packed.clone()
    labels[0, 9] = -100
    positions = torch.cat([torch.arange(9), torch.arange(5)])[None]
    together = model(packed, labels=labels, position_ids=positions).log_sum_loss
    torch.testing.assert_close(together, expected)
    batch = torch.cat([first, torch.nn.functional.pad(second, (0, 4))])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    padded = model(batch, labels=batch.masked_fill(mask == 0, -100), attention_mask=mask).log_sum_loss
    torch.testing.assert_close(padded, expected)


def test_shifts_are_there_where_they_act_and_begin_where_the_configuration_says(tmp_path):
    assert EntropyGPTModel(make_config("SM+LN+G")).h[0].attn.shift is None
    assert EntropyGPTModel(make_config("SM+LN+G", log_sum_coefficient=1e-3)).h[0].attn.shift is not None
    model = EntropyGPTForCausalLM(make_config("Pow2+LN+G", attention_shift_init=1.5))
    shift = model.transformer.h[0].attn.shift.attention_shift
    assert shift.shape == (4, 64) and (shift == 1.5).all()
    with torch.no_grad():
        shift.normal_()
    model.save_pretrained(tmp_path)
    loaded = EntropyGPTForCausalLM.from_pretrained(tmp_path)
    tokens = make_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("token", ["Pow4", "Pow2", "ClSM"])
@pytest.mark.parametrize("temperature", ["", "(t)", "(t_h)"])
def test_the_notation_names_every_function_with_every_temperature(token, temperature):
    notation = f"EReg({token}{temperature}+ScFuFFN)"
    config = EntropyGPTConfig.from_notation(notation)
    assert config.notation == notation
    assert config.attention_function == {"Pow4": "power4", "Pow2": "power2", "ClSM": "clamped"}[token]


@pytest.mark.slow
@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_step_is_compiled_in_one_graph(notation):
    model = make_model(notation, log_sum_coefficient=1e-3, **NO_DROPOUT).train()
    tokens = make_tokens()
    expected = model(tokens, labels=tokens).loss
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens).loss
    torch.testing.assert_close(found, expected)
    found.backward()
