"""Packing: documents to tokens, joined and cut into blocks of equal length."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from .errors import CorpusError
from .text_pieces import cut_pieces


if TYPE_CHECKING:
    from datasets import Dataset


# The size of a batch of documents: work for all threads of the tokenizer, and little memory.
BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096


class Witness:
    """Counts and hashes texts as they are read, the hash into one that may be shared."""

    def __init__(self, texts: Iterable[str], digest: "hashlib._Hash"):
        self.texts = texts
        self.digest = digest
        self.documents = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.documents += 1
            self.digest.update(hashlib.sha256(text.encode()).digest())
            yield text


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    block_size: int,
    on_documents: Callable[[int], None] = lambda count: None,
    path: Path | None = None,
    most_blocks: int | None = None,
) -> "Dataset":
    """
    Joins documents, each followed by the end-of-text token, and cuts them into blocks of equal length.

    Args:
        texts (`Iterable[str]`): Documents, in the order in which they are joined; a batch of them is held at a time.
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with an end-of-text token.
        block_size (`int`): Length of a block in tokens. What is left at the end is dropped.
        on_documents: Called with the number of documents, whenever some are done, for progress.
        path (`Path`, *optional*): An Arrow file to write the blocks to; without, they are in memory.
        most_blocks (`int`, *optional*): Documents are read until there are this many blocks.

    Returns:
        `Dataset`: Column `input_ids`, of `block_size` tokens a row, as `uint16` where the vocabulary allows it.

    Raises:
        `CorpusError`: If the documents are too short for one block.
    """
    import pyarrow as pa  # these two take seconds, and tokens alone do without them
    from datasets import Dataset, Features, List, Value

    schema = Features({"input_ids": List(Value(token_type(tokenizer).name), length=block_size)}).arrow_schema
    sink = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
    count, rest = 0, np.empty(0, dtype=token_type(tokenizer))
    with sink, pa.ipc.new_stream(sink, schema) as writer:
        for tokens in tokenize(texts, tokenizer, on_documents):
            blocks, rest = cut_blocks(np.concatenate([rest, tokens]), block_size)
            if most_blocks is not None:
                blocks = blocks[: most_blocks - count]
            count += len(blocks)
            column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.reshape(-1)), block_size)
            writer.write_table(pa.Table.from_arrays([column], schema=schema))
            if count == most_blocks:
                break
    if not count:
        raise CorpusError(
            f"The text is too short: it has {len(rest)} tokens, and one block takes {block_size}. Give more text."
        )
    return Dataset.from_buffer(sink.getvalue()) if path is None else Dataset.from_file(str(path))


def spread_blocks(blocks: "Dataset", count: int) -> "Dataset":
    """So many blocks, or all if there are no more, evenly over all of them."""
    count = min(len(blocks), count)
    return blocks.select([index * len(blocks) // count for index in range(count)])


def tokenize(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    on_documents: Callable[[int], None] = lambda count: None,
) -> Iterator[np.ndarray]:
    """Yields the tokens of a batch of documents at a time, with the end-of-text token after each document."""
    backend = plain_backend(tokenizer)
    can_be_cut = _can_be_cut(backend)
    for pieces, are_ends in _batches(texts, can_be_cut):
        tokens = []
        for encoding, is_end in zip(
            backend.encode_batch_fast(pieces, add_special_tokens=False), are_ends, strict=True
        ):
            tokens += encoding.ids
            if is_end:
                tokens.append(tokenizer.eos_token_id)
        yield np.array(tokens, dtype=token_type(tokenizer))
        on_documents(sum(are_ends))


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """
    The fast tokenizer itself, by which text is text, all of it: its wrapper warns of texts longer than a model's
    context, which are packed anyway. A copy that neither cuts nor pads, whatever was saved with it, and in which the
    name of a special token in a text is text.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def cut_blocks(tokens: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens as blocks, `(blocks, block_size)`, and those that are left, `(rest,)`."""
    whole = len(tokens) // block_size * block_size
    return tokens[:whole].reshape(-1, block_size), tokens[whole:]


def token_type(tokenizer: PreTrainedTokenizerFast) -> np.dtype:
    """The smallest type that packed tokens are kept in: batches of them are `int64` all the same."""
    return np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.int32)


def collate_blocks(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of packed blocks, every token of which is a label, the end of text included."""
    input_ids = torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64))
    return {"input_ids": input_ids, "labels": input_ids}


def _can_be_cut(backend: Tokenizer) -> bool:
    """Whether it splits text at each line's end as GPT-2's does, and begins a piece as it goes on with a text."""
    splitter = backend.pre_tokenizer
    return (
        isinstance(splitter, ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and backend.normalizer is None
    )


def _batches(texts: Iterable[str], can_be_cut: bool) -> Iterator[tuple[list[str], list[bool]]]:
    """Pieces of documents, and whether each is the last one of its document."""
    pieces, are_ends, characters = [], [], 0
    for text in texts:
        for piece, is_end in cut_pieces(text) if can_be_cut else [(text, True)]:
            pieces.append(piece)
            are_ends.append(is_end)
            characters += len(piece)
            if characters >= BATCH_CHARACTERS or len(pieces) == BATCH_DOCUMENTS:
                yield pieces, are_ends
                pieces, are_ends, characters = [], [], 0
    if pieces:
        yield pieces, are_ends
