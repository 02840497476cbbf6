"""Tokenizers: trained, and loaded."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([Path(__file__).with_name("test_corpus.py").read_text()], vocab_size=400)


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_the_tokenizer_is_no_larger_than_asked_and_survives_saving(tokenizer, tmp_path):
    assert len(tokenizer) == 400
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("def f(x):")["input_ids"] == tokenizer("def f(x):")["input_ids"]
    assert again.eos_token == again.bos_token == again.pad_token == "<|endoftext|>"


def test_a_tokenizer_is_loaded_from_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert again.eos_token_id == tokenizer.eos_token_id


def test_a_folder_without_one_and_one_without_an_end_of_text_are_named(tmp_path):
    with pytest.raises(CorpusError, match=f"{tmp_path} has no tokenizer"):
        load_tokenizer(str(tmp_path))
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)
    with pytest.raises(CorpusError, match="no fast one with an end-of-text token"):
        load_tokenizer(str(tmp_path))
