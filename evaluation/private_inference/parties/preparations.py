"""
A party's half of a preparation: a seed, of which its parts of all masks are drawn, and its shares of the products.

Both parties draw a preparation's name. [`Store`] keeps halves until they are used.
"""

import base64
import errno
import hashlib
import json
import os
import re
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.json_records import RECORD
from entropy_gpt.evaluation.private_inference.program.cost import StepCost
from entropy_gpt.evaluation.private_inference.program.counting import RING
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig, is_factor
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import held_shapes

from .channel import NO_HALF
from .engine import engine_versions


# The version of a half's file, and of what its numbers mean.
FORMAT = 5
SEED_BYTES, NAME_BYTES, HASH_BYTES = 32, 16, 32
NAME = re.compile(f"[0-9a-f]{{{2 * NAME_BYTES}}}")
PART = ".part"
MOST_HEADER_BYTES = 2**24
# Products that a header has room for, with what each took.
MOST_PRODUCTS = MOST_HEADER_BYTES // 512


class LostHalfError(PrivateInferenceError):
    """Half of a preparation is not where it was, was used before, or can't be used."""

    def __init__(self, message: str):
        super().__init__(message, NO_HALF)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a preparation has no other half, or one that nobody can use."""
    return isinstance(error, PrivateInferenceError) and error.code == NO_HALF


@dataclass(config=RECORD, frozen=True)
class Header:
    """
    What a half is for.

    Args:
        name (`str`): The preparation's, which both parties drew.
        rank (`int`): Whose half it is.
        terms (`str`): A hash of program, settings and versions.
        weights (`str`): A hash of the server's weights; empty in a client's half.
        store (`str`): That of the other half, by [`name_store`]; empty in that one.
        length, new_tokens, answers (`int`): The most that it serves.
        shares (`list[tuple[str, str, list[int]]]`): For each product its variable, the engine's description of the
            share, and the bytes of each of its parts.
        costs (`list[StepCost]`): What the first phase took.
        owner (`str`): The client, as [`Channel.peer`]; empty in its own half.
        made (`float`): When, in seconds since 1970.
        format (`int`): Version of the file.
    """

    name: str
    rank: int
    terms: str
    weights: str
    store: str
    length: int
    new_tokens: int
    answers: int
    shares: list[tuple[str, str, list[int]]]
    costs: list[StepCost]
    owner: str
    made: float
    format: int = FORMAT

    def spans(self) -> list[Span]:
        """Those of the passes that it was made for."""
        return pass_spans(self.length, self.new_tokens, self.answers)

    def serves(self, length: int, new_tokens: int, answers: int) -> bool:
        """Whether it has what such a request needs."""
        return self.length >= length and self.new_tokens >= new_tokens and self.answers >= answers


def pass_spans(length: int, new_tokens: int, answers: int) -> list[Span]:
    """The prompt, then each new token except the last."""
    return [Span(0, length, answers), *(Span(length + index, 1) for index in range(new_tokens - 1))]


def hash_terms(config: ProgramConfig, settings: PrivateSettings) -> str:
    """Of all that decides about the programs of both phases."""
    terms = [asdict(ProgramConfig.of(config)), asdict(settings), engine_versions()]
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def hash_weights(weights: dict[str, np.ndarray], config: ProgramConfig, settings: PrivateSettings) -> str:
    """Of those that preparations contain: neither of what is added, nor of the check's bounds."""
    digest = hashlib.sha256()
    for name in filter(is_factor, held_shapes(config, settings, SERVER)):
        digest.update(np.ascontiguousarray(weights[name], np.float32).data.cast("B"))
    return digest.hexdigest()


def draw_mask(seed: bytes, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A party's part of a mask: integers of the ring that look random to all who lack the seed."""
    size = int(np.prod(shape)) * np.dtype(RING).itemsize
    return np.frombuffer(hashlib.shake_256(seed + name.encode()).digest(size), RING).reshape(shape)


def measure_half(config: ProgramConfig, settings: PrivateSettings, spans: list[Span]) -> tuple[int, int]:
    """
    About what a half takes on disk, and how many products it has. Both grow evenly from one further token to the next,
    so the first and the last of these are enough: a long answer is measured as soon as a short one.
    """
    further = spans[1:]
    parts = [(spans[:1], 1.0), *(([span], len(further) / 2) for span in (further[:1] + further[-1:]))]
    size = count = 0.0
    for some, times in parts:
        products = Preparation(config, settings, some).products
        size += times * sum(product.nbytes for product in products.values())
        count += times * len(products)
    return round(size), round(count)


def name_store(identity: str, weights: str) -> str:
    """By which a client knows where the other halves are: other weights in one folder have another name."""
    return hashlib.sha256(f"{identity} {weights}".encode()).hexdigest()


def is_name(text: object) -> bool:
    return isinstance(text, str) and NAME.fullmatch(text) is not None


def draw_name(parts: tuple[bytes, bytes]) -> str:
    """A preparation's name, of the random bytes of both parties."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[: 2 * NAME_BYTES]


def draw_bytes() -> bytes:
    return secrets.token_bytes(SEED_BYTES)


def describe_shares(shares: dict) -> list[tuple[str, str, list[int]]]:
    """As a [`Header`] has them."""
    return [
        (name, base64.b64encode(share.meta).decode(), [len(chunk) for chunk in share.share_chunks])
        for name, share in shares.items()
    ]


def write_half(file: BinaryIO, header: Header, seed: bytes, shares: dict):
    """
    Writes what [`read_half`] reads.

    Raises:
        `OSError`: If that is not possible.
    """
    digest = hashlib.sha256()
    chunks = (chunk for share in shares.values() for chunk in share.share_chunks)
    line = TypeAdapter(Header).dump_json(header) + b"\n"
    if len(line) > MOST_HEADER_BYTES:
        raise OSError(errno.EFBIG, "its header is too long")
    for content in (line, seed, *chunks):
        digest.update(content)
        file.write(content)
    file.write(digest.digest())


def read_half(path: Path) -> tuple[Header, bytes, dict]:
    """
    Reads a half that was taken, and deletes it.

    Returns:
        `tuple`: Its header, its seed, and its share of each product, by variable.

    Raises:
        `PrivateInferenceError`: If it is damaged, or of another version.
    """
    from spu import libspu

    try:
        with path.open("rb") as file:
            header = parse_header(file, path)
            file.seek(0)
            content = file.read()
    except OSError as error:
        raise PrivateInferenceError(f"a preparation can't be read: {error.strerror}.") from error
    finally:
        path.unlink(missing_ok=True)
    if hashlib.sha256(content[:-HASH_BYTES]).digest() != content[-HASH_BYTES:]:
        raise _damaged(path)
    begin = content.index(b"\n") + 1
    seed, begin, shares = content[begin : begin + SEED_BYTES], begin + SEED_BYTES, {}
    for name, meta, sizes in header.shares:
        share, chunks = libspu.Share(), []
        for size in sizes:
            chunks.append(content[begin : begin + size])
            begin += size
        share.meta, share.share_chunks = base64.b64decode(meta), chunks
        shares[name] = share
    return header, seed, shares


def read_header(path: Path) -> Header:
    """
    What a half is for.

    Raises:
        `PrivateInferenceError`: If it is damaged, or of another version.
    """
    with path.open("rb") as file:
        return parse_header(file, path)


def parse_header(file: BinaryIO, path: Path) -> Header:
    """As [`read_header`], of an open file."""
    line = file.readline(MOST_HEADER_BYTES)
    try:
        header = TypeAdapter(Header).validate_json(line)
    except ValidationError as error:
        raise _damaged(path) from error
    if header.format != FORMAT:
        raise LostHalfError(f"{path.name} is of another version of entropy-gpt: prepare another one.")
    size = len(line) + SEED_BYTES + sum(size for *_, sizes in header.shares for size in sizes) + HASH_BYTES
    if os.fstat(file.fileno()).st_size != size:
        raise _damaged(path)
    return header


def _damaged(path: Path) -> LostHalfError:
    return LostHalfError(f"{path.name} is damaged: prepare another one.")
