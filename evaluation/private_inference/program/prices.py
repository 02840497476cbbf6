"""What each counted part of a step sends under Cheetah, as it was measured (`prices.json`)."""

import functools
from pathlib import Path

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, StoredRecord

from .ciphertexts import ANSWERS, COEFFICIENTS, INPUTS, LONE_ANSWERS, PACKINGS, POLYNOMIALS, Counts
from .settings import PrivateSettings


PRICES = Path(__file__).parent / "prices.json"
# Seconds of a core for products of matrices, by which forms are chosen: rough, of the blocks of docs/private_costs.md.
WORK_SECONDS = {INPUTS: 5e-3, ANSWERS: 5e-3, LONE_ANSWERS: 1e-2, POLYNOMIALS: 1.7e-4, PACKINGS: 3.6e-3}
# The same for each byte of what compares and multiplies numbers.
WORK_A_BYTE = 5e-8
# What is sent for products of matrices.
OF_PRODUCTS = (INPUTS, ANSWERS, LONE_ANSWERS, COEFFICIENTS)


@dataclass(config=RECORD)
class Sample:
    """
    A measured step of the fit.

    Args:
        name (`str`): The operation and its shapes.
        counts (`dict[str, float]`): What it consists of.
        measured_bytes (`int`): Sent by both parties.
        fitted_bytes (`float`): By the prices.
    """

    name: str
    counts: dict[str, float]
    measured_bytes: int
    fitted_bytes: float = 0.0


@dataclass(config=RECORD)
class Prices(StoredRecord):
    """
    What Cheetah sends, by what it is counted in.

    Args:
        bytes (`dict[str, float]`): Bytes of each part, sent by both parties.
        samples (`list[Sample]`): What the prices were fitted on.
        settings ([`PrivateSettings`]): Settings of these runs; prices hold for other forms of the operations too.
        versions (`dict[str, str]`): Versions of the packages that computed.
        git_revision (`str`, *optional*): Commit of this project.
        machine (`str`): Processor and number of threads.
    """

    KIND = "prices of the secure engine"
    SCHEMA_VERSION = 1

    bytes: dict[str, float]
    samples: list[Sample]
    settings: PrivateSettings
    versions: dict[str, str]
    git_revision: str | None
    machine: str


@functools.lru_cache(maxsize=1)
def load_prices() -> Prices:
    """The prices that come with this package."""
    return Prices.load(PRICES)


def price_of(counts: Counts, prices: dict[str, float]) -> float:
    return sum(prices[part] * count for part, count in counts.items())


def work_of(counts: Counts) -> float:
    """Seconds of a party for its side of products of matrices."""
    return sum(seconds * counts.get(part, 0) for part, seconds in WORK_SECONDS.items())


def seconds_of(parts: Counts, work: Counts, prices: dict[str, float]) -> float:
    """
    About how long two parties compute, each with a core of its own, without what a network takes.

    Args:
        parts (`Counts`): What is sent.
        work (`Counts`): What a party computes for products of matrices.
        prices (`dict[str, float]`): Bytes of each part.
    """
    numbers = {part: count for part, count in parts.items() if part not in OF_PRODUCTS}
    return work_of(work) + WORK_A_BYTE * price_of(numbers, prices)
