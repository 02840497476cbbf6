"""Tokenizers as files that every release of transformers from 4.57 on loads."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast


# Its name in all of them, where 5 writes the new one.
CLASS = "PreTrainedTokenizerFast"
# What the tokens are in; a tokenizer has at least one of them.
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path):
    """
    Saves a tokenizer by the class that transformers 4 knows it by too.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The tokenizer.
        folder (`str` or `Path`): Where its files go.
    """
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == PreTrainedTokenizerFast.__name__:
        config["tokenizer_class"] = CLASS
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
