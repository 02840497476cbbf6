"""Streams: documents read anew in every pass, shuffled and packed meanwhile, in constant memory."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import IterableDataset
from transformers import PreTrainedTokenizerFast

from .packing import cut_blocks, token_type, tokenize


@dataclass(frozen=True)
class Texts:
    """
    The texts of documents, read one after the other, and anew whenever they are iterated over.

    Args:
        rows (`IterableDataset`): A row for each document.
        text_of: Gives the text of a row. Rows are shuffled without it, so that they may be less than their text.
    """

    rows: IterableDataset
    text_of: Callable[[dict], str]

    def __iter__(self) -> Iterator[str]:
        return map(self.text_of, self.rows)

    def shuffle(self, seed: tuple[int, ...], buffer_size: int) -> "Texts":
        """The texts in another order: parts of the data set, and the documents in a buffer, are shuffled."""
        generator = np.random.default_rng(seed)
        return replace(self, rows=self.rows.shuffle(generator=generator, buffer_size=buffer_size))


class PackedStream(torch.utils.data.IterableDataset):
    """
    Blocks of tokens out of texts that are read, shuffled, tokenised and packed meanwhile: the same as those of
    [`pack`] in the order of the pass, with what is left at its end joined to the next pass. The order
    depends on seed and pass alone, so a `Trainer` that skips the batches it has seen goes on with the very next one.

    A stream has no end by default. A `Trainer`, which does not know the length of a pass, then takes all of them for
    one epoch, and skips right even if it was interrupted in a later pass.

    Workers of a `DataLoader` share the parts of the data set among them, and pack each for itself. With several
    processes, accelerate reads the stream in the first and hands out batches; each of them gets blocks of its own.

    Args:
        texts ([`Texts`]): Documents.
        tokenizer (`PreTrainedTokenizerFast`): A tokenizer with an end-of-text token.
        block_size (`int`): Length of a block in tokens.
        seed (`int`): Seed of the order.
        shuffle_buffer (`int`): Documents among which each is drawn.
        passes (`int`, *optional*): How often the documents are read; without end if left out.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        seed: int = 0,
        shuffle_buffer: int = 10_000,
        passes: int | None = None,
    ):
        self.texts = texts
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.passes = passes
        self._epoch = torch.tensor(0).share_memory_()  # workers that live on read it too

    def set_epoch(self, epoch: int):
        """The number of the pass that the next iteration begins with."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        rest = np.empty(0, dtype=token_type(self.tokenizer))
        for tokens in tokenize(self._read_passes(int(self._epoch)), self.tokenizer):
            blocks, rest = cut_blocks(np.concatenate([rest, tokens]), self.block_size)
            for block in blocks:
                yield {"input_ids": block}

    def _read_passes(self, first: int) -> Iterator[str]:
        passes = itertools.count(first) if self.passes is None else range(first, first + self.passes)
        for number in passes:
            texts = iter(self.texts.shuffle((self.seed, number), self.shuffle_buffer))
            try:
                yield next(texts)
            except StopIteration:  # a worker without a part of its own
                return
            yield from texts
