"""Saved models with a tokenizer, as tools of strangers find them."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.architectures import SIZES


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """Saves a model of the tests' sizes, with a tokenizer that reads `w0 w1 ... w100`; returns the folder."""
    words = {f"w{token}": token for token in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w0", "eos_token": "w0", "pad_token": "w1"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
