"""
Drafts of the next tokens, which a pass verifies all at once (Leviathan et al. 2022, arXiv:2211.17192).

A client drafts tokens with a model of its own. A pass computes what the server's model says after each of them. The
drafts are kept up to the first that is wrong, and in its place there is the right token. After each pass the client
says where the next one begins: keys and values of wrong drafts are cut off.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.steps import Span

from .sampling import Sampling


NOT_PREPARED = "--require-prepared is not possible with --draft: drafts are verified in one phase."
# What is kept after a pass.
ACCEPTED, PROMPT = "accepted", "prompt"
Keep = Literal["accepted", "prompt"]
DRAFT_TOKENS = 8
# Start and length of the next pass; the length is 0 after the last one.
NEXT = struct.Struct("<II")


class Drafter(Protocol):
    """What a client has drafts from, such as a [`DraftModel`]."""

    def begin(self, prompt: list[int], sampling: Sampling, vocab_size: int) -> Callable[[list[int], int], list[int]]:
        """Begins an answer; what is returned drafts a number of tokens after those of the answer that are known."""


@dataclass(frozen=True)
class Drafts:
    """
    How a client drafts.

    Args:
        drafter ([`Drafter`]): Has the drafts.
        tokens (`int`): The most drafts that a pass verifies; public.
        keep (`str`):
            "accepted": keys and values of right drafts stay. A pass begins where the drafts were wrong, so the server
            learns how many were right. "prompt": only those of the prompt stay, and each further pass computes all
            tokens of the answer. All passes are alike, and the server learns their number.
    """

    drafter: Drafter
    tokens: int = DRAFT_TOKENS
    keep: Keep = ACCEPTED

    def most(self, new_tokens: int) -> int:
        """As of [`most_drafts`]; public."""
        return most_drafts(self.tokens, self.keep, new_tokens)


def most_drafts(tokens: int, keep: Keep, new_tokens: int) -> int:
    """The most drafts that a pass verifies, in an answer of this many tokens. Arguments as of [`Drafts`]."""
    return min(tokens, new_tokens - 1) if keep == ACCEPTED else new_tokens - 1


def least_positions(length: int, new_tokens: int, answers: int, drafts: int) -> int:
    """Those of the first pass, and one more for each token that it may leave to find. Arguments as of a request."""
    return answers + drafts + new_tokens - 1


def needed_positions(length: int, new_tokens: int, answers: int, drafts: int, keep: Keep) -> int:
    """
    What a client has to be granted before the first pass, for an answer that ends even if all drafts are wrong: each
    further pass finds one token then. Where the prompt alone is kept, it computes all tokens but the last one.
    """
    if keep == ACCEPTED:
        return least_positions(length, new_tokens, answers, drafts)
    return answers + drafts + (new_tokens - 1) ** 2


def next_span(length: int, new_tokens: int, known: int, drafts: int, keep: Keep) -> Span | None:
    """
    The pass after one.

    Args:
        length (`int`): Tokens of the prompt.
        new_tokens (`int`): Tokens of the answer.
        known (`int`): Those that are known; the last of them was not read yet.
        drafts (`int`): The most drafts after these.
        keep (`str`): As of [`Drafts`].
    """
    if known == new_tokens:
        return None
    start = length + known - 1 if keep == ACCEPTED else length
    end = length + min(known + drafts, new_tokens - 1)
    return Span(start, end - start, end - start)


def expected_passes(first: Span, new_tokens: int, drafts: int, keep: Keep, acceptance: float) -> dict[Span, float]:
    """
    How often each pass of an answer is to be expected, where each draft after right ones is right with one probability
    (Leviathan et al.).

    Args:
        first ([`Span`]): The pass over the prompt and its drafts.
        new_tokens (`int`): Tokens of the answer.
        drafts (`int`): The most drafts of a pass; 0 without drafts.
        keep (`str`): As of [`Drafts`].
        acceptance (`float`): This probability.
    """
    length, passes = first.end - drafts, {}
    # How probable it is that a pass begins with this many tokens known.
    begins = [1.0, *[0.0] * new_tokens]
    for known in range(new_tokens):
        if not begins[known]:
            continue
        span = next_span(length, new_tokens, known, drafts, keep) if known else first
        passes[span] = passes.get(span, 0.0) + begins[known]
        drafted = span.end - length - known
        for right in range(drafted + 1):
            rest = 1.0 if right == drafted else 1.0 - acceptance
            begins[known + right + 1] += begins[known] * acceptance**right * rest
    return passes


def write_next(span: Span | None) -> bytes:
    """What the client says after a pass."""
    return NEXT.pack(span.start, span.length) if span else NEXT.pack(0, 0)


def read_next(content: bytes, length: int, new_tokens: int, drafts: int, kept: int) -> Span | None:
    """
    The next pass, by the client's word.

    Args:
        content (`bytes`): What [`write_next`] wrote.
        length (`int`), new_tokens (`int`), drafts (`int`): What the request says.
        kept (`int`): Tokens whose keys and values there are.

    Raises:
        `PrivateInferenceError`: If it begins in the prompt or behind what is kept, is too long, or goes beyond the
            answer.
    """
    if len(content) != NEXT.size:
        raise PrivateInferenceError(f"the client's word about the next pass has {len(content)} bytes.")
    start, count = NEXT.unpack(content)
    if not count:
        return None
    if not length <= start <= kept or count > drafts + 1 or start + count >= length + new_tokens:
        raise PrivateInferenceError(
            f"the client wants {count} tokens verified from position {start} on: there are keys and values of {kept}, "
            f"and a pass may have {drafts + 1} tokens, up to position {length + new_tokens - 1}."
        )
    return Span(start, count, count)
