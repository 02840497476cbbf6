"""Answers a request for completions by way of a private client, and writes answers as OpenAI's protocol has them."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from entropy_gpt.evaluation.private_inference.parties.job import read_array
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.workflows.private_client import PrivateClient

from .costs import Meter
from .line import Job, Waiting
from .requests import CompletionRequest
from .text import AnswerText, Piece, TokenProbability


STOPPED, TOO_LONG = "stop", "length"


@dataclass(frozen=True)
class Delta:
    """
    What is new of one answer.

    Args:
        index (`int`): The answer's number.
        piece ([`Piece`]): New text.
        finish_reason (`str`, *optional*): Why it has ended.
    """

    index: int
    piece: Piece
    finish_reason: str | None = None


@dataclass(frozen=True)
class Cost:
    """What a step took, as of [`Meter.note`]."""

    content: dict


@dataclass
class Completion:
    """
    All answers to a request.

    Args:
        request ([`CompletionRequest`]): What is asked for.
        prompts (`list[list[int]]`): Tokens of each prompt.

    Attributes:
        meter ([`Meter`]): What it has cost so far.
    """

    request: CompletionRequest
    prompts: list[list[int]]
    meter: Meter = field(default_factory=Meter)
    completion_tokens: int = 0

    def work(self, client: PrivateClient, job: Job):
        """Has all answers computed, one after another, and says to the job what is new: [`Delta`], [`Cost`]."""
        count = self.request.n or 1
        for number, prompt in enumerate(self.prompts):
            first = number * count
            if self.request.sampling().temperature:
                for choice in range(count):
                    self._answer(client, job, prompt, choice, [first + choice])
            else:  # the most likely tokens are the same each time, and computed once
                self._answer(client, job, prompt, 0, range(first, first + count))

    def _answer(self, client: PrivateClient, job: Job, prompt: list[int], choice: int, indexes: Sequence[int]):
        request, wanted, tokens = self.request, self.request.new_tokens, []
        text = AnswerText(client.tokenizer, request.stops, request.logprobs)

        def tell(piece: Piece):
            for index in indexes if piece.text or piece.probabilities else ():
                job.emit(Delta(index, piece))

        def ask(sent: list[int], new_tokens: int, positions: int, take: Callable[[int, np.ndarray | None], None]):
            def follow(event: dict):
                job.check()
                if event["event"] == "waiting":
                    job.emit(Waiting(event["before"], event["seconds"], "clients of the server"))
                if (content := self.meter.note(event)) is not None:
                    job.emit(Cost(content))
                if event["event"] == "token":
                    take(event["token"], read_array(event["logits"]) if "logits" in event else None)

            question = Question(sent, new_tokens, positions, request.sampling(choice, len(tokens)))
            self.meter.begin(len(sent), new_tokens, positions)
            client.ask(question, follow)

        def add(token: int, logits: np.ndarray | None):
            tokens.append(token)
            tell(text.add(token, None if logits is None else logits[-1]))

        def score(token: int, logits: np.ndarray):
            tell(text.echo(prompt, logits))
            if wanted:
                add(token, logits)

        if request.echo and request.logprobs is not None:
            ask(prompt, 1, len(prompt), score)
        elif request.echo:
            tell(text.echo(prompt, None))
        if len(tokens) < wanted:
            ask([*prompt, *tokens], wanted - len(tokens), 1, add)
        tell(text.finish())
        self.completion_tokens += len(text.tokens) * len(indexes)
        for index in indexes:
            job.emit(Delta(index, Piece(), STOPPED if text.ended else TOO_LONG))

    def usage(self) -> dict:
        """Tokens of prompts and answers, as the protocol counts them."""
        prompt_tokens = sum(map(len, self.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }


class Writer:
    """
    Writes the parts of one answer of the protocol.

    Args:
        model (`str`): Its name.
    """

    def __init__(self, model: str):
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, delta: Delta) -> dict:
        """A part of a stream."""
        return self._head | {"choices": [_choice(delta.index, delta.piece, delta.finish_reason)]}

    def cost(self, cost: Cost) -> dict:
        """A step, for who asks for it by `stream_options.include_costs`."""
        return self._head | {"choices": [], "private": cost.content}

    def end(self, completion: Completion) -> dict:
        """The last part of a stream that shows its usage."""
        return self._head | {"choices": [], "usage": completion.usage(), "private": completion.meter.report()}

    def whole(self, completion: Completion, deltas: list[Delta]) -> dict:
        """An answer that is no stream."""
        pieces: dict[int, Piece] = {}
        reasons = {}
        for delta in deltas:
            piece = pieces.setdefault(delta.index, Piece())
            piece.text += delta.piece.text
            piece.probabilities += delta.piece.probabilities
            reasons[delta.index] = delta.finish_reason
        logprobs = completion.request.logprobs is not None
        choices = [_choice(index, pieces[index], reasons[index], logprobs) for index in sorted(pieces)]
        usage = {"usage": completion.usage(), "private": completion.meter.report()}
        return self._head | {"choices": choices} | usage


def _choice(index: int, piece: Piece, finish_reason: str | None, logprobs: bool = False) -> dict:
    shown = piece.probabilities or logprobs
    return {
        "index": index,
        "text": piece.text,
        "logprobs": _logprobs(piece.probabilities) if shown else None,
        "finish_reason": finish_reason,
    }


def _logprobs(found: list[TokenProbability]) -> dict:
    return {
        "tokens": [each.token for each in found],
        "token_logprobs": [each.logprob for each in found],
        "top_logprobs": [each.top for each in found],
        "text_offset": [each.offset for each in found],
    }
