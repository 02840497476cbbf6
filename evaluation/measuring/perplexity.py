"""Perplexity of a causal language model on text: per token, per word, and bits per byte."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic.dataclasses import dataclass as record
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from entropy_gpt.evaluation.json_records import RECORD

from .modes import evaluation_mode
from .tokenized_text import TokenizedText


if TYPE_CHECKING:
    from datasets import Dataset


# The largest power of e that a float holds is a little above.
LARGEST_EXPONENT = 700
# Numbers of the logits that are computed at once: few enough that the processor's cache still holds them.
LOGITS_AT_ONCE = 1 << 21
# Models whose logits are their head's linear map of the last hidden states: computed only for what is predicted.
PLAIN_HEADS = ("entropy_gpt", "gpt2")
# Batches' worth of windows that are sorted by length together.
SORTED_BATCHES = 32


@record(config=RECORD)
class Windows:
    """
    How a text is cut into what a model sees at once.

    Args:
        context (`int`): Tokens that the model sees at most.
        stride (`int`): Tokens that a window is further than the one before; those are predicted, each once, with at
            least `context - stride + 1` tokens before them.
        separate (`bool`): Whether each document stands alone; else they follow one another, with an end-of-text token
            after each, which is predicted too.
        bos (`bool`): Whether a beginning-of-text token stands before each document, or before the first if they
            follow one another, so that the first token is predicted too.
    """

    context: int
    stride: int
    separate: bool
    bos: bool


@record(config=RECORD)
class Part:
    """
    Some of the predicted tokens.

    Args:
        begin (`int`): The first of the positions (tokens before it), or of the frequencies, that they have.
        end (`int`, *optional*): The first that none has any more; none where there is no limit.
        tokens (`int`): How many.
        nats (`float`): Negative log-likelihood of all of them together.
    """

    begin: int
    end: int | None
    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Per token; NaN without tokens."""
        return perplexity_of(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def range(self) -> str:
        """From the first to the last of the positions or frequencies, in words."""
        if self.end is None:
            return f"{self.begin:,} and more"
        last = self.end - 1
        return f"{self.begin:,}" if last == self.begin else f"{self.begin:,} to {last:,}"


@record(config=RECORD)
class Likelihood:
    """
    How well a model predicts a text.

    Args:
        nats (`float`): Negative log-likelihood of all predicted tokens together.
        tokens (`int`): Number of predicted tokens.
        words (`int`): Number of words, parts between white space, that they stand for.
        bytes (`int`): Number of bytes of text in UTF-8 that they stand for.
        windows ([`Windows`]): What the model saw at once.
        by_position (`list[Part]`, *optional*): The same by the number of tokens that the model saw before each.
        by_frequency (`list[Part]`, *optional*): The same by how often the token is in a training text.
        frequency_text (`str`, *optional*): Which text that is.
    """

    nats: float
    tokens: int
    words: int
    bytes: int
    windows: Windows
    by_position: list[Part] | None = None
    by_frequency: list[Part] | None = None
    frequency_text: str | None = None

    @property
    def perplexity(self) -> float:
        """Perplexity per token; depends on the tokenizer."""
        return perplexity_of(self.nats / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word; comparable between tokenizers. NaN for a text without words."""
        return perplexity_of(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model takes for a byte of text; comparable between tokenizers. NaN without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def perplexity_of(nats: float) -> float:
    """The perplexity of a mean negative log-likelihood: infinite where a float can't hold it, NaN of NaN."""
    return math.inf if nats >= LARGEST_EXPONENT else math.exp(nats)


def measure_likelihood(
    model: PreTrainedModel,
    documents: Iterable[TokenizedText],
    windows: Windows,
    batch_tokens: int = 4096,
    token_counts: np.ndarray | None = None,
    frequency_text: str | None = None,
    by_position: bool = False,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Likelihood:
    """
    Predicts each token of a text once. Equal to predicting token by token, with as many tokens before each as its
    window holds; logits and their logarithms are float32, sums double.

    Args:
        model (`PreTrainedModel`): A causal language model; evaluated as it stands, without dropout.
        documents (`Iterable[TokenizedText]`): What [`tokenize`] made with `windows.separate` and `windows.bos`. They
            are read one by one, as they are wanted.
        windows ([`Windows`]): What the model sees at once.
        batch_tokens (`int`): Tokens in a forward pass, about; it changes speed and memory alone.
        token_counts (`np.ndarray`, *optional*): How often each token is in a training text, `(vocab_size,)`; gives
            `by_frequency`.
        frequency_text (`str`, *optional*): Which text that is.
        by_position (`bool`): Whether to give `by_position`.
        on_tokens: Called with the number of predicted tokens after each forward pass, for progress.

    Raises:
        `ValueError`: If the windows do not suit the model, a token is none of the model's, or there is nothing to
            predict.
    """
    check_windows(windows, model.config)
    tally = _Tally(windows.context, token_counts, model.config.vocab_size)
    counted = _Counted()
    sequences = _sequences(documents, windows.separate, counted)
    cut = itertools.chain.from_iterable(cut_windows(sequence, windows) for sequence in sequences)
    with evaluation_mode(model):
        for batch in _batches_of_windows(cut, windows.context, batch_tokens):
            tally.add(batch, _token_nats(model, batch))
            on_tokens(sum(window.predicted for window in batch))
    if not tally.tokens:
        raise ValueError(
            f"There is nothing to predict: {counted.documents:,} documents have {counted.tokens:,} tokens in all, and "
            "without a token before it (BOS) a text needs two."
        )
    return Likelihood(
        nats=tally.nats,
        tokens=tally.tokens,
        words=counted.words,
        bytes=counted.bytes,
        windows=windows,
        by_position=tally.by_position() if by_position else None,
        by_frequency=None if token_counts is None else tally.by_frequency(),
        frequency_text=frequency_text,
    )


def check_windows(windows: Windows, config: PreTrainedConfig):
    """
    Refuses windows that a model can't see, or that would leave tokens out.

    Raises:
        `ValueError`: If there is such a setting.
    """
    if not 1 <= windows.context <= config.max_position_embeddings:
        raise ValueError(
            f"A context of {windows.context} tokens is not possible: the model has {config.max_position_embeddings} "
            f"positions; allowed are 1 to {config.max_position_embeddings}."
        )
    if not 1 <= windows.stride <= windows.context:
        raise ValueError(
            f"A stride of {windows.stride} tokens is not possible: allowed are 1 to the context, {windows.context}; "
            "beyond it, tokens would be left out."
        )


@dataclass(frozen=True)
class Window:
    """
    What the model sees at once.

    Args:
        tokens (`np.ndarray`): The tokens that it sees, and after them the last one that it predicts.
        predicted (`int`): How many at the end are predicted here; those before were in another window, or have
            nothing before them.
    """

    tokens: np.ndarray
    predicted: int

    @property
    def length(self) -> int:
        """Number of tokens that the model sees."""
        return len(self.tokens) - 1


def cut_windows(pieces: Iterable[np.ndarray], windows: Windows) -> Iterator[Window]:
    """
    Cuts one sequence, which comes in pieces, into windows: the first predicts `context` tokens, each of the others
    the next `stride`, the last those that are left, all with as many tokens before them as a window holds.
    """
    context = windows.context
    held = np.empty(0, dtype=np.int64)  # what is still to be seen
    done = 1  # of it, how many tokens at the beginning are predicted, or have nothing before them
    advance = context
    for piece in pieces:
        held = np.concatenate([held, piece])
        while (end := done + advance) <= len(held):
            yield Window(held[end - context - 1 : end], advance)
            done, advance = end, windows.stride
        still_seen = max(0, done - context)
        held, done = held[still_seen:], done - still_seen
    if len(held) > done:
        yield Window(held[-context - 1 :], len(held) - done)


def _sequences(
    documents: Iterable[TokenizedText], separate: bool, counted: "_Counted"
) -> Iterator[Iterable[np.ndarray]]:
    """Each document, or all as one sequence, in pieces; counts what comes by."""
    pieces = (counted.add(document) for document in documents)
    if separate:
        yield from ([piece] for piece in pieces)
    else:
        yield pieces


class _Counted:
    """What of the text came by so far."""

    def __init__(self):
        self.documents, self.tokens, self.words, self.bytes = 0, 0, 0, 0

    def add(self, document: TokenizedText) -> np.ndarray:
        self.documents += 1
        self.tokens += len(document.input_ids)
        self.words += document.words
        self.bytes += document.bytes
        return document.input_ids


def _batches_of_windows(windows: Iterable[Window], context: int, batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of about one length, longest first among those that are next."""
    windows = iter(windows)
    while chunk := list(itertools.islice(windows, SORTED_BATCHES * max(1, batch_tokens // context))):
        batch = []
        for window in sorted(chunk, key=lambda window: window.length, reverse=True):
            if batch and (len(batch) + 1) * batch[0].length > batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        yield batch


def _token_nats(model: PreTrainedModel, batch: list[Window]) -> torch.Tensor:
    """Negative log-likelihood of every predicted token of a batch, window after window, float32."""
    length = batch[0].length
    # What fills up the shorter ones stands after all that is predicted, where no causal model looks.
    rows = torch.from_numpy(np.stack([np.pad(window.tokens, (0, length - window.length), "edge") for window in batch]))
    ends, counts = (torch.tensor([getattr(window, name) for window in batch]) for name in ("length", "predicted"))
    places = torch.arange(length)
    predicted = ((places < ends[:, None]) & (places >= (ends - counts)[:, None])).to(model.device)
    rows = rows.to(model.device)
    targets = rows[:, 1:][predicted]
    if model.config.model_type not in PLAIN_HEADS:
        return _losses(model(rows[:, :-1], use_cache=False).logits[predicted], targets)
    hidden_states = model.base_model(rows[:, :-1], use_cache=False).last_hidden_state[predicted]
    head = model.get_output_embeddings()
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = zip(hidden_states.split(at_once), targets.split(at_once), strict=True)
    return torch.cat([_losses(head(states), expected) for states, expected in parts])


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


class _Tally:
    """Sums over predicted tokens, by the number of tokens seen before each and by how frequent each is."""

    def __init__(self, context: int, token_counts: np.ndarray | None, vocab_size: int):
        self.nats, self.tokens = 0.0, 0
        self._vocab_size = vocab_size
        self._positions = np.zeros((2, context + 1))
        self._edges = [0, 1]
        if token_counts is not None:
            # Decades: never, 1 to 9 times, 10 to 99, and so on.
            self._edges += [10**power for power in range(1, len(str(token_counts.max())))]
            self._classes = np.searchsorted(self._edges, token_counts, side="right") - 1
        self._token_counts = token_counts
        self._frequencies = np.zeros((2, len(self._edges)))

    def add(self, batch: list[Window], nats: torch.Tensor):
        nats = nats.double().cpu().numpy()
        self.nats += nats.sum().item()
        self.tokens += len(nats)
        seen = np.concatenate([np.arange(window.length - window.predicted, window.length) + 1 for window in batch])
        _add_by(self._positions, seen, nats)
        if self._token_counts is not None:
            targets = np.concatenate([window.tokens[len(window.tokens) - window.predicted :] for window in batch])
            _add_by(self._frequencies, self._classes[targets], nats)

    def by_position(self) -> list[Part]:
        """In half octaves: 1, 2, 3, 4 and 5, 6 and 7, 8 to 10, and so on."""
        context = self._positions.shape[1] - 1
        edges = [1]
        while edges[-1] <= context:
            edges.append(max(edges[-1] + 1, math.ceil(2 ** (len(edges) / 2))))
        edges = sorted({min(edge, context + 1) for edge in edges})
        tokens, nats = (np.add.reduceat(row, edges[:-1]) for row in self._positions)
        return _parts(edges, tokens, nats)

    def by_frequency(self) -> list[Part]:
        return _parts([*self._edges, None], *self._frequencies)


def _add_by(sums: np.ndarray, classes: np.ndarray, nats: np.ndarray):
    """Adds the number of tokens and their nats to the rows of `sums`, `(2, classes)`."""
    sums[0] += np.bincount(classes, minlength=sums.shape[1])
    sums[1] += np.bincount(classes, nats, minlength=sums.shape[1])


def _parts(edges: list[int | None], tokens: np.ndarray, nats: np.ndarray) -> list[Part]:
    """Those that have tokens."""
    return [
        Part(begin, end, int(count), float(sum_))
        for (begin, end), count, sum_ in zip(itertools.pairwise(edges), tokens, nats, strict=True)
        if count
    ]


def batches(blocks: "Dataset", batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yields `input_ids` of shape `(batch, block_size)`."""
    for batch in blocks.with_format("torch").iter(batch_size):
        yield batch["input_ids"].to(device)
