"""What a request costs, phase by phase, while it is answered."""

from dataclasses import asdict, dataclass, field


SET_UP, PROMPT = "set-up", "prompt"


@dataclass
class Spent:
    """
    Args:
        bytes (`int`): Sent and received.
        round_trips (`float`): That were waited for.
        seconds (`float`): In the engine.
    """

    bytes: int = 0
    round_trips: float = 0.0
    seconds: float = 0.0

    def add(self, cost: dict):
        """The cost of a step, as an event has it."""
        self.bytes += cost["sent_bytes"] + cost["received_bytes"]
        self.round_trips += cost["round_trips"]
        self.seconds += cost["seconds"]


@dataclass
class Seen:
    """
    All that the server learned of a request.

    Args:
        prompt_tokens (`list[int]`): The length of each prompt that was sent.
        new_tokens (`list[int]`): How many tokens each answer has.
        positions (`list[int]`): At how many positions of each prompt logits were computed.
        out_of_range (`int`): Answers that were computed again.
    """

    prompt_tokens: list[int] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    out_of_range: int = 0


class Meter:
    """
    Adds up the events of one request, over all its answers.

    Attributes:
        phases (`dict[str, Spent]`), total ([`Spent`]): What it has cost so far.
        seen ([`Seen`]): What the server has learned so far.
        new_tokens (`int`): Tokens that have been computed.
    """

    def __init__(self):
        self.phases: dict[str, Spent] = {}
        self.total = Spent()
        self.seen = Seen()
        self.new_tokens = 0
        self._asked: tuple[int, int, int] | None = None
        self._phase, self._tokens = SET_UP, 0

    def begin(self, length: int, new_tokens: int, positions: int):
        """A prompt is about to be sent; the server has seen it when the first pass begins."""
        self._asked = (length, new_tokens, positions)
        self._phase, self._tokens = SET_UP, 0

    def note(self, event: dict) -> dict | None:
        """
        Args:
            event (`dict`): One of [`Client.ask`].

        Returns:
            `dict`, *optional*: What the page shows of it.
        """
        kind = event["event"]
        if kind == "pass":
            self._note_seen()
            self._phase = f"token {self._tokens + 1}" if self._tokens else PROMPT
            return {"phase": self._phase, "steps": len(event["bytes"]), "expected_bytes": sum(event["bytes"])}
        if kind == "token":
            self._tokens += 1
            self.new_tokens += 1
        elif kind == "repeat":
            self.seen.out_of_range += 1
        elif kind in ("set-up", "step"):
            return self._add(event["cost"])
        return None

    def _note_seen(self):
        if self._asked is not None:
            kept = (self.seen.prompt_tokens, self.seen.new_tokens, self.seen.positions)
            for numbers, number in zip(kept, self._asked, strict=True):
                numbers.append(number)
            self._asked = None

    def _add(self, cost: dict) -> dict:
        spent = self.phases.setdefault(self._phase, Spent())
        spent.add(cost)
        self.total.add(cost)
        where = {"operation": cost["operation"], "layer": cost["layer"]}
        return {"phase": self._phase, **where, "this_phase": asdict(spent), "total": asdict(self.total)}

    def report(self) -> dict:
        """The costs and what the server saw, as a part of an answer."""
        phases = [{"phase": phase, **asdict(spent)} for phase, spent in self.phases.items()]
        return {"phases": phases, "total": asdict(self.total), "server_saw": asdict(self.seen)}
