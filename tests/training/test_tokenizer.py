"""Tokenizers: trained, and loaded."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from entropy_gpt.training.errors import CorpusError
from entropy_gpt.training.tokenizer import check_end_of_text, fits, load_tokenizer, train_tokenizer


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


def test_a_folder_without_one_is_named(tmp_path):
    with pytest.raises(CorpusError, match=f"{tmp_path} has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_bare_file_is_loaded(tokenizer, tmp_path):
    """Next to a configuration of GPT-2, transformers makes GPT-2's pre-tokenizer of it."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(place))
        assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
        assert again.eos_token_id == tokenizer.eos_token_id


def test_a_pointer_to_a_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 9\n")
    with pytest.raises(CorpusError, match=r"tokenizer\.json is a Git LFS pointer"):
        load_tokenizer(str(tmp_path))


@pytest.fixture
def bert(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
    BertTokenizerFast(vocab={token: number for number, token in enumerate(vocabulary)}).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_end_of_text_is_named_where_it_is_needed(bert):
    with pytest.raises(CorpusError, match=r"names no end-of-text token.*--eos-token.*\[SEP\]"):
        check_end_of_text(load_tokenizer(bert))
    tokenizer = load_tokenizer(bert, "[SEP]")
    check_end_of_text(tokenizer)
    assert tokenizer.eos_token_id == 3
    with pytest.raises(CorpusError, match=r"has no token '\[EOS\]'\. Its special tokens are .*\[SEP\]"):
        load_tokenizer(bert, "[EOS]")


def test_special_tokens_beyond_the_model_are_no_obstacle(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    larger = load_tokenizer(str(tmp_path))
    larger.add_special_tokens({"pad_token": "[PAD]"})
    assert fits(larger, 400)
    assert not fits(larger, 399)
    larger.add_special_tokens({"eos_token": "[EOS]"})
    assert not fits(larger, 400)
    larger = load_tokenizer(str(tmp_path))
    larger.add_tokens(["word"])
    assert not fits(larger, 400)
