"""Perplexity of a causal language model on packed blocks of tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from pydantic.dataclasses import dataclass
from tokenizers.decoders import ByteLevel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .records import RECORD


# The largest power of e that a float holds is a little above.
LARGEST_EXPONENT = 700


@dataclass(config=RECORD)
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


@dataclass(config=RECORD)
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


@dataclass(config=RECORD)
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
        """Bits that the model takes for a byte of text; comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes


def perplexity_of(nats: float) -> float:
    """The perplexity of a mean negative log-likelihood: infinite where a float can't hold it, NaN of NaN."""
    return math.inf if nats >= LARGEST_EXPONENT else math.exp(nats)


def measure_likelihood(
    model: PreTrainedModel,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerFast | None,
    batch_size: int = 32,
    on_blocks: Callable[[int], None] = lambda count: None,
) -> Likelihood:
    """
    Predicts each block on its own, its first token excepted: the stride is the length of a block, so the tokens at the
    beginning of a block have little context, and a longer one or an overlap would give a lower perplexity.

    Args:
        model (`PreTrainedModel`): A causal language model; evaluated as it stands, without dropout.
        blocks (`Dataset`): Column `input_ids`, of equal length, as `training.packing.pack` makes it.
        tokenizer (`PreTrainedTokenizerFast`, *optional*):
            The byte-level tokenizer that made the blocks; without, the number of bytes is not known.
        batch_size (`int`): Blocks in a forward pass.
        on_blocks: Called with the number of blocks after each forward pass, for progress.

    Raises:
        `ValueError`: If the tokenizer is not byte-level, so that a token's number of bytes is unknown.
    """
    bytes_of_token = None if tokenizer is None else count_bytes(tokenizer).to(model.device)
    nats, tokens, length = 0.0, 0, 0
    with evaluation_mode(model):
        for input_ids in batches(blocks, batch_size, model.device):
            labels = input_ids[:, 1:]
            logits = model(input_ids, use_cache=False).logits[:, :-1]
            losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
            nats += losses.double().sum().item()
            tokens += labels.numel()
            if bytes_of_token is not None:
                length += bytes_of_token[labels].sum().item()
            on_blocks(len(input_ids))
    return Likelihood(nats, tokens, None if tokenizer is None else length)


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout and gradients for the body, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batches(blocks: Dataset, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Yields `input_ids` of shape `(batch, block_size)`."""
    for batch in blocks.with_format("torch").iter(batch_size):
        yield batch["input_ids"].to(device)


def count_bytes(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """
    The number of bytes that each token of a byte-level tokenizer stands for; special tokens stand for none.

    Returns:
        `torch.Tensor` of shape `(len(tokenizer),)`, integer.

    Raises:
        `ValueError`: If the tokenizer is not byte-level.
    """
    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        raise ValueError(
            f"Bits per byte need a byte-level tokenizer, and {type(tokenizer).__name__} decodes with "
            f"{tokenizer.backend_tokenizer.decoder}: use one like GPT-2's."
        )
    # In such a vocabulary each character of a token stands for one byte.
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    return torch.tensor([0 if token in special else len(token) for token in tokens])
