"""How a client chooses tokens: from its logits, or by noise that it adds to secret ones. The server learns neither."""

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD


@dataclass(config=RECORD, frozen=True)
class Sampling:
    """
    How the next token is chosen.

    Args:
        temperature (`float`): What the logits are divided by; with 0, the most likely token is taken.
        top_k (`int`, *optional*): The number of most likely tokens among which one is drawn.
        top_p (`float`): The share of probability of the most likely of these among which one is drawn.
        seed (`int`, *optional*): Where the random numbers begin.
    """

    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=0)


GREEDY = Sampling()
# With which noise still fits the ring next to any logits.
MOST_TEMPERATURE = 1000.0


def choose(logits: np.ndarray, sampling: Sampling, noise: np.ndarray) -> int:
    """
    The next token. It is the maximum of the logits plus Gumbel noise of each token (Maddison et al. 2014,
    arXiv:1411.0030), which is a draw from the softmax. Errors of fixed point change it only if the two largest sums
    are that close; with draws from cumulated probabilities, each token's error would move all tokens after it.

    Args:
        logits (`np.ndarray`): `(vocabulary,)`.
        sampling ([`Sampling`]): How.
        noise (`np.ndarray`): `(vocabulary,)`, of [`draw_noise`].
    """
    if not sampling.temperature:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]
    sums = np.exp(scaled[order]).cumsum()
    # The most likely token, and those after it as long as the ones before them do not have the share.
    kept = order[: int(np.searchsorted(sums, sampling.top_p * sums[-1], side="left")) + 1]
    return int(kept[(logits + noise)[kept].argmax()])


def draw_noise(shape: tuple[int, ...], sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """
    What makes the largest of logits and noise a token that is drawn: Gumbel noise times the temperature.

    Args:
        shape (`tuple[int]`): The logits'.
        sampling ([`Sampling`]): How; with temperature 0, the noise is 0.
        generator (`np.random.Generator`): Draws a number for each logit.
    """
    return (sampling.temperature * generator.gumbel(size=shape)).astype(np.float32)


class Noise:
    """
    The noise of each token of an answer, however often it is asked for: a seed means the same tokens, whether they are
    computed once or again, one after the other or several at once.

    Args:
        sampling ([`Sampling`]): How tokens are drawn.
        vocab_size (`int`): Numbers of a token's noise.
    """

    def __init__(self, sampling: Sampling, vocab_size: int):
        self._sampling, self._vocab_size = sampling, vocab_size
        self._generator = np.random.default_rng(sampling.seed)
        self._rows: dict[int, np.ndarray] = {}
        self._drawn = 0

    def rows(self, first: int, count: int) -> np.ndarray:
        """`(count, vocabulary)`, from a token on; what is before is forgotten."""
        while self._drawn < first + count:
            self._rows[self._drawn] = draw_noise((self._vocab_size,), self._sampling, self._generator)
            self._drawn += 1
        self._rows = {token: row for token, row in self._rows.items() if token >= first}
        return np.array([self._rows[token] for token in range(first, first + count)])
