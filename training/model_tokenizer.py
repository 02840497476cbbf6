"""The tokenizer of a model that a command was given."""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.conversion.tokenizer_files import VOCABULARY

from .errors import CorpusError
from .tokenizer import fits, load_tokenizer


def load_model_tokenizer(
    place: str | None, source: str, vocab_size: int, eos_token: str | None = None
) -> PreTrainedTokenizerFast:
    """
    Loads the tokenizer that a model's tokens are of.

    Args:
        place (`str`, *optional*): Where it is, as `--tokenizer` says; with the model, if not given.
        source (`str`): Where the model is.
        vocab_size (`int`): Tokens that the model knows.
        eos_token (`str`, *optional*): Its token for the end of a text, as `--eos-token` says.

    Raises:
        `UserError`: If there is none, it lacks the token, or text can become tokens that the model does not know.
    """
    place = place or source
    try:
        tokenizer = load_tokenizer(place, eos_token)
    except CorpusError as error:
        remedy = "" if eos_token else f" Say where the tokenizer of {source} is with --tokenizer."
        raise UserError(f"{error}{remedy}") from error
    if not fits(tokenizer, vocab_size):
        raise UserError(
            f"The tokenizer of {place} has {len(tokenizer):,} tokens, and {source} {vocab_size:,}: they do not belong "
            "together. Give the model's own with --tokenizer."
        )
    return tokenizer


def has_tokenizer(place: str) -> bool:
    """Whether a folder or repository holds files of a tokenizer. Files are looked for, and not read."""
    folder = Path(place)
    if not folder.exists():  # on the Hub, whose client complains if none of the files is there
        folder = Path(snapshot_download(place, allow_patterns=["config.json", *VOCABULARY]))
    return any((folder / name).exists() for name in VOCABULARY)


def hash_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> str:
    """The same for tokenizers and models whose tokens are the same."""
    parts = (tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id)
    return hashlib.sha256(repr((*parts, vocab_size)).encode()).hexdigest()
