"""Peers that do not keep to the rules once they are greeted: what they cost, and what is said of them."""

import contextlib
import math
import os
import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from entropy_gpt.evaluation.errors import EngineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import channel as channel_module
from entropy_gpt.evaluation.private_inference.parties import engine, memory, tunnel
from entropy_gpt.evaluation.private_inference.parties.channel import RefusalError, may_be_told, one_line
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.job import Job, Request
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.session import (
    MOST_MESSAGES,
    SET_UP_ALLOWANCE,
    Allowance,
    Events,
    Session,
    listen_to_peer,
)
from entropy_gpt.evaluation.private_inference.parties.shares import join_share, read_share
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from tests.waiting import eventually

from .attacking import WITHOUT_WAITING, channels, listening
from .test_tunnel import linked


def make_share(*chunks: bytes) -> SimpleNamespace:
    """A share as the engine has it."""
    return SimpleNamespace(meta=b"meta", share_chunks=list(chunks))


def flood(connection: socket.socket):
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x" * 2**16)


class TestMessages:
    """What a client may say once it is greeted."""

    @pytest.mark.parametrize("kind", ["done", "program", "request", "accepted"])
    def test_more_than_belongs_there_is_not_kept(self, kind):
        events = Events()
        with channels() as (ours, theirs):
            thread = listen_to_peer(ours, events)
            with contextlib.suppress(PrivateInferenceError):
                for _ in range(1000):
                    theirs.send({"kind": kind, "x": "x" * 1000})
            thread.join(WITHOUT_WAITING)
        *heard, failure = events.rest(EngineError("this side's engine ended"), 0)[1:]
        assert len(heard) == MOST_MESSAGES
        assert str(failure) == "the peer says more than belongs here."

    def test_a_program_is_named_once(self):
        session = Session.__new__(Session)
        session.events, session._job, session._end = Events(), SimpleNamespace(timeout_seconds=1), math.inf
        for _ in range(2):
            session.events.hear({"kind": "program", "digest": "00"})
        with pytest.raises(PrivateInferenceError, match=r"said \"peer's program\" in the wrong place"):
            session._compare_programs(lambda event: None)

    def test_who_reads_nothing_is_given_up(self, monkeypatch):
        monkeypatch.setattr(channel_module, "SEND_SECONDS", 0.2)
        with (
            channels() as (ours, _),
            pytest.raises(PrivateInferenceError, match=r"took no whole message for 0\.2 sec"),
        ):
            while True:
                ours.send({"kind": "terms", "x": "x" * 60_000})

    def test_tables_go_as_they_are_and_who_reads_them_too_slowly_is_given_up(self):
        content = np.random.default_rng(0).bytes(3 * channel_module.PART_BYTES + 5)
        with channels() as (ours, theirs):
            threading.Thread(target=ours.send_bytes, args=(content, 60), daemon=True).start()
            assert theirs.receive_bytes(len(content), WITHOUT_WAITING) == content
            with pytest.raises(PrivateInferenceError, match="took no whole message"):
                ours.send_bytes(bytes(2**26), 0.2)

    def test_tables_that_end_early_are_noticed(self):
        with channels() as (ours, theirs):
            ours.send_bytes(bytes(10), 60)
            with pytest.raises(PrivateInferenceError, match=r"sent no whole message for 0\.2 seconds"):
                theirs.receive_bytes(11, 0.2)
            ours.close()
            with pytest.raises(PrivateInferenceError, match="closed the connection"):
                theirs.receive_bytes(11, WITHOUT_WAITING)

    def test_a_client_hears_the_reason_of_a_server_although_its_engine_fails_first(self):
        session = Session.__new__(Session)
        session.events, session._job, session._end = (
            Events(),
            SimpleNamespace(rank=CLIENT, timeout_seconds=1),
            math.inf,
        )
        session._process, session._set_up = SimpleNamespace(prepare=lambda request: None), []
        session.events.put(EngineError("this side's engine: the link is broken"))
        threading.Timer(0.3, session.events.put, [RefusalError("the peer refuses: enough.")]).start()
        with pytest.raises(RefusalError, match="enough"):
            session.answer(Request(4, 1, 1))

    @pytest.mark.parametrize("size", [0, 19, 21])
    def test_a_share_of_another_size_ends_the_inference_with_the_reason(self, size):
        process = PartyProcess.__new__(PartyProcess)
        share = make_share(b"\x08\x10\x1a\x10" + bytes(16))
        process.job = SimpleNamespace(rank=SERVER)
        process.link = SimpleNamespace(recv=lambda rank: bytes(size))
        process.participant = SimpleNamespace(party=SimpleNamespace(share=lambda name: share))
        with pytest.raises(PrivateInferenceError, match=rf"share of the answer has {size} bytes") as refused:
            process._was_out_of_range(0)
        assert may_be_told(refused.value)

    @pytest.mark.parametrize("sizes", [[32, 0], [32, 7], [32, 9], [8, 8], [0, 0], [2**20, 8]])
    def test_what_is_shown_of_another_size_ends_the_inference_with_the_reason(self, sizes, monkeypatch):
        """Five numbers, in parts of 32 bytes, of a client that sends more or less."""
        monkeypatch.setattr(engine, "SHOWN_PART_BYTES", 32)
        monkeypatch.setattr(engine, "read_content", lambda share: share)
        party, parts, kept = engine.Party.__new__(engine.Party), iter(sizes), []
        party.link = SimpleNamespace(rank=SERVER, world_size=2, recv=lambda rank: bytes(next(parts)))
        party.share, party.forget = lambda name: np.zeros(5, np.int64), lambda name: None
        party.set_own = lambda name, value: kept.append(value)
        with pytest.raises(PrivateInferenceError, match=rf"shows {sum(sizes):,} bytes instead of 40") as refused:
            party._show("masked", "shown")
        assert may_be_told(refused.value) and not kept


class TestMemory:
    def test_more_than_is_allowed_is_not_read(self):
        sent = os.urandom(2**22)
        with linked(None) as link:
            link.server.allowed_bytes = 2**20
            writing, reading = link.pair(from_client=True)
            threading.Thread(target=lambda: (writing.sendall(sent), writing.close()), daemon=True).start()
            got = bytearray()
            reading.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                while part := reading.recv(2**16):
                    got += part
            assert 2**20 <= len(got) <= 2**20 + tunnel.BUFFER_BYTES
            link.server.allowed_bytes = 2**23
            reading.settimeout(5)
            while part := reading.recv(2**16):
                got += part
            assert got == sent
            assert not link.failures

    def test_a_peer_that_floods_is_refused(self, monkeypatch):
        monkeypatch.setattr(tunnel, "EXCESS_SECONDS", 0.3)
        with linked(None) as link:
            link.server.allowed_bytes = 2**16
            writing, _ = link.pair(from_client=True)
            threading.Thread(target=flood, args=(writing,), daemon=True).start()
            assert eventually(lambda: link.failures)
        assert "sends more than its program does" in link.failures[0]
        assert link.server.received_bytes <= 2**16 + tunnel.BUFFER_BYTES

    def test_the_allowance_follows_the_steps(self, program_config):
        carried = SimpleNamespace(allowed_bytes=None)
        allowance = Allowance(Job(SERVER, program_config, PrivateSettings(), 60), carried)
        assert carried.allowed_bytes == SET_UP_ALLOWANCE
        allowance.note({"event": "pass", "bytes": [100, 200, 400], "answer_bytes": 7})
        assert carried.allowed_bytes == SET_UP_ALLOWANCE + 7 + 1.25 * 300
        for done in (700, 700, 700):
            allowance.note({"event": "step"})
            assert carried.allowed_bytes == SET_UP_ALLOWANCE + 7 + 1.25 * done

    @pytest.mark.parametrize("size", [0, 19, 21, 10**6])
    def test_a_share_of_another_size_is_refused(self, size):
        own = make_share(b"\x08\x10\x1a\x10" + bytes(16))
        with pytest.raises(PrivateInferenceError, match=rf"share of the answer has {size:,} bytes, and its shape 20"):
            read_share(bytes(size), own)

    def test_the_headers_of_a_share_are_not_the_peers_word(self):
        own = make_share(b"\x08\xa0\x02\x1a\x10" + bytes(16), b"\x08\xa0\x02\x10\x10\x1a\x04" + bytes(4))
        theirs = make_share(b"\xff" * 21, b"\xff" * 11)
        read = read_share(join_share(theirs), own)
        assert read.meta == own.meta
        assert read.share_chunks == [
            b"\x08\xa0\x02\x1a\x10" + b"\xff" * 16,
            b"\x08\xa0\x02\x10\x10\x1a\x04" + b"\xff" * 4,
        ]

    def test_terms_beyond_the_memory_of_this_machine_are_refused(self, monkeypatch):
        shapes = [(1000, 1000), (500,)]
        for rank, needed in ((SERVER, 12 * 1_000_500 + 32 * 1_000_000), (CLIENT, 8 * 1_000_500 + 16 * 1_000_000)):
            monkeypatch.setattr(memory, "machine_memory", lambda needed=needed: needed)
            memory.check_memory(shapes, rank)
            monkeypatch.setattr(memory, "machine_memory", lambda needed=needed: needed - 1)
            with pytest.raises(PrivateInferenceError, match="need 0 GB of memory as secret numbers, and this machine"):
                memory.check_memory(shapes, rank)
        with listening() as server, pytest.raises(PrivateInferenceError, match="need 0 GB of memory"):
            monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
            Client(*server.address, None)

    def test_a_containers_memory_is_its_own(self, monkeypatch, tmp_path):
        (tmp_path / "most").write_text("1000\n")
        (tmp_path / "none").write_text("max\n")
        monkeypatch.setattr(memory, "LIMITS", (tmp_path / "most", tmp_path / "none", tmp_path / "missing"))
        assert memory.machine_memory() == 1000


def test_an_engines_stack_is_not_shown():
    said = "[external/yacl/link/channel.cc:42] Get data timeout, key=P2P-1:1->0"
    assert one_line(f"what: \n\t{said}\nStacktrace:\n#0 0x7f (a)\n#1") == said
    assert len(one_line("x" * 10_000)) == 300
