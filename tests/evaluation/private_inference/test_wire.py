"""What goes over the wire, and what a party holds: neither prompt nor weights."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from entropy_gpt.evaluation.private_inference.parties.participant import Participant
from entropy_gpt.evaluation.private_inference.program.program import TOKENS
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER
from entropy_gpt.evaluation.private_inference.program.variables import encode_tokens

from .serving import PROMPT, ask_at, make_offer


pytest.importorskip("spu")
pytestmark = pytest.mark.private
SCALE = 2**18


class Recorder:
    """What a client connects to in place of a server; keeps what goes by."""

    def __init__(self, target: tuple[str, int]):
        self.to_server: list[bytearray] = []
        self.to_client: list[bytearray] = []
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                for source, sink, recordings in ((near, far, self.to_server), (far, near, self.to_client)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    recordings.append(bytearray())
                    threading.Thread(target=self._carry, args=(source, sink, recordings[-1]), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket, recording: bytearray):
        with contextlib.suppress(OSError):
            while part := source.recv(2**16):
                recording += part
                sink.sendall(part)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def recordings(self) -> tuple[bytes, bytes]:
        return b"".join(self.to_server), b"".join(self.to_client)


def encodings(values: np.ndarray) -> list[bytes]:
    ring = np.round(values.astype(np.float64) * SCALE).astype("<i8")
    return [values.astype("<f4").tobytes(), values.astype("<f8").tobytes(), ring.tobytes()]


def windows(values: np.ndarray) -> Iterator[bytes]:
    """Runs of neighbouring numbers as they could be sent, row by row or column by column; not of few values."""
    for flat in (values.ravel(), values.T.ravel()):
        size = 8 if flat.size >= 64 else 4
        for begin in range(0, flat.size - size + 1, size):
            run = flat[begin : begin + size]
            if len(np.unique(np.round(run * SCALE))) == size and abs(run[0]) > 1 / SCALE:
                yield from encodings(run)


def found(needles: list[bytes], recording: bytes) -> bool:
    """Whether any of the needles is in the recording, at whatever offset."""
    by_start: dict[int, list[bytes]] = {}
    for needle in needles:
        by_start.setdefault(int.from_bytes(needle[:8], "little"), []).append(needle)
    starts = np.array(sorted(by_start), np.uint64)
    for offset in range(8):
        words = np.frombuffer(recording, "<u8", (len(recording) - offset) // 8, offset)
        places = np.searchsorted(starts, words).clip(max=len(starts) - 1)
        for place in np.flatnonzero(starts[places] == words):
            begin = offset + 8 * int(place)
            if any(recording.startswith(needle, begin) for needle in by_start[int(words[place])]):
                return True
    return False


@pytest.mark.slow
def test_what_goes_over_the_wire_shows_neither_prompt_nor_weights(served):
    weights = served.server.offer.weights
    runs = []
    for _ in range(2):
        recorder = Recorder(served.server.address)
        with contextlib.closing(recorder):
            assert ask_at(recorder.address, 1).tokens == served.expected[:1]
        runs.append(recorder.recordings())

    embeddings = weights["wte"][PROMPT], weights["wte"][PROMPT] + weights["wpe"][: len(PROMPT)]
    needles = [needle for values in (*weights.values(), *embeddings) for needle in windows(values)]
    rows = [needle for row in encode_tokens(PROMPT, 101) for needle in encodings(row)]
    texts = [json.dumps(PROMPT).encode(), json.dumps(PROMPT, separators=(",", ":")).encode()]
    # What is looked for would be found.
    assert len(needles) > 1000
    for sent in (encodings(weights["h.0.qkv.weight"]), encodings(weights["head.bias"]), encodings(embeddings[1])):
        assert all(found(needles, b"odd" + content) for content in sent)

    for recording in runs[0]:
        assert len(recording) > 10**5
        assert not found(needles, recording)
        assert not any(row in recording for row in rows)
        assert not any(text in recording for text in texts)

    # The same question twice looks different, but for headers and paddings.
    for first, second in zip(*runs, strict=True):
        samples = [first[begin : begin + 32] for begin in range(0, len(first) - 32, len(first) // 300)]
        telling = [sample for sample in samples if len(set(sample)) > 24]
        assert len(telling) > 50
        assert sum(sample in second for sample in telling) < 0.05 * len(telling)


def test_a_partys_placeholders_hold_nothing():
    from spu import libspu

    offer, _ = make_offer()
    description = libspu.link.Desc()
    for name in ("server", "client"):
        description.add_party(name, name)
    parties: list[Participant | None] = [None, None]

    def join(rank: int):
        link = libspu.link.create_mem(description, rank)
        parties[rank] = Participant(link, offer.config, offer.settings, offer.weights if rank == SERVER else None)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (SERVER, CLIENT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    one_hot = encode_tokens(PROMPT, 101)
    parties[CLIENT].party.set_own(TOKENS, one_hot)
    parties[SERVER].party.set_foreign(TOKENS, one_hot.shape, CLIENT)

    def content(rank: int, name: str) -> bytes:
        size = 8 * int(np.prod(one_hot.shape if name == TOKENS else offer.weights[name].shape))
        (chunk,) = parties[rank].party.share(name).share_chunks
        assert size < len(chunk) < size + 20
        return chunk[-size:]

    for name, weight in offer.weights.items():
        assert not any(content(CLIENT, name)), name
        assert any(content(SERVER, name)) == bool(np.any(weight)), name
    assert not any(content(SERVER, TOKENS))
    assert any(content(CLIENT, TOKENS))
