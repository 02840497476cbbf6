"""What a command gives its engine's process to do, and the arrays that go through pipes to it and back."""

import base64
from typing import BinaryIO

import numpy as np
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span

from .drafts import ACCEPTED, Keep
from .preparations import pass_spans
from .sampling import GREEDY, Sampling


# How often a pass whose numbers were out of range is computed.
REPEATS = 3
ALWAYS_OUT_OF_RANGE = f"numbers were out of range {REPEATS} times: see the audit of the model."


@dataclass(config=RECORD)
class Job:
    """
    What one party does on a connection.

    Args:
        rank (`int`): 0 the server, 1 the client.
        config ([`ProgramConfig`]): Configuration of the program, public.
        settings ([`PrivateSettings`]): Public.
        timeout_seconds (`int`): For which a silent peer is waited for.
        store (`str`, *optional*): Folder for this party's halves of preparations.
        peer_store (`str`): The server's store of the other halves; empty at the server.
        owner (`str`): The client that the server's halves are for; empty at the client.
    """

    rank: int
    config: ProgramConfig
    settings: PrivateSettings
    timeout_seconds: int
    store: str | None = None
    peer_store: str = ""
    owner: str = ""


@dataclass(config=RECORD)
class Request:
    """
    One answer.

    Args:
        length (`int`): Tokens of the prompt, public.
        new_tokens (`int`): Number of tokens in the answer, public.
        answers (`int`): Number of last positions whose logits are wanted; 1 where tokens are generated.
        most_positions (`int`, *optional*): Positions that may be answered, with those that are answered again.
        limit (`str`, *optional*): The server's option that says so.
        prompt (`list[int]`, *optional*): The client's alone.
        prepares (`bool`): Whether this is the first phase of a later answer, of which there is no prompt yet.
        preparation (`str`, *optional*): The file with this party's half of a preparation, taken out of its store.
        sampling ([`Sampling`]): The client's alone.
        drafts (`int`): The most drafts that a pass verifies, public; 0 without.
        keep (`str`): What is kept after a pass over drafts, as of [`Drafts`]; the client's alone.
        positions (`int`, *optional*): That passes over drafts may verify in all, by the server's word.
    """

    length: int
    new_tokens: int
    answers: int
    most_positions: int | None = None
    limit: str | None = None
    prompt: list[int] | None = None
    prepares: bool = False
    preparation: str | None = None
    sampling: Sampling = GREEDY
    drafts: int = 0
    keep: Keep = ACCEPTED
    positions: int | None = None

    def spans(self) -> list[Span]:
        """The spans of the passes; with drafts, of the first one, over the prompt and drafts behind it."""
        if self.drafts:
            return [Span(0, self.length + self.drafts, self.answers + self.drafts)]
        return pass_spans(self.length, self.new_tokens, self.answers)


def read_arrays(source: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """
    Arrays in single precision, as [`write_arrays`] writes them.

    Raises:
        `EOFError`: If there are fewer.
    """
    arrays = {}
    for name, shape in shapes.items():
        arrays[name] = np.empty(shape, np.float32)
        content, read = memoryview(arrays[name].reshape(-1)).cast("B"), 0
        while read < len(content):
            size = source.readinto(content[read:])
            if not size:
                raise EOFError("they end early")
            read += size
    return arrays


def write_arrays(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], sink: BinaryIO):
    """One after another, in the order of their shapes, which both sides of a pipe know; others are left out."""
    for name, shape in shapes.items():
        content = np.ascontiguousarray(arrays[name], np.float32)
        if content.shape != shape:
            raise ValueError(f"{name} is {content.shape}, and its program has {shape}")
        sink.write(memoryview(content.reshape(-1)).cast("B"))


def write_array(array: np.ndarray) -> dict:
    """An array in single precision as part of an event."""
    content = base64.b64encode(np.ascontiguousarray(array, np.float32).tobytes()).decode()
    return {"shape": list(array.shape), "content": content}


def read_array(written: dict) -> np.ndarray:
    """What [`write_array`] wrote."""
    return np.frombuffer(base64.b64decode(written["content"]), np.float32).reshape(written["shape"])
