"""By which form, and where, softmax divides by the sums of its rows."""

import functools
import itertools
from collections.abc import Callable

from .counting import TRIPLES, CountingArithmetic, Stock, make_shape
from .forms import predict_seconds
from .reciprocals import MOST_BY_STEPS, reciprocal_by_chords, reciprocal_by_steps
from .settings import PrivateSettings
from .visible import visible_keys


class EndlessStock(Stock):
    """Triples at what they cost on average."""

    def take(self, numbers: int) -> float:
        return numbers / TRIPLES


@functools.lru_cache(maxsize=4096)
def choose_division(
    heads: int,
    queries: int,
    keys: int,
    size: int,
    network: str,
    places: tuple[bool, ...] = (False, True),
    reciprocals: tuple[Callable, ...] = (reciprocal_by_chords, reciprocal_by_steps),
) -> tuple[bool, Callable]:
    """
    What takes least time on a network, by the cost model.

    Args:
        heads, queries, keys, size (`int`): Numbers of heads, of rows, of keys, and of what a head has for each.
        network (`str`): As [`parse_network`] takes it.
        places (`tuple[bool]`): Whether to divide before the product with the values, or after it, or what is better.
        reciprocals (`tuple[Callable]`): The forms of the reciprocal, the first of which is for any sizes.

    Returns:
        `tuple[bool, Callable]`: Whether exponentials are divided, before their product with the values, and not this
        product: rows may see fewer keys than a head has numbers. Then the form of the reciprocal.
    """
    possible = reciprocals if 2 <= keys <= MOST_BY_STEPS else reciprocals[:1]

    def seconds(form: tuple[bool, Callable]) -> float:
        is_early, reciprocal = form
        ops = CountingArithmetic(PrivateSettings(network=network), EndlessStock())
        reciprocal(ops, make_shape((heads, queries, 1)), keys)
        numbers = (heads, int(visible_keys(queries, keys).sum()) if is_early else queries * size)
        ops.multiply(make_shape(numbers), make_shape(numbers))
        return predict_seconds(ops.counts, ops.waits, network)

    return min(itertools.product(places, possible), key=seconds)
