"""Shares as the engine takes and gives them: placeholders for what others own, and the peer's share of an answer."""

import math
from collections.abc import Iterator

import numpy as np

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.program.settings import RING_BITS


RING_BYTES = RING_BITS // 8
# Fields of the engine's messages (protobuf): of a chunk its tensor's bytes, its offset and its content; of the
# description of a share its shape, a message of one packed field.
TOTAL, OFFSET, CONTENT = b"\x08", b"\x10", b"\x1a"
SHAPE, DIMENSIONS = b"\x22", b"\x0a"


def make_placeholder(io, shape: tuple[int, ...], owner: int, rank: int, chunk_bytes: int, dtype: type = np.float32):
    """
    A share of zeros of another party's variable. Encoding zeros takes the engine 60 ns a number, so they are written
    as it would write them.

    Args:
        io: The engine's encoder, which describes the share.
        shape (`tuple[int]`): The variable's shape, public.
        owner (`int`): Rank of its owner.
        rank (`int`): Rank of this party.
        chunk_bytes (`int`): The most bytes of a chunk.
        dtype (`type`): The variable's.
    """
    share = _make_zeros(io, (1,) * len(shape), owner, dtype)[rank]
    ones = _shape_field((1,) * len(shape))
    if share.meta.count(ones) != 1:
        raise EngineError("the engine describes shares in another way: its version is not known here.")
    share.meta = share.meta.replace(ones, _shape_field(shape))
    share.share_chunks = list(_zero_chunks(RING_BYTES * math.prod(shape), chunk_bytes))
    return share


def join_share(share) -> bytes:
    """A party's share as it is sent to the one that may reconstruct the answer."""
    return b"".join(share.share_chunks)


def read_content(share) -> np.ndarray:
    """The integers of the ring that a share consists of; zeros, where the variable is another party's."""
    return np.frombuffer(b"".join(chunk[_header_bytes(chunk) :] for chunk in share.share_chunks), np.int64)


def read_share(received: bytes, own):
    """
    The peer's share of a variable. It has to have the size and the headers of this party's own: the peer's word
    decides about no size.

    Raises:
        `PrivateInferenceError`: If it has not.
    """
    if len(received) != sum(map(len, own.share_chunks)):
        raise PrivateInferenceError(
            f"the peer's share of the answer has {len(received):,} bytes, and its shape "
            f"{sum(map(len, own.share_chunks)):,}."
        )
    theirs, begin = type(own)(), 0
    theirs.meta, chunks = own.meta, []
    for chunk in own.share_chunks:
        header = _header_bytes(chunk)
        chunks.append(chunk[:header] + received[begin + header : begin + len(chunk)])
        begin += len(chunk)
    theirs.share_chunks = chunks
    return theirs


def _make_zeros(io, shape: tuple[int, ...], owner: int, dtype: type) -> list:
    from spu import libspu

    return io.make_shares(np.zeros(shape, dtype), libspu.Visibility.VIS_SECRET, owner)


def _zero_chunks(size: int, chunk_bytes: int) -> Iterator[bytes]:
    for offset in range(0, size, chunk_bytes):
        length = min(chunk_bytes, size - offset)
        place = OFFSET + _varint(offset) if offset else b""
        header = TOTAL + _varint(size) + place + CONTENT + _varint(length)
        yield header + bytes(length)


def _shape_field(shape: tuple[int, ...]) -> bytes:
    sizes = b"".join(map(_varint, shape))
    packed = DIMENSIONS + _varint(len(sizes)) + sizes
    return SHAPE + _varint(len(packed)) + packed


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the highest bit set."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


def _header_bytes(chunk: bytes) -> int:
    """Bytes before the content of a chunk that this party's engine made."""
    place = 0
    while True:
        is_content = chunk[place : place + 1] == CONTENT
        place += 1
        while chunk[place] & 0x80:
            place += 1
        place += 1
        if is_content:
            return place
