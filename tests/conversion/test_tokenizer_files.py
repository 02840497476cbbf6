"""Tokenizers are saved under a class that transformers 4 knows too; test_releases.py loads them there."""

import json

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from entropy_gpt.conversion.tokenizer_files import save_tokenizer
from entropy_gpt.training.tokenizer import train_tokenizer


TEXT = "def main():\n    return 1\n"


@pytest.fixture
def tokenizer():
    return train_tokenizer([TEXT] * 3, vocab_size=300)


def class_in(folder) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["tokenizer_class"]


def test_the_class_has_the_name_of_all_releases(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    assert class_in(tmp_path) == "PreTrainedTokenizerFast"


def test_what_is_loaded_is_the_same_tokenizer(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert len(loaded) == len(tokenizer)


def test_another_class_keeps_its_name_and_its_file(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    gpt2 = GPT2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    gpt2.save_pretrained(tmp_path / "expected")
    save_tokenizer(gpt2, tmp_path / "saved")
    assert class_in(tmp_path / "saved") == "GPT2Tokenizer"
    saved, expected = (tmp_path / name / "tokenizer_config.json" for name in ("saved", "expected"))
    assert saved.read_bytes() == expected.read_bytes()
