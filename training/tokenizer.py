"""Tokenizers: trained on the text, or loaded and checked."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

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


def load_tokenizer(place: str) -> PreTrainedTokenizerFast:
    """
    Loads the tokenizer in a folder or repository.

    Raises:
        `CorpusError`: If there is none, or it is no fast one with an end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # readers raise whatever a damaged file makes them
        raise CorpusError(f"{place} has no tokenizer that can be loaded.") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise CorpusError(f"The tokenizer of {place} is no fast one with an end-of-text token.")
    special = len(tokenizer.all_special_tokens)
    if tokenizer.backend_tokenizer.get_vocab_size() <= special:  # transformers makes such a one where files lack
        raise CorpusError(f"{place} has no tokenizer files.")
    return tokenizer
