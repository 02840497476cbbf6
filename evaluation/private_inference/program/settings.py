"""How a private inference is computed: the protocol with what it trusts, and the form of each operation."""

from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD

from .networks import WAN, parse_network


Protocol = Literal["cheetah", "semi2k", "aby3", "ref2k"]
# Ranks of the two parties.
SERVER, CLIENT = 0, 1
PARTIES = {"cheetah": 2, "semi2k": 2, "aby3": 3, "ref2k": 1}
TRUST = {
    "cheetah": "two parties that follow the protocol and may look at all they receive (semi-honest); no third one",
    "semi2k": (
        "two semi-honest parties, of which the first also deals the random numbers that protect the second: "
        "for measuring alone, the server could read the prompt"
    ),
    "aby3": "three semi-honest parties of which no two work together",
    "ref2k": "no protection at all: one process computes with the same numbers as the protocols do",
}
# The ring of 64 bits that all protocols compute in.
RING_BITS = 64


def _check_network(text: str) -> str:
    parse_network(text)
    return text


@dataclass(config=RECORD, frozen=True)
class PrivateSettings:
    """
    What both parties have to agree on besides the architecture. The defaults are the cheapest whose answers agree.

    Args:
        protocol (`str`):
            "cheetah" (two parties, oblivious transfer and homomorphic encryption), "semi2k" (two parties, the first of
            which deals the correlated randomness), "aby3" (three parties), or "ref2k" (no protection, the same
            arithmetic in one process).
        fraction_bits (`int`): Bits of a number behind the point, of 64.
        softmax (`str`):
            "efficient" (the visible half of the scores alone, a polynomial for the exponential, one reciprocal a row
            after the product with the values), "stock" (as `jax.nn.softmax` of masked scores: a division of every
            number) or "tuned" (the same with one reciprocal a row, as careful users of the engine write it).
        gelu (`str`):
            "piecewise" (ReLU less an even polynomial, a finer one in models without LayerNorm), "tanh" or "erf".
        exponential_squarings (`int`):
            Of the other softmaxes: n of exp(x) = (1 + x / 2^n)^(2^n), of use for x from a little above -2^(n + 1)
            to 0.
        reciprocal_iterations (`int`): Iterations of Goldschmidt's method.
        embedding (`str`):
            "one_hot" (a product of the client's one-hot rows with the server's table: neither learns anything),
            "client_table" (the server gives the client its tables of token and position embeddings) or "public" (the
            tables are those of a public checkpoint, of which the client has a copy).
        answer (`str`):
            What the client alone learns: "logits" of the last position; "token", the most likely one; or "sampled",
            the most likely one after the client has added noise of its own to the logits.
        network (`str`):
            What "efficient" forms are chosen for, as [`parse_network`] takes it. The cost model chooses them by
            shapes, so both parties come to the same ones.
    """

    protocol: Protocol = "cheetah"
    fraction_bits: int = 18
    softmax: Literal["efficient", "stock", "tuned"] = "efficient"
    gelu: Literal["piecewise", "tanh", "erf"] = "piecewise"
    exponential_squarings: int = 8
    reciprocal_iterations: int = 2
    embedding: Literal["one_hot", "client_table", "public"] = "one_hot"
    answer: Literal["logits", "token", "sampled"] = "logits"
    network: Annotated[str, AfterValidator(_check_network)] = WAN.name

    @property
    def embeds_at_home(self) -> bool:
        """Whether the client looks embeddings up in tables of its own, instead of sharing tokens."""
        return self.embedding != "one_hot"

    @property
    def needs_encryption(self) -> bool:
        """
        Whether what is sent shows something to somebody between: the client's tables, or the seeds of the random
        numbers that the server deals.
        """
        return self.embedding == "client_table" or self.protocol != "cheetah"
