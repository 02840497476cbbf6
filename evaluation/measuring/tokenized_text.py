"""Texts as tokens, with the words and bytes that the tokens to be predicted stand for."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedText:
    """
    A document, or what was taken of it.

    Args:
        input_ids (`np.ndarray`): Its tokens, with those that stand before and after it.
        words (`int`): Words, parts between white space, of the text that is predicted.
        bytes (`int`): Bytes of that text in UTF-8.
    """

    input_ids: np.ndarray
    words: int
    bytes: int

    def compact(self) -> "TokenizedText":
        """The same with tokens in the least memory."""
        return replace(self, input_ids=self.input_ids.astype(np.min_scalar_type(self.input_ids.max(initial=0))))


def tokenize(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    separate: bool,
    bos: bool,
    most: int | None = None,
    on_document: Callable[[], None] = lambda: None,
) -> Iterator[TokenizedText]:
    """
    Tokenises documents one by one. The name of a special token in a text is text.

    Args:
        texts (`Iterable[str]`): The documents.
        tokenizer (`PreTrainedTokenizerBase`): Any that knows where in the text its tokens lie.
        separate (`bool`): Whether each document stands alone; else the documents follow one another, with an
            end-of-text token after each.
        bos (`bool`): Whether a beginning-of-text token stands before each document, or before the first if they follow
            one another. Without, the first token is not predicted, and its text not counted.
        most (`int`, *optional*): Tokens of text after which to stop; the last document is cut.
        on_document: Called after each document.

    Raises:
        `ValueError`: If the tokenizer lacks the special token that is needed.
    """
    before = [_bos_token(tokenizer)] if bos else []
    left, is_first = most, True
    for text in texts:
        tokens, ends = _encode(text, tokenizer)
        is_cut = left is not None and len(tokens) >= left
        if is_cut:
            tokens, ends = tokens[:left], ends[:left]
            text = text[: ends[-1]] if ends else ""
        begins_sequence = separate or is_first
        predicted = text if bos or not begins_sequence else text[ends[0] if ends else 0 :]
        after = [] if separate or is_cut else [_eos_token(tokenizer)]
        input_ids = np.array([*(before if begins_sequence else []), *tokens, *after], dtype=np.int64)
        yield TokenizedText(input_ids, len(predicted.split()), len(predicted.encode(errors="surrogatepass")))
        on_document()
        left = None if left is None else left - len(tokens)
        is_first = False
        if is_cut:
            return


def count_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """How often each token is in the texts, `(vocab_size,)`."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for text in texts:
        tokens, _ = _encode(text, tokenizer)
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of a text, and for each the character of the text that it ends before."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return encoding["input_ids"], [end for _, end in encoding["offset_mapping"]]


def _bos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """GPT-2's tokenizers have one token for both ends of a text."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ValueError("The tokenizer has no token for the beginning of a text: leave out --bos.")
    return token


def _eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-text token to stand between documents: name one of its tokens with "
            "--eos-token, or evaluate each document separately (--separate)."
        )
    return tokenizer.eos_token_id
