"""Networks between two parties, as users name them."""

import math
import re

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD


BANDWIDTH_UNITS = {"kbps": 1e3, "Mbps": 1e6, "Gbps": 1e9}
LATENCY_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(config=RECORD, frozen=True)
class Network:
    """
    What connects the parties.

    Args:
        name (`str`): Such as "LAN".
        bits_per_second (`float`): That both directions share.
        round_trip_seconds (`float`): There and back.
    """

    name: str
    bits_per_second: float
    round_trip_seconds: float

    def seconds(self, total_bytes: float, round_trips: float) -> float:
        """What bytes take, one direction after the other, and round trips."""
        return total_bytes * 8 / self.bits_per_second + round_trips * self.round_trip_seconds


LOOPBACK = Network("loopback", math.inf, 0.0)
LAN = Network("LAN", 1e9, 1e-3)
WAN = Network("WAN", 1e8, 80e-3)


def parse_network(text: str) -> Network:
    """
    The network that a user names: "LAN", "WAN", "loopback", or a bandwidth and a round trip such as "100Mbps,80ms".

    Raises:
        `ValueError`: If it is none of these, with what is allowed.
    """
    for network in (LOOPBACK, LAN, WAN):
        if text.strip().lower() == network.name.lower():
            return network
    bandwidth, _, latency = text.partition(",")
    bits, seconds = _quantity(bandwidth, BANDWIDTH_UNITS), _quantity(latency, LATENCY_UNITS)
    if not bits or seconds is None:
        raise ValueError(
            f"network {text!r} is not known: give LAN (1Gbps,1ms), WAN (100Mbps,80ms), loopback, or a bandwidth above "
            f"0 in {', '.join(BANDWIDTH_UNITS)} and a round trip in {', '.join(LATENCY_UNITS)}, such as 300Mbps,20ms."
        )
    return Network(text.strip(), bits, seconds)


def _quantity(text: str, units: dict[str, float]) -> float | None:
    """A number with a unit, or `None` if it is not."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([A-Za-z]+)\s*", text)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if match is None or match[2].lower() not in factors:
        return None
    return float(match[1]) * factors[match[2].lower()]
