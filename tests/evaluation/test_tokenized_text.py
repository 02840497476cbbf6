"""Tokens of texts, and the words and bytes that are counted for them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_gpt.evaluation.measuring.tokenized_text import count_tokens, tokenize
from entropy_gpt.training.tokenizer import END_OF_TEXT, train_tokenizer


TEXTS = ["def naïve():\n    return 1\n", "x = 'ünïcode ✓'\n"] * 4
TOKENIZER = train_tokenizer(TEXTS, vocab_size=300)


def ids_of(texts, **options) -> list[list[int]]:
    return [document.input_ids.tolist() for document in tokenize(texts, TOKENIZER, **options)]


def plain(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_special_tokens_stand_where_they_are_asked_for():
    end, first, second = TOKENIZER.eos_token_id, plain(TEXTS[0]), plain(TEXTS[1])
    assert ids_of(TEXTS[:2], separate=True, bos=False) == [first, second]
    assert ids_of(TEXTS[:2], separate=True, bos=True) == [[end, *first], [end, *second]]
    assert ids_of(TEXTS[:2], separate=False, bos=False) == [[*first, end], [*second, end]]
    assert ids_of(TEXTS[:2], separate=False, bos=True) == [[end, *first, end], [*second, end]]
    # In a text, the name of a special token is text.
    assert TOKENIZER.eos_token_id not in ids_of([END_OF_TEXT], separate=True, bos=False)[0]


@given(st.lists(st.text(max_size=20), max_size=4))
@settings(deadline=None)
def test_with_a_beginning_all_of_the_text_is_counted(texts):
    for separate in (True, False):
        documents = list(tokenize(texts, TOKENIZER, separate, bos=True))
        assert sum(document.bytes for document in documents) == sum(len(text.encode()) for text in texts)
        assert sum(document.words for document in documents) == sum(len(text.split()) for text in texts)
        for document, text in zip(documents, texts, strict=True):
            assert TOKENIZER.decode(document.input_ids, skip_special_tokens=True) == text


def test_without_a_beginning_the_first_token_is_not_counted():
    text = "zebra crossing"
    rest = TOKENIZER.decode(plain(text)[1:])
    (alone,) = tokenize([text], TOKENIZER, separate=True, bos=False)
    assert (alone.bytes, alone.words) == (len(rest.encode()), len(rest.split()))
    one, two = tokenize([text, text], TOKENIZER, separate=False, bos=False)
    assert (one.bytes, two.bytes) == (len(rest.encode()), len(text.encode()))


def test_the_text_ends_after_the_most_tokens_asked_for():
    whole = [token for text in TEXTS for token in plain(text)]
    for most in (1, 2, len(plain(TEXTS[0])), len(plain(TEXTS[0])) + 3, 10**6):
        documents = list(tokenize(TEXTS, TOKENIZER, separate=True, bos=True, most=most))
        tokens = [token for document in documents for token in document.input_ids[1:].tolist()]
        assert tokens == whole[:most]
        texts = TOKENIZER.decode(tokens)
        assert sum(document.bytes for document in documents) == len(texts.encode())


def test_progress_and_reading_one_document_at_a_time():
    read, seen = [], []
    texts = (read.append(text) or text for text in TEXTS)
    documents = tokenize(texts, TOKENIZER, True, False, on_document=lambda: seen.append(1))
    next(documents)
    assert len(read) == 1
    list(documents)
    assert len(seen) == len(TEXTS)


def test_tokens_are_kept_in_little_memory():
    (document,) = tokenize(TEXTS[:1], TOKENIZER, True, False)
    small = document.compact()
    assert small.input_ids.dtype == np.uint16
    assert (small.input_ids == document.input_ids).all()
    (empty,) = tokenize([""], TOKENIZER, True, False)
    assert len(empty.compact().input_ids) == 0


def test_counting():
    counts = count_tokens(TEXTS, TOKENIZER, vocab_size=400)
    assert counts.shape == (400,)
    assert counts.sum() == sum(len(plain(text)) for text in TEXTS)
    assert counts[plain("def")[0]] == 4


def test_a_tokenizer_of_another_kind():
    """Words are its tokens, and it has no special ones."""
    backend = Tokenizer(models.WordLevel({"[unk]": 0, "a": 1, "b": 2}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    (document,) = tokenize(["a b c"], tokenizer, separate=True, bos=False)
    assert document.input_ids.tolist() == [1, 2, 0]
    assert (document.words, document.bytes) == (2, 4)
    with pytest.raises(ValueError, match="no token for the beginning"):
        list(tokenize(["a"], tokenizer, separate=True, bos=True))
    with pytest.raises(ValueError, match="no end-of-text token"):
        list(tokenize(["a"], tokenizer, separate=False, bos=False))
