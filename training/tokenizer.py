"""Tokenizers: trained on the text, or loaded and checked."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from entropy_gpt.conversion.foreign_files import check_kind

from .errors import CorpusError
from .text_pieces import cut_pieces


END_OF_TEXT = "<|endoftext|>"
# The bytes and the special token.
SMALLEST_VOCABULARY = 257


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer like GPT-2's, with `<|endoftext|>` as its only special token.

    Args:
        texts (`Iterable[str]`): Text to learn the merges from.
        vocab_size (`int`): Number of tokens, at least 257: the bytes and the special token. Less come out if the text
            does not hold that many.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece, _ in cut_pieces(text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(place: str, eos_token: str | None = None) -> PreTrainedTokenizerFast:
    """
    Loads a tokenizer.

    Args:
        place (`str`): A folder, a repository, or a file like `tokenizer.json`.
        eos_token (`str`, *optional*):
            Its token for the end of a text. Without, the one that it names itself, or `<|endoftext|>` if it has that;
            there may be none.

    Raises:
        `CorpusError`: If there is none, it is no fast one, or it lacks the token.
    """
    _check_file(place)
    try:
        tokenizer = _load(place)
    except Exception as error:  # readers raise whatever a damaged file makes them
        raise CorpusError(f"{place} has no tokenizer that can be loaded.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CorpusError(f"The tokenizer of {place} is no fast one. Save it as a fast one: tokenizer.json.")
    special = len(tokenizer.all_special_tokens)
    vocabulary = tokenizer.backend_tokenizer.get_vocab()
    if len(vocabulary) <= special:  # transformers makes such a one where files lack
        raise CorpusError(f"{place} has no tokenizer files.")
    if eos_token is not None and eos_token not in vocabulary:
        raise CorpusError(f"The tokenizer of {place} has no token {eos_token!r}. {_list_special(tokenizer)}")
    if eos_token is not None or (tokenizer.eos_token_id is None and END_OF_TEXT in vocabulary):
        tokenizer.eos_token = eos_token or END_OF_TEXT
    return tokenizer


def check_end_of_text(tokenizer: PreTrainedTokenizerFast):
    """
    Refuses a tokenizer without an end-of-text token, where documents follow one another.

    Raises:
        `CorpusError`: If it has none.
    """
    if tokenizer.eos_token_id is None:
        raise CorpusError(
            "The tokenizer names no end-of-text token to stand between documents: name one of its tokens as "
            f"eos_token (--eos-token). {_list_special(tokenizer)}"
        )


def fits(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> bool:
    """
    Whether a model knows every token that the tokenizer makes of a text. Special tokens beyond its vocabulary, such as
    an appended `[PAD]`, are never made of a text.
    """
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - ends
    return all(number < vocab_size or number in special for number in tokenizer.get_vocab().values())


def _check_file(place: str):
    """Refuses a file that can't be opened, or is not there but for a pointer to it."""
    if (file := _file_of(place)).is_file():
        check_kind(file, CorpusError)


def _file_of(place: str) -> Path:
    return Path(place) if Path(place).is_file() else Path(place, "tokenizer.json")


def _load(place: str):
    path, file = Path(place), _file_of(place)
    if file.is_file() and (file == path or not (path / "tokenizer_config.json").is_file()):
        return PreTrainedTokenizerFast(tokenizer_file=str(file))  # transformers would take it for GPT-2's
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _list_special(tokenizer: PreTrainedTokenizerFast) -> str:
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return f"Its special tokens are {', '.join(special)}." if special else "It has no special tokens."
