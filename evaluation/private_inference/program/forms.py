"""What forms of an operation take on a network, by the cost model."""

import math

from .ciphertexts import Counts
from .counting import ROUND_TRIPS
from .networks import parse_network
from .prices import WORK_A_BYTE, load_prices, price_of


def predict_seconds(parts: Counts, waits: Counts, network: str) -> float:
    """What an operation on numbers takes, which computes in proportion to what it sends."""
    sent = price_of(parts, load_prices().bytes)
    trips = math.fsum(ROUND_TRIPS[part] * count for part, count in waits.items())
    return parse_network(network).seconds(sent, trips) + WORK_A_BYTE * sent
