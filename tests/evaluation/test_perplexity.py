"""Perplexity against its definition, token by token, and against other programs that measure it."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from entropy_gpt.evaluation.measuring.perplexity import Windows, cut_windows, measure_likelihood
from entropy_gpt.evaluation.measuring.tokenized_text import TokenizedText, tokenize
from entropy_gpt.training.tokenizer import train_tokenizer
from tests.architectures import ARCHITECTURES, SIZES, make_model
from tests.slow import in_turn


LENGTHS = (1, 2, 33, 64, 65, 150, 7)
CONTEXTS_AND_STRIDES = ((64, 64), (64, 10), (5, 1), (1, 1), (63, 62))


def make_documents(lengths=LENGTHS, vocab_size=SIZES["vocab_size"]) -> list[TokenizedText]:
    generator = np.random.default_rng(0)
    return [TokenizedText(generator.integers(2, vocab_size, length), 3, 10) for length in lengths]


@torch.no_grad()
def naive_nats(model, sequence: np.ndarray, windows: Windows) -> list[float]:
    """Every token but the first, from all that its window shows before it, in a forward pass of its own."""
    nats = []
    for place in range(1, len(sequence)):
        if place <= windows.context:
            end = windows.context + 1
        else:
            end = windows.context + 1 + math.ceil((place - windows.context) / windows.stride) * windows.stride
        begin = max(0, min(end, len(sequence)) - windows.context - 1)
        logits = model(torch.from_numpy(sequence[None, begin:place])).logits[0, -1]
        nats.append(-logits.log_softmax(dim=-1)[sequence[place]].item())
    return nats


@pytest.mark.parametrize(("windows", "separate"), in_turn(CONTEXTS_AND_STRIDES, [True, False]))
def test_definition(windows, separate):
    model = make_model("EReg(SM(t)+ScFuFFN)", n_layer=1).train()
    documents, windows, seen = make_documents(), Windows(*windows, separate, False), []
    likelihood = measure_likelihood(model, documents, windows, batch_tokens=100, on_tokens=seen.append)
    assert model.training
    model.eval()
    sequences = [document.input_ids for document in documents]
    sequences = sequences if separate else [np.concatenate(sequences)]
    nats = [value for sequence in sequences for value in naive_nats(model, sequence, windows)]
    assert likelihood.tokens == len(nats) == sum(seen)
    assert likelihood.nats == pytest.approx(math.fsum(nats), rel=1e-5)
    assert likelihood.perplexity == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-5)
    assert likelihood.bits_per_byte == pytest.approx(likelihood.nats / math.log(2) / (10 * len(documents)))
    assert likelihood.word_perplexity == pytest.approx(math.exp(likelihood.nats / (3 * len(documents))))


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_every_architecture_gives_its_own_loss(notation):
    model = make_model(notation)
    (document,) = make_documents([SIZES["n_positions"]])
    input_ids = torch.from_numpy(document.input_ids)[None]
    with torch.no_grad():
        loss = model(input_ids, labels=input_ids).loss.item()
    likelihood = measure_likelihood(model, [document], Windows(64, 64, True, False))
    assert likelihood.nats / likelihood.tokens == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 64, 1000, 100_000])
def test_batches_change_nothing(batch_tokens):
    model, windows = make_model("SM+LN+G").double(), Windows(32, 20, True, False)
    expected, got = (
        measure_likelihood(model, make_documents(), windows, tokens, by_position=True).by_position
        for tokens in (300, batch_tokens)
    )
    assert [part.tokens for part in got] == [part.tokens for part in expected]
    assert [part.nats for part in got] == pytest.approx([part.nats for part in expected], rel=1e-6)


def test_logits_are_cut_into_parts_without_a_difference(monkeypatch):
    model, windows = make_model("SM+LN+G"), Windows(64, 64, True, False)
    expected = measure_likelihood(model, make_documents(), windows).nats
    monkeypatch.setattr("entropy_gpt.evaluation.measuring.perplexity.LOGITS_AT_ONCE", 3 * SIZES["vocab_size"])
    assert measure_likelihood(model, make_documents(), windows).nats == pytest.approx(expected, rel=1e-6)


def test_models_of_other_families():
    """A head that is no linear map of the hidden states, in the model's own forward pass."""
    options = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**options, intermediate_size=64, max_position_embeddings=64)).eval()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    windows = Windows(64, 30, True, False)
    for model in (llama, gpt2):
        nats = [value for text in make_documents() for value in naive_nats(model, text.input_ids, windows)]
        assert measure_likelihood(model, make_documents(), windows).nats == pytest.approx(sum(nats), rel=1e-5)


def test_lm_eval_finds_the_same():
    """Its rolling likelihood: a beginning-of-text token, windows without overlap, the last as long as the others."""
    text = Path(__file__).read_text()[:3000]
    tokenizer = train_tokenizer([text], SIZES["vocab_size"] + 200)
    model = make_model("SM(t)+ScFuFFN", vocab_size=len(tokenizer))
    (document,) = tokenize([text], tokenizer, separate=True, bos=True)
    likelihood = measure_likelihood(model, [document], Windows(50, 50, True, True))
    judge = HFLM(model, tokenizer=tokenizer, batch_size=3, max_length=50)
    (expected,) = judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert -likelihood.nats == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_each_token_is_predicted_once_with_enough_before_it(lengths, context, data):
    stride = data.draw(st.integers(1, context))
    sequence = np.arange(sum(lengths))
    pieces = np.split(sequence, np.cumsum(lengths)[:-1]) if lengths else []
    predicted = []
    for window in cut_windows(pieces, Windows(context, stride, True, False)):
        assert window.length <= context
        assert (np.diff(window.tokens) == 1).all()
        predicted += window.tokens[len(window.tokens) - window.predicted :].tolist()
        before = window.length - window.predicted + 1  # the first one predicted
        assert before >= min(context - stride + 1, window.tokens[-window.predicted])
    assert predicted == sequence[1:].tolist()


def test_parts_by_position_and_by_frequency_add_up():
    model, windows = make_model("SM+G"), Windows(20, 7, False, False)
    counts = np.arange(SIZES["vocab_size"]) ** 2
    likelihood = measure_likelihood(
        model, make_documents(), windows, token_counts=counts, frequency_text="squares", by_position=True
    )
    for parts in (likelihood.by_position, likelihood.by_frequency):
        assert sum(part.tokens for part in parts) == likelihood.tokens
        assert sum(part.nats for part in parts) == pytest.approx(likelihood.nats)
        assert all(one.end == next_.begin for one, next_ in itertools.pairwise(parts))
    # Each window after the first predicts 7 tokens, from 14 to 20 tokens before them.
    beyond = sum(part.tokens for part in likelihood.by_position if part.begin >= 12)
    assert beyond >= likelihood.tokens - 20
    tokens = np.concatenate([document.input_ids for document in make_documents()])[1:]
    expected = [((counts[tokens] >= low) & (counts[tokens] < high)).sum() for low, high in ((1, 10), (10, 100))]
    found = {part.begin: part.tokens for part in likelihood.by_frequency}
    assert [found.get(begin, 0) for begin in (1, 10)] == expected
    assert likelihood.by_frequency[-1].range == "10,000 and more"


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    likelihood = measure_likelihood(model, make_documents(), Windows(32, 32, True, False))
    assert likelihood.perplexity == pytest.approx(SIZES["vocab_size"], rel=1e-5)


def test_a_broken_model_has_no_perplexity():
    model = make_model("SM+LN+G")
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(measure_likelihood(model, make_documents(), Windows(32, 32, True, False)).perplexity)


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [
        (65, 1, "A context of 65 tokens is not possible: the model has 64 positions; allowed are 1 to 64"),
        (0, 1, "A context of 0"),
        (8, 9, "A stride of 9 tokens is not possible: allowed are 1 to the context, 8"),
        (8, 0, "A stride of 0"),
    ],
)
def test_windows_that_can_not_be(context, stride, message):
    with pytest.raises(ValueError, match=message):
        measure_likelihood(make_model("SM"), make_documents(), Windows(context, stride, True, False))


@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 1, 0]])
def test_nothing_to_predict(lengths):
    with pytest.raises(ValueError, match=f"There is nothing to predict: {len(lengths)} documents have {sum(lengths)}"):
        measure_likelihood(make_model("SM"), make_documents(lengths), Windows(8, 8, True, False))
