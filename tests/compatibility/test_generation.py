"""transformers' ways to generate, and its pipelines, give the tokens that they give with GPT-2."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StaticCache, pipeline

from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import SIZES, make_tokens
from tests.twins import make_twins


GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True}
STRATEGIES = {
    "greedy": GREEDY,
    "greedy without a cache": {**GREEDY, "use_cache": False},
    "beam search": {**GREEDY, "num_beams": 4, "num_return_sequences": 3},
    "beam search, penalties": {**GREEDY, "num_beams": 3, "length_penalty": -1.0, "no_repeat_ngram_size": 2},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "static cache, beams": {**GREEDY, "num_beams": 3, "cache_implementation": "static"},
    "prompt in chunks": {**GREEDY, "prefill_chunk_size": 4},
    "sampling": {**SAMPLED, "top_k": 20, "top_p": 0.9, "temperature": 0.7},
    "sampling, min_p": {**SAMPLED, "min_p": 0.05, "repetition_penalty": 1.3},
    "guidance": {**GREEDY, "guidance_scale": 1.5},
    "watermark": {**GREEDY, "watermarking_config": {"bias": 2.0}},
}


@pytest.fixture(params=["eager", "sdpa"])
def twins(request):
    return make_twins(attn_implementation=request.param)


def padded_prompts():
    tokens = make_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    tokens[1, :3] = SIZES["pad_token_id"]
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model, **arguments):
    torch.manual_seed(1)
    return model.generate(**arguments)


def test_strategies(twins, compared):
    """A batch with padding on the left."""
    prompts = padded_prompts()
    for name, options in STRATEGIES.items():
        theirs, ours = (generate(model, **prompts, **options) for model in twins)
        assert torch.equal(theirs, ours), name
    attention = twins[1].config._attn_implementation
    compared("transformers", f"`generate`, {attention} attention: {'; '.join(STRATEGIES)}", "the same tokens")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("with_ids", [False, True])
def test_from_embeddings(twins, with_ids, options):
    prompts = padded_prompts()
    ids = {"input_ids": prompts["input_ids"]} if with_ids else {}
    generated = []
    for model in twins:
        embeddings = model.get_input_embeddings()(prompts["input_ids"])
        inputs = {"inputs_embeds": embeddings, "attention_mask": prompts["attention_mask"], **ids}
        generated.append(generate(model, **inputs, **GREEDY, **options))
    assert torch.equal(*generated)
    expected = generate(twins[1], **prompts, **GREEDY, **options)
    assert torch.equal(generated[1][:, -12:], expected[:, -12:])


@pytest.mark.slow
def test_continuous_batching(compared):
    prompts, options = [[5, 6, 7, 8], [9, 10, 11]], GenerationConfig(**GREEDY, num_blocks=64, max_batch_tokens=64)
    generated = []
    for model in make_twins():
        results = model.generate_batch(inputs=prompts, generation_config=options, progress_bar=False)
        generated.append([result.generated_tokens for result in results.values()])
    assert all(len(tokens) == GREEDY["max_new_tokens"] for tokens in generated[0])
    assert generated[1] == generated[0]
    compared("transformers", "`generate_batch`, continuous batching", "the same tokens")


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_decoding(twins, way, compared):
    prompt, plain = make_tokens(1, 9), []
    assistants = make_twins(n_layer=1)
    for model, assistant in zip(twins, assistants, strict=True):
        options = {"assistant_model": assistant} if way == "assistant" else {"prompt_lookup_num_tokens": 3}
        plain.append(generate(model, input_ids=prompt, **GREEDY))
        assert torch.equal(generate(model, input_ids=prompt, **GREEDY, **options), plain[-1])
    assert torch.equal(*plain)
    attention = twins[1].config._attn_implementation
    compared("transformers", f"assisted decoding by {way}, {attention} attention", "the same tokens")


def test_a_generation_config_with_a_static_cache(twins):
    config = GenerationConfig(**GREEDY, cache_implementation="static", pad_token_id=SIZES["pad_token_id"])
    theirs, ours = (generate(model, **padded_prompts_of(0), generation_config=config) for model in twins)
    assert torch.equal(theirs, ours)


def padded_prompts_of(seed):
    torch.manual_seed(seed)
    return padded_prompts()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_scores(twins, num_beams):
    results = []
    for model in twins:
        options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        outputs = generate(model, **padded_prompts_of(0), **GREEDY, num_beams=num_beams, **options)
        beams = outputs.beam_indices if num_beams > 1 else None
        scores = model.compute_transition_scores(outputs.sequences, outputs.scores, beams, normalize_logits=True)
        results.append((outputs.sequences, scores, torch.stack(outputs.logits)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_a_shared_beginning(twins, kind):
    """As for a system prompt: computed once, copied, and continued by another prompt; and a chat in turns."""
    beginning, rest = make_tokens(1, 7), make_tokens(1, 5)
    whole, generated = torch.cat([beginning, rest], dim=1), []
    for model in twins:
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=SIZES["n_positions"])
        with torch.no_grad():
            model(beginning, **{CACHE: cache}, use_cache=True)
        first = generate(model, input_ids=whole, **{CACHE: cache}, **GREEDY)
        second = torch.cat([first, rest], dim=1)
        generated.append(generate(model, input_ids=second, **{CACHE: cache}, **GREEDY))
    assert torch.equal(*generated)
    plain = generate(twins[1], input_ids=whole, **GREEDY)
    assert torch.equal(generated[1][:, : plain.shape[1]], plain)


def test_a_cache_that_is_cropped(twins):
    tokens, logits = make_tokens(2, 12), []
    for model in twins:
        with torch.no_grad():
            cache = getattr(model(tokens, use_cache=True), CACHE)
            cache.crop(-5)
            logits.append(model(tokens[:, 7:], **{CACHE: cache}).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[1], twins[1](tokens).logits[:, 7:], rtol=0, atol=1e-4)


def test_pipelines(twins, tmp_path, compared):
    """A batch of texts of several lengths, which the pipeline pads on the left."""
    tokenizer: PreTrainedTokenizerFast = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, 270)
    stock, ours = make_twins(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    tokenizer.padding_side = "left"
    texts = ["the quick", "a", "brown fox jumps over"]
    answers = []
    for model in (stock, ours):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        together = generator(texts, batch_size=3, **GREEDY)
        assert together == [generator(text, **GREEDY) for text in texts]
        answers.append(together)
    assert answers[0] == answers[1]
    compared("transformers", "the text-generation pipeline, texts of several lengths in a batch", "the same texts")
