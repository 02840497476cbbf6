"""Forward and backward hooks, by which most tools look into a model and change it."""

import pytest
import torch

from modeling_entropy_gpt import EntropyGPTForCausalLM
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import ARCHITECTURES, NO_DROPOUT, make_model, make_tokens
from tests.twins import make_twins


PLACES = (
    "transformer.wte",
    "transformer.wpe",
    "transformer.drop",
    "transformer.h.1",
    "transformer.h.1.ln_1",
    "transformer.h.1.attn",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.attn.c_proj",
    "transformer.h.1.ln_2",
    "transformer.h.1.mlp",
    "transformer.h.1.mlp.act",
    "transformer.ln_f",
    "lm_head",
)


@pytest.fixture(params=["eager", "sdpa"])
def twins(request):
    return make_twins(attn_implementation=request.param)


def with_first(output, change):
    """The output with its first tensor changed, as tools for stock models write it."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def kinds(value):
    """What a tool can tell of an output without looking at numbers."""
    return tuple(map(kinds, value)) if isinstance(value, tuple) else getattr(value, "shape", value)


@torch.no_grad()
def run_with(model, place: str, hook, tokens, **arguments):
    """The model's output while one of its modules has a forward hook."""
    handle = model.get_submodule(place).register_forward_hook(hook)
    try:
        return model(tokens, **arguments)
    finally:
        handle.remove()


@pytest.mark.parametrize("place", PLACES)
def test_what_a_hook_sees(twins, place):
    seen = []
    for model in twins:
        run_with(model, place, lambda module, arguments, output: seen.append((arguments[0], output)), make_tokens())
    (their_input, theirs), (our_input, ours) = seen
    assert kinds(ours) == kinds(theirs)
    if not place.endswith(("wte", "wpe")):
        assert kinds(our_input) == kinds(their_input)


def patched_logits(model, place, source, target):
    """The logits of a prompt with the activations of another in a module's output, at some positions."""
    kept = []

    def keep(module, arguments, output):
        kept.append(output[0] if isinstance(output, tuple) else output)

    def patch(module, arguments, output):
        def change(hidden):
            hidden = hidden.clone()
            hidden[..., 3:7, :] = kept[0][..., 3:7, :]
            return hidden

        return with_first(output, change)

    run_with(model, place, keep, source)
    return run_with(model, place, patch, target).logits


def test_patching(twins, compared):
    source, target = make_tokens(), make_tokens()
    plain, differences = twins[1](target).logits, []
    for place in PLACES:
        theirs, ours = (patched_logits(model, place, source, target) for model in twins)
        if place != "transformer.wpe":  # which knows no prompts
            assert not torch.allclose(ours, plain, atol=1e-2), place
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=place)
        differences.append((ours - theirs).abs().max().item())
    attention = twins[1].config._attn_implementation
    what = f"activation patching by hooks on {len(PLACES)} kinds of modules, {attention} attention"
    compared("transformers", what, f"logits equal within {max(differences):.0e}")


def test_steering_while_generating(twins, compared):
    """As the tools write it for models whose blocks return a tensor."""
    delta, prompt = torch.randn(48) * 4, make_tokens(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = [model.generate(prompt, **options) for model in twins]
    assert torch.equal(plain[0], plain[1])
    for place in ("transformer.h.1", "transformer.h.2.mlp"):
        generated = []
        for model in twins:
            handle = model.get_submodule(place).register_forward_hook(lambda m, a, output: output + delta)
            generated.append(model.generate(prompt, **options))
            handle.remove()
        assert not torch.equal(generated[1], plain[1])
        assert torch.equal(generated[0], generated[1])
    attention = twins[1].config._attn_implementation
    compared("transformers", f"steering by `return output + delta`, {attention} attention", "the same tokens")


def test_hooks_before_a_module(twins):
    """They see the arguments given by name, and may change all."""
    tokens, logits = make_tokens(), []
    for model in twins:
        seen = {}

        def double(module, arguments, keywords, seen=seen):
            seen |= keywords
            return (arguments[0] * 2, *arguments[1:]), keywords

        handles = [
            model.get_submodule(place).register_forward_pre_hook(double, with_kwargs=True)
            for place in ("transformer.h.0", "transformer.h.1.attn", "transformer.h.1.mlp", "lm_head")
        ]
        logits.append(model(tokens).logits)
        for handle in handles:
            handle.remove()
        assert {"attention_mask", "position_ids", "use_cache"} <= seen.keys()
        assert {CACHE, "past_key_values"} & seen.keys()  # ours has one name for it, whatever the release
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_backward_hooks(twins, use_reentrant, compared):
    """Gradients at the modules' outputs, also where a block is run again in the backward pass."""
    tokens, gradients = make_tokens(), []
    for model in twins:
        model.train()
        if use_reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        seen = {}
        for place in PLACES[2:]:
            module = model.get_submodule(place)
            module.register_full_backward_hook(
                lambda m, inputs, outputs, seen=seen, place=place: seen.update({place: outputs[0]})
            )
        model(tokens, labels=tokens).loss.backward()
        gradients.append(seen)
    assert gradients[1].keys() == gradients[0].keys() == set(PLACES[2:])
    for place, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][place], gradient, rtol=1e-3, atol=1e-6, msg=place)
    attention = twins[1].config._attn_implementation
    what = f"gradients at outputs by backward hooks, {attention} attention, use_reentrant={use_reentrant}"
    compared("transformers", what, "equal within 1e-3 of each")


def test_changed_hidden_states_and_attentions_are_recorded_as_by_stock(twins):
    recorded = []
    for model in twins:
        outputs = run_with(
            model,
            "transformer.h.1",
            lambda m, a, output: output * 1.5,
            make_tokens(2, 9) * 0 + torch.arange(2, 11),
            output_hidden_states=True,
            output_attentions=model.config._attn_implementation == "eager",
        )
        recorded.append((*outputs.hidden_states, *(outputs.attentions or ())))
    assert len(recorded[0]) in (4, 7)
    torch.testing.assert_close(recorded[1], recorded[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_blocks_return_tensors_unless_entropies_are_asked_for(notation):
    model = make_model(notation)
    kinds_seen = {}
    for output_entropies in (False, True):
        seen = kinds_seen[output_entropies] = []
        for place in ("transformer.h.0", "transformer.h.0.attn"):
            hook = lambda m, a, output, seen=seen: seen.append(output)  # noqa: E731
            run_with(model, place, hook, make_tokens(), output_entropies=output_entropies)
    block, attention = kinds_seen[False]
    assert torch.is_tensor(block)
    assert len(attention) == 2
    block, attention = kinds_seen[True]
    assert [len(block), len(attention)] == [4, 5]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_hook_that_drops_entropies_is_told_so(batch_size):
    """A batch of three could be taken for hidden states, entropies and thresholds."""
    model: EntropyGPTForCausalLM = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT).train()
    tokens = make_tokens(batch_size)
    model.transformer.h[1].register_forward_hook(lambda m, a, output: output[0] * 2 if a else output)
    with pytest.raises(ValueError, match=r"h\[1\] returned a tensor.*\*output\[1:\]"):
        model(tokens, labels=tokens)


def test_hooks_while_entropies_are_asked_for():
    """Patched hidden states, and the entropies and penalty that belong to them."""
    model: EntropyGPTForCausalLM = make_model("EReg(SM(t)+ScFuFFN)", **NO_DROPOUT)
    tokens = make_tokens()
    hook = lambda m, a, output: with_first(output, lambda hidden: hidden * 2)  # noqa: E731
    patched = run_with(model, "transformer.h.0", hook, tokens, labels=tokens, output_entropies=True)
    without = run_with(model, "transformer.h.0", hook, tokens)
    plain = model(tokens, labels=tokens, output_entropies=True)
    torch.testing.assert_close(patched.logits, without.logits, rtol=0, atol=1e-3)
    assert torch.equal(patched.attention_entropies[0], plain.attention_entropies[0])
    assert not torch.allclose(patched.attention_entropies[1], plain.attention_entropies[1], atol=1e-3)
    assert not torch.allclose(patched.entropy_loss, plain.entropy_loss)
