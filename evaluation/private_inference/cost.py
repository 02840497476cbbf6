"""What a private inference costs: bytes, messages and seconds of each operation, and what other networks make of it."""

from pydantic.dataclasses import dataclass

from evaluation.records import RECORD


@dataclass(config=RECORD)
class StepCost:
    """
    Of one operation of one layer, by the count of one party.

    Args:
        operation (`str`): Such as "exponential".
        layer (`int`, *optional*): `None` around the blocks.
        sent_bytes, received_bytes (`int`): By this party.
        sent_messages, received_messages (`int`): By this party.
        seconds (`float`): From its beginning to its end.
    """

    operation: str
    layer: int | None
    sent_bytes: int
    received_bytes: int
    sent_messages: int
    received_messages: int
    seconds: float

    @property
    def total_bytes(self) -> int:
        """All traffic between two parties."""
        return self.sent_bytes + self.received_bytes
