"""The text of an answer while its tokens come, cut off before what it has to stop at, with probabilities of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast


# What stands for bytes that are no text yet.
INCOMPLETE = "\ufffd"


@dataclass(frozen=True)
class TokenProbability:
    """
    A token with how likely it was.

    Args:
        token (`str`): As text, or as the vocabulary writes it if it is a part of a letter.
        logprob (`float`, *optional*): Natural logarithm of its probability; `None` for the first of a prompt.
        top (`dict[str, float]`, *optional*): Those of the most likely tokens, and of this one.
        offset (`int`): Where it begins in the text of the answer, in letters; where the letter begins for a part of
            one.
    """

    token: str
    logprob: float | None
    top: dict[str, float] | None
    offset: int


@dataclass
class Piece:
    """
    What is new of an answer.

    Args:
        text (`str`): New text.
        probabilities (`list[TokenProbability]`): Those of new tokens, if they were asked for.
    """

    text: str = ""
    probabilities: list[TokenProbability] = field(default_factory=list)


class AnswerText:
    """
    Text of one answer.

    Args:
        words (`PreTrainedTokenizerFast`): Makes text of tokens.
        stops (`Sequence[str]`): Texts before which the answer ends.
        logprobs (`int`, *optional*): How many tokens are shown with their probabilities at each place; none if not
            given.

    Attributes:
        ended (`bool`): Whether the end was found; what comes after it is ignored.
        tokens (`list[int]`): Those of the answer up to there.
    """

    def __init__(self, words: PreTrainedTokenizerFast, stops: Sequence[str] = (), logprobs: int | None = None):
        self.ended = False
        self.tokens: list[int] = []
        self._words, self._stops, self._logprobs = words, stops, logprobs
        self._before = self._shown = 0  # letters of the prompt, and of the answer
        self._text = ""
        self._held: list[TokenProbability] = []

    def echo(self, prompt: list[int], logits: np.ndarray | None) -> Piece:
        """
        The prompt as a part of the answer.

        Args:
            prompt (`list[int]`): Its tokens.
            logits (`np.ndarray`, *optional*): `(length, vocabulary)`, of the token after each.
        """
        text, found = self._decode(prompt), []
        if self._logprobs is not None:
            found = [TokenProbability(self._name(prompt[0]), None, None, 0)]
            for place, token in enumerate(prompt[1:]):
                found.append(self._weigh(token, logits[place], len(_whole(self._decode(prompt[: place + 1])))))
        self._before = len(text)
        return Piece(text, found)

    def add(self, token: int, logits: np.ndarray | None) -> Piece:
        """
        Args:
            token (`int`): The next one.
            logits (`np.ndarray`, *optional*): `(vocabulary,)`, from which it was chosen.
        """
        if self.ended:
            return Piece()
        if self._logprobs is not None:
            self._held.append(self._weigh(token, logits, self._before + len(_whole(self._text))))
        self.tokens.append(token)
        if token == self._words.eos_token_id:  # a token of the answer, without text
            self.ended = True
            return self.finish()
        self._text = self._decode(self.tokens)
        found = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if found:
            self.ended, self._text = True, self._text[: min(found)]
            self._held = [each for each in self._held if each.offset < self._before + len(self._text)]
            return self.finish()
        return self._show(len(self._text) - self._unsure())

    def finish(self) -> Piece:
        """What was held back, since more might have come."""
        piece = self._show(len(self._text))
        piece.probabilities += self._held
        self._held = []
        return piece

    def _unsure(self) -> int:
        """Letters at the end that may become another letter, or the beginning of a stop."""
        whole = _whole(self._text)
        begun = (length for stop in self._stops for length in range(1, len(stop)) if whole.endswith(stop[:length]))
        return len(self._text) - len(whole) + max(begun, default=0)

    def _show(self, end: int) -> Piece:
        end = max(end, self._shown)
        text, self._shown = self._text[self._shown : end], end
        ready = [each for each in self._held if each.offset < self._before + end]
        self._held = self._held[len(ready) :]
        return Piece(text, ready)

    def _decode(self, tokens: list[int]) -> str:
        return self._words.decode(tokens, clean_up_tokenization_spaces=False)

    def _name(self, token: int) -> str:
        text = self._decode([token])
        return self._words.convert_ids_to_tokens(token) if INCOMPLETE in text else text

    def _weigh(self, token: int, logits: np.ndarray, offset: int) -> TokenProbability:
        shifted = logits.astype(np.float64) - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        best = np.argsort(-logprobs, kind="stable")[: self._logprobs]
        top = {self._name(each): float(logprobs[each]) for each in map(int, (*best, token))}
        return TokenProbability(self._name(token), float(logprobs[token]), top, offset)


def _whole(text: str) -> str:
    """A text without the part of a letter at its end."""
    return text.rstrip(INCOMPLETE)
