"""Perplexity against its definition, token by token."""

import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from evaluation.perplexity import count_bytes, measure_likelihood
from tests.architectures import make_model
from training.packing import pack
from training.tokenizer import END_OF_TEXT, train_tokenizer


TEXTS = ["def naïve():\n    return 1\n", "x = 'ünïcode ✓'\n"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def test_definition(tokenizer):
    model = make_model("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer)).train()
    blocks = pack(TEXTS, tokenizer, 8)
    seen = []
    likelihood = measure_likelihood(model, blocks, tokenizer, batch_size=3, on_blocks=seen.append)
    assert model.training
    assert sum(seen) == len(blocks)

    model.eval()
    nats, text_bytes, tokens = 0.0, 0, 0
    for block in blocks["input_ids"]:
        for i in range(1, len(block)):
            logits = model(torch.tensor([block[:i]])).logits[0, -1]
            nats -= logits.log_softmax(dim=-1)[block[i]].item()
            tokens += 1
        # Tokens may end within a character, so count the bytes of the whole block and of its first token.
        text_bytes += byte_length(block, tokenizer) - byte_length(block[:1], tokenizer)
    assert likelihood.tokens == tokens
    assert likelihood.bytes == text_bytes
    assert likelihood.nats == pytest.approx(nats, rel=1e-4)
    assert likelihood.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert likelihood.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-4)


def byte_length(block, tokenizer):
    """Bytes by way of GPT-2's table from characters to bytes, written out."""
    special = tokenizer.eos_token_id
    return sum(len(tokenizer.convert_ids_to_tokens(token)) for token in block if token != special)


def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(tokenizer):
    counts = count_bytes(tokenizer)
    for text in (*TEXTS, "日本語 and emoji 🎉", ""):
        assert counts[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert counts[tokenizer.convert_tokens_to_ids(END_OF_TEXT)] == 0


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(tokenizer):
    model = make_model("SM+LN+G", vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    blocks = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 3})
    assert measure_likelihood(model, blocks, tokenizer).perplexity == pytest.approx(len(tokenizer), rel=1e-5)


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="byte-level"):
        count_bytes(other)
