"""A model that a client drafts with, in the clear and at home."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from modeling_entropy_gpt.forward_keywords import CACHE

from .sampling import Noise, Sampling, choose


class DraftModel:
    """
    Drafts tokens as a causal language model continues a text.

    Args:
        model (`PreTrainedModel`): Any causal language model whose tokens are those of the server's model.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model.float().eval()

    def begin(self, prompt: list[int], sampling: Sampling, vocab_size: int) -> Callable[[list[int], int], list[int]]:
        """
        Args:
            prompt (`list[int]`): Tokens.
            sampling ([`Sampling`]):
                As of the answer. Drafts have the noise of the tokens that they stand for, and are drawn alike.
            vocab_size (`int`): Tokens of the server's model.
        """
        noise, continuation = Noise(sampling, vocab_size), _Continuation(self.model)

        def draft(known: list[int], count: int) -> list[int]:
            drafted: list[int] = []
            for row in noise.rows(len(known), count):
                found = continuation.logits([*prompt, *known, *drafted])
                logits = np.full(vocab_size, -np.inf, np.float32)
                logits[: len(found)] = found[:vocab_size]
                drafted.append(choose(logits, sampling, row))
            return drafted

        return draft


class _Continuation:
    """The logits after tokens, with keys and values of those that they have in common with the tokens before."""

    def __init__(self, model: PreTrainedModel):
        self._model, self._cache, self._cached = model, DynamicCache(config=model.config), []
        # Models with relative positions have no such number.
        self._positions = getattr(model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> np.ndarray:
        """`(vocabulary,)`. Of more tokens than the model has positions, it reads the last ones."""
        known = self._model.config.vocab_size
        tokens = [token if token < known else 0 for token in tokens[-(self._positions or len(tokens)) :]]
        pairs = zip(self._cached, tokens[:-1], strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if same < len(self._cached):
            self._cache.crop(same - len(self._cached))
        found = self._model(torch.tensor([tokens[same:]]), use_cache=True, **{CACHE: self._cache})
        self._cached = tokens
        return found.logits[0, -1].numpy()
