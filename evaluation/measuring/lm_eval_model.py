"""A loaded model for lm-eval that reports what it has done, draws nothing, and does not answer with NaN."""

import copy
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_gpt.evaluation.errors import TaskError


# Set, lm-eval draws the samples of its bootstrap in this process; else it forks others.
SINGLE_PROCESS = "DISABLE_MULTIPROC"
# Whose log messages are lm-eval's, or made on its behalf.
LOGGERS = ("lm_eval", "transformers", "datasets", "huggingface_hub")


class LMEvalModel(HFLM):
    """
    A model and its tokenizer, which stay as they are. Log-probabilities are float32 for weights of any type.

    Args:
        model (`PreTrainedModel`): A causal language model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        batch_size (`int`): Requests in a forward pass.
        on_requests: Called with the number of requests answered and of those known so far, for progress.

    Attributes:
        answered (`int`): Requests so far.
        shortened (`int`): Those whose beginning was left out, since the model can't see as many tokens.

    Raises:
        `TaskError`: If the tokenizer does not suit the model or lm-eval.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        on_requests: Callable[[int, int], None],
    ):
        _check_tokenizer(tokenizer)
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, softmax_dtype="float32"
        )
        self.cache_hook = _AnswerHook(self._take_answer)
        self.answered = self.shortened = 0
        self._on_requests = on_requests
        self._known = 0
        self._streams = sys.stdout, sys.stderr

    @property
    def bos_rule(self) -> str:
        """Which token stands before what is scored, in words."""
        before = _special_tokens_around(self.tokenizer)[0]
        prefix = _name_token(self.tokenizer, self.prefix_token_id)
        if before:
            tokens = " ".join(_name_token(self.tokenizer, token) for token in before)
            return f"{tokens} before every context, by the tokenizer's rule; {prefix} where there is no context"
        return f"no token before a context; {prefix} where there is no context"

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self._answering(requests):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        with self._answering(requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        with self._answering(requests):
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, override_bs: int | None = None):
        for texts, context_ids, continuation_ids in requests:
            self._check_tokens(context_ids, continuation_ids)
            if texts is not None:  # none of a long text's windows, which are as long as the model can see
                self.shortened += len(context_ids) + len(continuation_ids) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _check_tokens(self, context_ids: list[int], continuation_ids: list[int]):
        if len(continuation_ids) > self.max_length:
            raise TaskError(
                f"A sample has {len(continuation_ids)} tokens to be predicted, and the model sees {self.max_length}: "
                f"this task needs one with more positions. The sample: {self.tok_decode(continuation_ids)[:80]!r}"
            )
        largest, vocab_size = max([*context_ids, *continuation_ids]), self.config.vocab_size
        if largest >= vocab_size:
            raise TaskError(
                f"The tokenizer makes a token {largest}, and the model knows 0 to {vocab_size - 1}: give the one that "
                "it was trained with."
            )

    @contextmanager
    def _answering(self, requests: list[Instance]) -> Iterator[None]:
        """With the terminal as it was when this model was made, for who shows the progress."""
        self._known += len(requests)
        stdout, stderr = self._streams
        with redirect_stdout(stdout), redirect_stderr(stderr):
            yield

    def _take_answer(self, request: tuple, answer: tuple[float, bool] | float | str):
        value = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(value, float) and not math.isfinite(value):
            raise TaskError(
                f"The model gives {request[-1][:40]!r} a log-probability of {value}, and scores of that mean nothing: "
                "look for weights that are not finite."
            )
        self.answered += 1
        self._on_requests(self.answered, self._known)


class _AnswerHook(CacheHook):
    """Receives every answer in place of lm-eval's cache."""

    def __init__(self, on_answer: Callable[[tuple, object], None]):
        super().__init__(None)
        self._on_answer = on_answer

    def add_partial(self, attr, req, res):
        self._on_answer(req, res)


@contextmanager
def quiet_loggers() -> Iterator[None]:
    """Without what lm-eval, and others on its behalf, log below errors."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet_streams() -> Iterator[None]:
    """Without what lm-eval prints and draws between the model's answers, and in this process alone."""
    earlier = os.environ.get(SINGLE_PROCESS)
    os.environ[SINGLE_PROCESS] = "1"
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        if earlier is None:
            del os.environ[SINGLE_PROCESS]
        else:
            os.environ[SINGLE_PROCESS] = earlier


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase):
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise TaskError(
            "The tokenizer has no token for the beginning or end of a text, which lm-eval puts before samples without "
            "a context: set its bos_token."
        )
    after = _special_tokens_around(tokenizer)[1]
    if after:
        raise TaskError(
            f"The tokenizer puts {' '.join(_name_token(tokenizer, token) for token in after)} after every text, which "
            "lm-eval would take for a part of it: set its add_eos_token to False, or change its post-processor."
        )


def _special_tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text of its own accord."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    encoded = tokenizer.encode("a")
    start = next(start for start in range(len(encoded)) if encoded[start : start + len(plain)] == plain)
    return encoded[:start], encoded[start + len(plain) :]


def _name_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"
