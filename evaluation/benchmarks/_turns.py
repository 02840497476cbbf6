"""Timings side by side: variants take turns in one process, and each turn gives a ratio."""

import statistics
import time
from collections.abc import Callable
from operator import truediv

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD


@dataclass(config=RECORD)
class Timing:
    """
    One comparison.

    Args:
        kind (`str`): What ran.
        length (`int`): Tokens in a sequence.
        runs (`int`): Turns that each variant took.
        milliseconds (`dict[str, float]`): Median of each variant.
        ratios (`dict[str, list[float]]`): Quartiles of our time to that of each other variant.
    """

    kind: str
    length: int
    runs: int
    milliseconds: dict[str, float]
    ratios: dict[str, list[float]]

    def __str__(self) -> str:
        ratios = ", ".join(f"{format_ratio(quartiles)} of {name}" for name, quartiles in self.ratios.items())
        return f"{self.kind}, T={self.length}: {ratios}"


def take_turns(variants: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Seconds of each variant in each turn, after a turn to warm up. Another begins each turn: it may be at a loss."""
    seconds = {name: [] for name in variants}
    names = [*variants]
    for turn in range(runs + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            variants[name]()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(kind: str, length: int, variants: dict[str, Callable[[], None]], ours: str, runs: int) -> Timing:
    """Medians in milliseconds, and quartiles of the ratio of ours to each other variant."""
    seconds = take_turns(variants, runs)
    return Timing(
        kind=kind,
        length=length,
        runs=runs,
        milliseconds={name: statistics.median(values) * 1000 for name, values in seconds.items()},
        ratios={
            name: statistics.quantiles(map(truediv, seconds[ours], values), n=4)
            for name, values in seconds.items()
            if name != ours
        },
    )


def format_ratio(quartiles: list[float]) -> str:
    """The median, and the quartiles around it in brackets."""
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
