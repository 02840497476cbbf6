"""With GPT-2's weights and the default configuration, this is GPT-2."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import ACT2FN

from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import SIZES, make_tokens
from tests.twins import make_twins


@pytest.fixture(params=["eager", "sdpa"])
def twins(request):
    return make_twins(attn_implementation=request.param)


def padded(side):
    tokens = make_tokens(3, 19)
    mask = torch.ones_like(tokens)
    for row, count in enumerate((0, 4, 9)):
        if count:
            padding = slice(0, count) if side == "left" else slice(-count, None)
            mask[row, padding] = 0
            tokens[row, padding] = SIZES["pad_token_id"]
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def test_logits(twins):
    gpt2, ours = twins
    tokens = make_tokens()
    torch.testing.assert_close(ours(tokens).logits, gpt2(tokens).logits, rtol=0, atol=1e-5)


def test_logits_in_half_precision(twins):
    """The bits of GPT-2 with torch's GELU. GPT-2's own is rounded after each of its eight passes, and further off."""
    gpt2, ours = twins
    tokens = make_tokens()
    exact = gpt2(tokens).logits
    gpt2, ours = (model.to(torch.bfloat16) for model in twins)
    logits, stock = ours(tokens).logits, gpt2(tokens).logits
    assert (logits - exact).abs().mean() <= (stock - exact).abs().mean()
    for block in gpt2.transformer.h:
        block.mlp.act = ACT2FN["gelu_pytorch_tanh"]
    assert torch.equal(logits, gpt2(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(twins, side):
    gpt2, ours = twins
    inputs = padded(side)
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**inputs).logits[valid], gpt2(**inputs).logits[valid], rtol=0, atol=1e-5)


def test_gradients(twins):
    gpt2, ours = twins
    tokens = make_tokens()
    for model in twins:
        model.train()(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in gpt2.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5, msg=name)


def test_cached_decoding(twins):
    gpt2, ours = twins
    tokens = make_tokens()
    caches = {}
    for model in twins:
        prefix = model(tokens[:, :9], use_cache=True)
        caches[model] = model(tokens[:, 9:], **{CACHE: prefix.get(CACHE)}, use_cache=True).logits
    torch.testing.assert_close(caches[ours], caches[gpt2], rtol=0, atol=1e-5)


def test_token_types(twins):
    gpt2, ours = twins
    tokens, types = make_tokens(), make_tokens() % 2
    expected = gpt2(tokens, token_type_ids=types).logits
    assert (expected - gpt2(tokens).logits).abs().max() > 0.1
    torch.testing.assert_close(ours(tokens, token_type_ids=types).logits, expected, rtol=0, atol=1e-5)


def test_arguments_have_gpt2s_places(twins):
    gpt2, ours = twins
    tokens, types = make_tokens(), make_tokens() % 2
    positions = torch.arange(17).flip(0)[None]
    arguments = (tokens, None, torch.ones_like(tokens), types, positions)
    torch.testing.assert_close(ours(*arguments).logits, gpt2(*arguments).logits, rtol=0, atol=1e-5)


def test_cross_attention_is_refused(twins):
    states = torch.zeros(2, 5, SIZES["n_embd"])
    for model in twins:
        with pytest.raises(ValueError, match="cross"):
            model(make_tokens(), encoder_hidden_states=states)


def test_attention_matrices_under_each_implementation(twins):
    gpt2, ours = twins
    tokens = make_tokens()
    expected, found = (model(tokens, output_attentions=True).attentions for model in (gpt2, ours))
    assert len(found or ()) == len(expected or ())
    for ours_of_layer, of_layer in zip(found or (), expected or (), strict=True):
        torch.testing.assert_close(ours_of_layer, of_layer, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_generation(twins, options):
    gpt2, ours = twins
    inputs = {name: padded("left")[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    assert torch.equal(ours.generate(**inputs, **options), gpt2.generate(**inputs, **options))


def test_initialization_is_the_same_scheme():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(**{**SIZES, "n_embd": 192}))
    ours = EntropyGPTForCausalLM(EntropyGPTConfig(**{**SIZES, "n_embd": 192}))
    for (name, theirs), (our_name, parameter) in zip(gpt2.named_parameters(), ours.named_parameters(), strict=True):
        assert name == our_name
        assert parameter.mean().item() == pytest.approx(theirs.mean().item(), abs=2e-3), name
        torch.testing.assert_close(parameter.std(), theirs.std(), rtol=0.1, atol=1e-6, msg=name)
