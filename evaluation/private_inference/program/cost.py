"""What a private inference costs: bytes, round trips and seconds by operation, and what other networks make of it."""

from collections.abc import Callable, Iterable
from dataclasses import field, replace
from typing import Any, Self

from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD, StoredRecord

from .networks import Network
from .settings import PARTIES, PrivateSettings


MEGA = 1e6
# What is added to the network of measurements of other forms than today's.
BEFORE_FORMS = ", before forms were chosen for one"
AROUND_BLOCKS = "around the blocks"
# In two lines where one is too long, so that all of them fit into 80 columns.
TABLE_COLUMNS = ("MB, all\nparties", "share", "MB\nsent", "MB\nreceived", "messages", "round\ntrips", "seconds")


@dataclass(config=RECORD)
class StepCost:
    """
    Of one operation of one layer, by the count of one party.

    Args:
        operation (`str`): Such as "exponential".
        layer (`int`, *optional*): `None` around the blocks.
        sent_bytes, received_bytes (`int`): By this party.
        sent_messages, received_messages (`int`): By this party.
        round_trips (`float`):
            How often a message has to travel there and back before the next one can leave. Under Cheetah by the
            operations, each of which waits for its own, however many messages carry its tensors at once
            (`counting.py`), as if there was a full stock of triples before each token; elsewhere half of one for a
            message each way, since these cross. 0 of a set-up, where they are not known.
        seconds (`float`): From its beginning to its end.
    """

    operation: str
    layer: int | None
    sent_bytes: int
    received_bytes: int
    sent_messages: int
    received_messages: int
    round_trips: float
    seconds: float

    @property
    def total_bytes(self) -> int:
        """All traffic between two parties."""
        return self.sent_bytes + self.received_bytes


@dataclass(config=RECORD)
class InferenceCost(StoredRecord):
    """
    What one private inference cost, step by step, and under which conditions.

    Args:
        notation (`str`): The architecture, in the paper's notation.
        n_layer, n_embd, n_head, vocab_size (`int`): Its sizes.
        context (`int`): Tokens that went in.
        answers (`int`): Number of last tokens whose logits were computed.
        settings ([`PrivateSettings`]): The protocol and the form of each operation.
        network (`str`): Such as "loopback, two processes" or "threads of one process".
        set_up (`list[StepCost]`):
            What the first use of a connection takes (keys, extension of oblivious transfers; with "client_table", the
            tables that the server sends): paid once a connection, and in no other number here.
        steps (`list[StepCost]`): Steps of the inference itself, in order.
        seconds (`float`): By the clock, from the first step's beginning to the last one's end.
        before (`list[StepCost]`): Steps that were done before the prompt came, in no other number here.
        versions (`dict[str, str]`): Versions of the packages that compute.
        git_revision (`str`, *optional*): Commit of this project.
        machine (`str`): Processor and number of threads.
    """

    KIND = "the cost of a private inference"
    SCHEMA_VERSION = 4

    notation: str
    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    context: int
    answers: int
    settings: PrivateSettings
    network: str
    set_up: list[StepCost]
    steps: list[StepCost]
    seconds: float
    versions: dict[str, str]
    git_revision: str | None
    machine: str
    before: list[StepCost] = field(default_factory=list)

    @classmethod
    def migrate(cls, content: dict, version: int) -> dict | None:
        """Version 2 had no `before`. Before version 4, `settings` may have no `network`, which chooses forms."""
        if version not in (2, 3):
            return None
        if "network" in content["settings"]:
            return content
        return content | {"network": f"{content['network']}{BEFORE_FORMS}"}

    @property
    def has_older_forms(self) -> bool:
        """Whether operations had other forms than today's."""
        return self.network.endswith(BEFORE_FORMS)

    def first_phase(self) -> Self:
        """What was done before the prompt came."""
        return replace(self, steps=self.before, before=[], seconds=sum(step.seconds for step in self.before))

    @property
    def total_bytes(self) -> int:
        """
        Sent by all parties together, without the set-up. Of three parties only one was counted: the others are taken
        to have sent and received as much.
        """
        return self.all_parties(sum(step.total_bytes for step in self.steps))

    @property
    def set_up_bytes(self) -> int:
        """Bytes of the set-up, sent by all parties together."""
        return self.all_parties(sum(step.total_bytes for step in self.set_up))

    @property
    def round_trips(self) -> float:
        """Those of all steps, as of [`StepCost`]."""
        return sum(step.round_trips for step in self.steps)

    def all_parties(self, counted: int) -> int:
        """Bytes sent by all parties, from those sent and received by one."""
        return round(counted * PARTIES[self.settings.protocol] / 2)


def mark_older_forms(content: Any) -> Any:
    """The content of a record, from JSON, of which each cost is brought up to date by [`InferenceCost.migrate`]."""
    if isinstance(content, list):
        return [mark_older_forms(value) for value in content]
    if not isinstance(content, dict):
        return content
    if content.keys() >= {"settings", "network", "steps"}:
        return InferenceCost.migrate(content, InferenceCost.SCHEMA_VERSION - 1)
    return {name: mark_older_forms(value) for name, value in content.items()}


@dataclass(config=RECORD, frozen=True)
class CostSum:
    """
    Steps together, by the count of one party.

    Args:
        name (`str`): What they have in common: an operation, or a layer.
        sent_bytes, received_bytes (`int`): By this party.
        total_bytes (`int`): Sent by all parties.
        messages (`int`): Sent or received by this party.
        round_trips, seconds (`float`): One after the other.
    """

    name: str
    sent_bytes: int
    received_bytes: int
    total_bytes: int
    messages: int
    round_trips: float
    seconds: float


def by_operation(cost: InferenceCost) -> list[CostSum]:
    """The steps of each operation, in the order of the program."""
    return _sums(cost, cost.steps, lambda step: step.operation)


def by_layer(cost: InferenceCost) -> list[CostSum]:
    """The steps of each layer, and those around the blocks."""
    return _sums(cost, cost.steps, lambda step: AROUND_BLOCKS if step.layer is None else f"layer {step.layer}")


def before_by_operation(cost: InferenceCost) -> list[CostSum]:
    """What was done before the prompt came, by operation."""
    return _sums(cost, cost.before, lambda step: step.operation)


def set_up_by_operation(cost: InferenceCost) -> list[CostSum]:
    """What was paid once, by the operation that needed it first."""
    return _sums(cost, cost.set_up, lambda step: step.operation)


def _sums(cost: InferenceCost, steps: Iterable[StepCost], name: Callable[[StepCost], str]) -> list[CostSum]:
    groups: dict[str, list[StepCost]] = {}
    for step in steps:
        groups.setdefault(name(step), []).append(step)
    return [_sum(cost, title, group) for title, group in groups.items()]


def _sum(cost: InferenceCost, name: str, steps: list[StepCost]) -> CostSum:
    return CostSum(
        name=name,
        sent_bytes=sum(step.sent_bytes for step in steps),
        received_bytes=sum(step.received_bytes for step in steps),
        total_bytes=cost.all_parties(sum(step.total_bytes for step in steps)),
        messages=sum(step.sent_messages + step.received_messages for step in steps),
        round_trips=sum(step.round_trips for step in steps),
        seconds=sum(step.seconds for step in steps),
    )


def table_rows(sums: list[CostSum], total_name: str = "total") -> list[tuple[str, ...]]:
    """
    Sums in words, one row each and one for all of them.

    Args:
        sums (`list[CostSum]`): Such as those of [`by_operation`].
        total_name (`str`): Name of the last row.

    Returns:
        `list[tuple[str, ...]]`: Rows of a name and of `TABLE_COLUMNS`. Sent, received and messages are those of the
        party that counted.
    """
    total = CostSum(
        name=total_name,
        sent_bytes=sum(part.sent_bytes for part in sums),
        received_bytes=sum(part.received_bytes for part in sums),
        total_bytes=sum(part.total_bytes for part in sums),
        messages=sum(part.messages for part in sums),
        round_trips=sum(part.round_trips for part in sums),
        seconds=sum(part.seconds for part in sums),
    )
    return [_row(part, total.total_bytes) for part in (*sums, total)]


def _row(part: CostSum, total_bytes: int) -> tuple[str, ...]:
    return (
        part.name,
        f"{part.total_bytes / MEGA:,.2f}",
        f"{part.total_bytes / total_bytes:.1%}" if total_bytes else "-",
        f"{part.sent_bytes / MEGA:,.2f}",
        f"{part.received_bytes / MEGA:,.2f}",
        f"{part.messages:,}",
        f"{part.round_trips:,.1f}" if part.round_trips else "-",
        f"{part.seconds:,.2f}",
    )


def project(cost: InferenceCost, network: Network) -> float:
    """
    Seconds that the inference would take on a network: as many as on the loopback, those that its bytes take, one
    direction after the other, and those of its [`InferenceCost.round_trips`].

    An estimate: inferences over links with a rate and a delay come near to it, and are rather faster, since both
    directions carry bytes at once, and some is computed meanwhile.
    """
    return cost.seconds + network.seconds(cost.total_bytes, cost.round_trips)
