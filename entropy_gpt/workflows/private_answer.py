"""An answer of a private model as text, with its cost, and how it is followed while it comes."""

import time
from collections.abc import Callable
from dataclasses import field
from typing import Any, Protocol

from pydantic.dataclasses import dataclass
from transformers import PreTrainedTokenizerFast

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD, StoredRecord
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.session import Outcome
from entropy_gpt.evaluation.private_inference.parties.terms import Terms
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost
from entropy_gpt.evaluation.records.results import AnswerCheck
from entropy_gpt.training.progress import SILENT, Progress, Stage


@dataclass(config=RECORD)
class PrivateAnswer(StoredRecord):
    """
    The client's answer as text, with its check and its cost.

    Args:
        text (`str`): The continuation of the prompt; empty for a client without a tokenizer.
        check ([`AnswerCheck`], *optional*): How it compares with the model in the clear, if that is at hand.
        seconds (`float`): Wall-clock time, including compilation and set-up.
        cost ([`InferenceCost`]): The cost by the client's count.
        repeats (`int`): How many passes were out of range and computed again; without drafts, each has one token.
        tokens (`list[int]`): Those of the continuation.
        verified (`list[tuple[int, int]]`): Drafts of each pass, and how many of them were right.
    """

    KIND = "a private answer"
    SCHEMA_VERSION = 6

    text: str
    check: AnswerCheck | None
    seconds: float
    cost: InferenceCost = field(repr=False)
    repeats: int = 0
    tokens: list[int] = field(default_factory=list)
    verified: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """Version 3 had no `repeats`, version 4 no `tokens`, version 5 no `verified`."""
        return content if version in (3, 4, 5) else None


class Asked(Protocol):
    """Whom a prompt can be put to: a [`PrivateClient`], or the [`Client`] of one connection."""

    terms: Terms

    def ask(self, question: Question, on_event: Callable[[dict], None] = lambda event: None) -> Outcome: ...


def answer_question(
    client: Asked,
    words: PreTrainedTokenizerFast | None,
    question: Question,
    network: str,
    progress: Progress = SILENT,
    put: Callable[[int], None] = lambda token: None,
) -> tuple[Outcome, PrivateAnswer]:
    """
    Has a prompt continued.

    Args:
        client ([`Asked`]): Who asks the server.
        words (`PreTrainedTokenizerFast`, *optional*): Makes text of the answer.
        question ([`Question`]): The prompt, and what is wanted.
        network (`str`): What connects the parties, for the record.
        progress (`Progress`): Receives one stage.
        put (`Callable`): Receives each new token.
    """
    started = time.perf_counter()
    with progress.stage("answering privately") as line:
        line.say("both sides compile the program")

        def follow(event: dict):
            show_event(event, line)
            if event["event"] == "token":
                put(event["token"])

        outcome = client.ask(question, follow)
    answer = PrivateAnswer(
        text=words.decode(outcome.tokens) if words else "",
        check=None,
        seconds=time.perf_counter() - started,
        cost=outcome.cost(client.terms, len(question.prompt), question.new_tokens, network),
        repeats=outcome.repeats.total(),
        tokens=outcome.tokens,
        verified=outcome.verified,
    )
    return outcome, answer


def show_event(event: dict[str, Any], line: Stage):
    """Reports an event of [`Client.ask`] to a stage: the number of steps, and each step with its layer."""
    if event["event"] == "unprepared":
        line.say("no preparation fits: all of it is computed now")
    elif event["event"] == "one phase":
        line.say("drafts are verified in one phase: no preparation is used")
    elif event["event"] == "tables":
        line.say("the server sends its embeddings, once")
    elif event["event"] == "waiting":
        before, seconds = event["before"], event["seconds"]
        line.say(f"the server is busy; clients before this one: {before}; it is given up in {seconds} s")
    elif event["event"] == "program":
        line.reach(0, event["steps"])
    elif event["event"] == "verified":
        line.say(f"{event['right']} of {event['drafts']} drafts were right")
        line.reach(0)
    elif event["event"] == "step":
        layer = "" if event["cost"]["layer"] is None else f"layer {event['cost']['layer']}, "
        line.say(layer + event["cost"]["operation"])
        line.advance()


def tokenize(prompt: str, words: PreTrainedTokenizerFast) -> list[int]:
    """
    Raises:
        `PrivateInferenceError`: If there are no tokens.
    """
    tokens = words(prompt)["input_ids"]
    if not tokens:
        raise PrivateInferenceError("the prompt is empty: give some text.")
    return tokens
