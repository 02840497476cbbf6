"""What the gateway counts, as Prometheus reads it. No number depends on a text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from .completions import Completion
from .costs import SET_UP
from .line import Line


class Metrics:
    """
    Args:
        line ([`Line`]): Whose length is shown.
    """

    def __init__(self, line: Line):
        self.registry = CollectorRegistry()

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"entropy_gpt_gateway_{name}", says, labels, registry=self.registry)

        self._requests = counter("requests", "Requests for completions, by the status of their answer.", "status")
        self._prompts = counter("prompt_tokens", "Tokens of prompts that were sent as secrets.")
        self._tokens = counter("new_tokens", "Tokens that were computed.")
        self._bytes = counter("bytes", "Bytes sent to and received from the private server, by phase.", "phase")
        self._trips = counter("round_trips", "Round trips that were waited for.")
        self._seconds = counter("seconds", "Seconds in the secure engine, by phase.", "phase")
        self._connections = counter("connections", "Connections whose set-up was paid.")
        self._repeats = counter("out_of_range", "Answers that were out of range and computed again.")
        waiting = Gauge("entropy_gpt_gateway_waiting", "Requests that wait.", registry=self.registry)
        waiting.set_function(lambda: line.length)

    def note(self, status: int, completion: Completion | None = None):
        """Counts a request that has ended, with what it cost."""
        self._requests.labels(str(status)).inc()
        if completion is None:
            return
        meter = completion.meter
        self._prompts.inc(sum(meter.seen.prompt_tokens))
        self._tokens.inc(meter.new_tokens)
        self._repeats.inc(meter.seen.out_of_range)
        self._trips.inc(meter.total.round_trips)
        self._connections.inc(SET_UP in meter.phases)
        for phase, spent in meter.phases.items():
            label = phase.partition(" ")[0]
            self._bytes.labels(label).inc(spent.bytes)
            self._seconds.labels(label).inc(spent.seconds)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
