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


def choose(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """
    The next token. It is the maximum of the logits plus Gumbel noise of each token (Maddison et al. 2014,
    arXiv:1411.0030), which is a draw from the softmax. Errors of fixed point change it only if the two largest sums
    are that close; with draws from cumulated probabilities, each token's error would move all tokens after it.

    Args:
        logits (`np.ndarray`): `(vocabulary,)`.
        sampling ([`Sampling`]): How.
        generator (`np.random.Generator`): Draws one number for each token.
    """
    if not sampling.temperature:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k]
    sums = np.exp(scaled[order]).cumsum()
    # The most likely token, and those after it as long as the ones before them do not have the share.
    kept = order[: int(np.searchsorted(sums, sampling.top_p * sums[-1], side="left")) + 1]
    return int(kept[(logits + draw_noise(logits.shape, sampling, generator))[kept].argmax()])


def draw_noise(shape: tuple[int, ...], sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """
    What makes the largest of logits and noise a token that is drawn: Gumbel noise times the temperature.

    Args:
        shape (`tuple[int]`): The logits'.
        sampling ([`Sampling`]): How; with temperature 0, the noise is 0.
        generator (`np.random.Generator`): Draws a number for each logit.
    """
    return (sampling.temperature * generator.gumbel(size=shape)).astype(np.float32)
