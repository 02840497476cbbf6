"""How commands end."""

from dataclasses import dataclass


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    output: str
    error: str

    @property
    def complaint(self) -> str:
        """The one line that a command fails with."""
        assert (self.status, self.error.count("\n")) == (1, 1), (self.status, self.error)
        assert self.error.startswith("entropy-gpt: ")
        return self.error.removeprefix("entropy-gpt: ").rstrip("\n")

    def succeeded(self):
        assert (self.status, self.error) == (0, ""), (self.status, self.error)
        return self
