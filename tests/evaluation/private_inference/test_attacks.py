"""Peers that do not keep to the rules, on a server's port and behind it: what they cost, and what is said of them."""

import contextlib
import errno
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trustme

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.evaluation.errors import EmbeddingsError, EngineError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import channel as channel_module
from entropy_gpt.evaluation.private_inference.parties import engine, limits, memory, party_process, tunnel
from entropy_gpt.evaluation.private_inference.parties import server as server_module
from entropy_gpt.evaluation.private_inference.parties.channel import (
    TURN_OVER,
    Channel,
    RefusalError,
    TLSFiles,
    connect,
    may_be_told,
    one_line,
)
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.job import (
    Job,
    Request,
    read_array,
    read_arrays,
    write_array,
    write_arrays,
)
from entropy_gpt.evaluation.private_inference.parties.limits import DAY_SECONDS, Accounts, Limits, Use
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import Noise, Sampling
from entropy_gpt.evaluation.private_inference.parties.server import MAX_GREETINGS, Server
from entropy_gpt.evaluation.private_inference.parties.session import (
    MOST_MESSAGES,
    SET_UP_ALLOWANCE,
    Allowance,
    Events,
    Session,
    free_port,
    listen_to_peer,
)
from entropy_gpt.evaluation.private_inference.parties.shares import join_share, read_share
from entropy_gpt.evaluation.private_inference.parties.tables import PublicCheckpoint
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION, Offer
from entropy_gpt.evaluation.private_inference.program.program import NOISE, ProgramConfig, weight_shapes
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_model

from .test_channel import tls_files
from .test_tunnel import eventually, linked


# Seconds: far less than the deadlines of those who wait, on a machine that has other work too.
WITHOUT_WAITING = 5
FEW = Limits(answers=8, requests=3, positions=10, seconds=100)


def make_offer() -> Offer:
    torch.manual_seed(0)
    return Offer(*prepare_weights(make_model("SM", n_layer=1)), "SM", PrivateSettings(), "hash")


@contextlib.contextmanager
def serving(
    report=lambda line: None, tls: TLSFiles | None = None, offer: Offer | None = None, **options
) -> Iterator[Server]:
    server = Server(offer or make_offer(), "127.0.0.1", 0, tls, report=report, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.close()


@pytest.fixture
def program_config() -> ProgramConfig:
    return ProgramConfig.of(make_offer().config)


class TestGreetings:
    def test_idle_connections_keep_nobody_waiting(self):
        with serving() as server, contextlib.ExitStack() as idle:
            for _ in range(3 * MAX_GREETINGS):
                idle.enter_context(socket.create_connection(server.address))
            started = time.monotonic()
            with contextlib.closing(Client(*server.address, None)) as client:
                assert client.terms.notation == "SM"
            assert time.monotonic() - started < WITHOUT_WAITING

    def test_those_who_said_hello_and_stopped_keep_nobody_waiting_either(self):
        with serving() as server, contextlib.ExitStack() as idle:
            for _ in range(MAX_GREETINGS + 8):
                channel = idle.enter_context(contextlib.closing(connect(*server.address, None)))
                channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
            started = time.monotonic()
            with contextlib.closing(Client(*server.address, None)):
                assert time.monotonic() - started < WITHOUT_WAITING
            assert eventually(lambda: len(server._waiting) <= MAX_GREETINGS)

    def test_the_address_with_most_connections_gives_way(self):
        with serving() as server, contextlib.ExitStack() as idle:
            first = idle.enter_context(socket.create_connection(server.address, source_address=("127.0.0.9", 0)))
            assert eventually(lambda: len(server._waiting) == 1)
            for _ in range(2 * MAX_GREETINGS):
                idle.enter_context(socket.create_connection(server.address))
            assert eventually(lambda: len(server._waiting) == MAX_GREETINGS)
            first.setblocking(False)
            with pytest.raises(BlockingIOError):
                first.recv(1)

    def test_who_begins_tls_and_stops_loses_the_connection_with_the_slot(self, tmp_path):
        with (
            serving(tls=tls_files(tmp_path, "server", trustme.CA(), "127.0.0.1")) as server,
            contextlib.ExitStack() as idle,
        ):
            begun = []
            for _ in range(MAX_GREETINGS + 8):
                begun.append(idle.enter_context(socket.create_connection(server.address)))
                begun[-1].sendall(b"\x16")  # the first byte of a handshake
            assert eventually(lambda: len(server._waiting) == MAX_GREETINGS)
            begun[0].settimeout(WITHOUT_WAITING)
            assert begun[0].recv(1000) == b""

    def test_many_addresses_that_drip_keep_nobody_waiting(self):
        with serving() as server, contextlib.ExitStack() as dripping:
            for address in range(2, 2 + 3 * MAX_GREETINGS):
                source = (f"127.0.0.{address}", 0)
                dripping.enter_context(socket.create_connection(server.address, source_address=source)).sendall(b"\0")
            started = time.monotonic()
            with contextlib.closing(Client(*server.address, None)):
                assert time.monotonic() - started < WITHOUT_WAITING
            assert eventually(lambda: len(server._waiting) <= MAX_GREETINGS)

    def test_who_ends_its_half_of_tls_loses_its_slot(self, tmp_path):
        authority = trustme.CA()
        ours, theirs = (tls_files(tmp_path, name, authority, "127.0.0.1") for name in ("server", "client"))
        with serving(tls=ours) as server, contextlib.closing(connect(*server.address, theirs)) as channel:
            assert eventually(lambda: server._waiting)
            socket.socket.shutdown(channel.connection, socket.SHUT_WR)
            assert eventually(lambda: not server._waiting)

    def test_a_greeting_has_a_deadline(self, monkeypatch):
        monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 0.2)
        with serving() as server, socket.create_connection(server.address, timeout=5) as silent:
            assert b"no whole message for 0.2 seconds" in silent.recv(1000)
            assert eventually(lambda: not server._waiting)

    def test_a_line_of_the_log_has_time_and_address(self):
        lines: list[str] = []
        with serving(lines.append) as server, socket.create_connection(server.address) as raw:
            host, port = raw.getsockname()
            raw.sendall(b"\0\0\0\2{}")
            assert eventually(lambda: lines)
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {host}:{port} .*it has no kind\.", lines[0])

    def test_what_the_server_lacks_is_one_line_there_and_none_of_the_clients_business(self, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(server_module, "Session", fail)
        lines: list[str] = []
        with serving(lines.append) as server, contextlib.closing(connect(*server.address, None)) as channel:
            channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
            channel.receive(5, ("terms",))
            channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
            channel.receive(5, ("accepted",))
            with pytest.raises(PrivateInferenceError, match=r"^the peer refuses: the server failed\.$"):
                channel.receive(5, ("done",))
            assert eventually(lambda: lines)
        (line,) = lines
        assert "an inference ended early: [Errno 28] No space left on device" in line


class TestRefusals:
    """Each party hears in a line why the other ends."""

    def test_a_server_hears_why_a_client_refuses_its_terms(self):
        lines: list[str] = []
        with serving(lines.append) as server:
            with pytest.raises(PrivateInferenceError, match="offers the protocol cheetah, and semi2k is asked for"):
                Client(*server.address, None, protocol="semi2k")
            assert eventually(lambda: lines)
        assert "the peer refuses: the server offers the protocol cheetah, and semi2k is asked for" in lines[0]

    def test_a_server_hears_that_a_clients_tokenizer_is_another(self):
        lines: list[str] = []
        with serving(lines.append) as server, contextlib.closing(Client(*server.address, None)) as client:
            client.check_tokenizer("hash")
            with pytest.raises(PrivateInferenceError, match="the tokenizer is not the server's"):
                client.check_tokenizer("another")
            assert eventually(lambda: lines)
        assert "the peer refuses: the tokenizer is not the server's" in lines[0]

    def test_a_token_that_the_model_lacks_is_refused_at_home(self):
        with (
            serving() as server,
            contextlib.closing(Client(*server.address, None)) as client,
            pytest.raises(PrivateInferenceError, match="token 101 is not one of the model's, which go from 0 to 100"),
        ):
            client.ask(Question([4, 101]))

    def test_an_enormous_reason_is_a_short_line_on_both_sides(self):
        reason, lines = "\x1b[2J\n" + "x" * 60_000, []
        with serving(lines.append) as server, contextlib.closing(connect(*server.address, None)) as channel:
            channel.send({"kind": "refusal", "reason": reason})
            assert eventually(lambda: lines)
        (line,) = lines
        assert line.isprintable() and len(line) < 450
        with (
            refusing({"kind": "refusal", "reason": reason}) as address,
            pytest.raises(PrivateInferenceError, match=r"^the peer refuses: \[2Jxxx") as refused,
        ):
            Client(*address, None)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 350


class TestLimits:
    def test_requests_positions_and_seconds_are_counted_for_each_client(self):
        accounts = Accounts(FEW)
        use, left = accounts.open("one", 8)
        assert left == FEW
        with pytest.raises(PrivateInferenceError, match=r"2 of 10 positions a day left here, and asks for 3 \(--max"):
            accounts.open("one", 3)
        use.seconds = 99.7
        with pytest.raises(PrivateInferenceError, match="0 of 100 seconds a day left"):
            accounts.open("one", 1)
        use.seconds, use.positions = 3, 1
        accounts.open("one", 1)
        accounts.open("one", 1)
        with pytest.raises(PrivateInferenceError, match="0 of 3 requests a day left"):
            accounts.open("one", 1)
        accounts.open("another", 8)

    def test_what_is_being_answered_counts_its_seconds(self, monkeypatch):
        accounts, now = Accounts(FEW), [1000.0]
        monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
        accounts.open("one", 1)[0].running_since = now[0]
        now[0] += 60
        assert accounts.open("one", 1)[1].seconds == 40
        now[0] += 40
        with pytest.raises(PrivateInferenceError, match="0 of 100 seconds a day left"):
            accounts.open("one", 1)

    def test_one_request_has_a_limit_of_its_own(self):
        with pytest.raises(PrivateInferenceError, match=r"9 answers are asked for; 8 is the most here \(--max-new"):
            Accounts(FEW).open("one", 9)

    def test_drafts_that_are_too_many_are_named(self):
        with pytest.raises(PrivateInferenceError, match=r"9 answers are asked for, 3 of them for drafts \(--draft, "):
            Accounts(FEW).open("one", 9, 20, 3)

    def test_what_is_taken_for_drafts_is_given_back_if_no_engine_begins(self):
        with serving(limits=FEW) as server, channels() as (ours, _):
            message = {"length": 4, "new_tokens": 3, "answers": 1, "drafts": 2}
            with pytest.raises(OSError, match="no process"), contextlib.ExitStack() as taken:
                _, use, _ = server._read_request(ours, message, taken)
                assert use.positions == 8
                raise OSError("no process")
            assert server._accounts.open(ours.peer, 1)[1].positions == FEW.positions - 3

    def test_repeats_may_take_what_a_client_with_drafts_has_left(self):
        with serving(limits=Limits()) as server, channels() as (ours, _), contextlib.ExitStack() as taken:
            message = {"length": 4, "new_tokens": 3, "answers": 1, "drafts": 2}
            request, use, _ = server._read_request(ours, message, taken)
            assert (use.positions, request.most_positions, request.limit) == (9, 256, "--max-new-tokens")

    def test_the_time_of_tables_is_part_of_a_clients_time(self, monkeypatch):
        given = []

        def answer(request, note, seconds, take_another):
            given.append(seconds)
            return SimpleNamespace(steps=[])

        with serving() as server:
            monkeypatch.setattr(server, "_send_tables", lambda channel, who, seconds: time.sleep(0.2))
            session, use = SimpleNamespace(answer=answer), Use(0.0, 1)
            for wants in (None, "a channel"):
                server._answer(session, "-", Request(4, 1, 1), use, FEW, None, wants)
        without, after = given
        assert FEW.seconds - 0.1 < without <= FEW.seconds
        assert after <= FEW.seconds - 0.2

    def test_a_day_later_all_is_granted_again(self, monkeypatch):
        accounts, now = Accounts(FEW), [0.0]
        monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
        accounts.open("one", 8)
        now[0] = DAY_SECONDS + 1.0
        assert accounts.open("one", 8)[1] == FEW

    def test_only_so_many_clients_are_remembered(self, monkeypatch):
        monkeypatch.setattr(limits, "MAX_CLIENTS", 2)
        accounts = Accounts(FEW)
        for name in ("one", "two", "one", "three"):
            accounts.open(name, 1)
        assert [*accounts._uses] == ["one", "three"]

    def test_a_client_that_has_used_its_limits_is_refused_in_one_line(self):
        with serving(limits=replace(FEW, positions=1)) as server:
            for _ in range(2):
                with contextlib.closing(connect(*server.address, None)) as channel:
                    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
                    channel.receive(5, ("terms",))
                    channel.send({"kind": "request", "length": 4, "new_tokens": 2, "answers": 1})
                    with pytest.raises(PrivateInferenceError, match=r"the peer refuses: this client has 1 of 1 posit"):
                        channel.receive(5, ("accepted",))

    def test_an_engine_is_kept_at_its_clients_expense_until_another_wants_it(self, monkeypatch):
        monkeypatch.setattr(server_module, "KEPT_CHECK_SECONDS", 0.1)
        with serving() as server:
            session, use = SimpleNamespace(events=Events()), Use(0.0, 1)
            session.events.put({"event": "peer's request"})
            assert server._next_request(session, use) == {"event": "peer's request"}
            threading.Timer(0.15, server.turns._enter, ["another"]).start()
            with pytest.raises(PrivateInferenceError, match="no further prompt came in time: connect again"):
                server._next_request(session, use)
            assert 0.1 < use.kept_seconds < 5

    @pytest.mark.parametrize("why", ["another client waits", "the server ends"])
    def test_a_client_that_asks_at_once_has_no_further_turn(self, why):
        with serving() as server:
            session = SimpleNamespace(events=Events())
            session.events.put({"event": "peer's request"})
            if why == "another client waits":
                server.turns._enter("another")
            else:
                server.drain(0)
            with pytest.raises(PrivateInferenceError, match="the turn is over") as over:
                server._next_request(session, Use(0.0, 1))
            assert over.value.code == TURN_OVER

    @pytest.mark.parametrize("with_tls", [False, True])
    def test_lines_for_programs_name_by_what_limits_go(self, with_tls, tmp_path):
        authority, lines = trustme.CA(), []
        ours = theirs = None
        if with_tls:
            ours, theirs = (tls_files(tmp_path, name, authority, "localhost") for name in "ab")
        with serving(lines.append, ours, json_log=True) as server:
            with contextlib.closing(connect("localhost" if with_tls else "127.0.0.1", server.address[1], theirs)) as c:
                c.send({"kind": "hello", "version": 0})
                with pytest.raises(RefusalError):
                    c.receive(WITHOUT_WAITING, ("terms",))
                own = c.connection.getsockname()
            assert eventually(lambda: lines)
        said = json.loads(lines[0])
        assert said["address"] == f"{own[0]}:{own[1]}"
        assert len(said["client"]) == 16 if with_tls else said["client"] == own[0]
        assert datetime.fromisoformat(said["time"]).tzinfo is not None

    def test_a_client_hears_that_its_turn_is_over(self):
        with channels() as (ours, theirs):
            with pytest.raises(PrivateInferenceError), ours.telling("server"):
                raise PrivateInferenceError("the turn is over", TURN_OVER)
            with pytest.raises(RefusalError, match="the turn is over") as heard:
                theirs.receive(WITHOUT_WAITING, ("program",))
            theirs.send({"kind": "refusal", "reason": "x", "code": ["other"]})
            with pytest.raises(RefusalError) as other:
                ours.receive(WITHOUT_WAITING, ("program",))
        assert (heard.value.code, other.value.code) == (TURN_OVER, None)

    def test_repeats_count_against_what_a_request_may_have_answered(self):
        process = PartyProcess.__new__(PartyProcess)
        process.request, process.positions = Request(4, 2, 1, most_positions=2), 0
        process._count(Span(0, 4))
        process._count(Span(0, 4))
        with pytest.raises(PrivateInferenceError, match=r"would take 3 positions: 2 is the most here, with those of"):
            process._count(Span(0, 4))

    def test_a_seed_draws_the_same_whether_an_answer_is_repeated_or_not(self, monkeypatch, program_config):
        def draw(repeats: int) -> list[np.ndarray]:
            found, process = iter([True] * repeats + [False, False]), PartyProcess.__new__(PartyProcess)
            process.job = Job(CLIENT, program_config, PrivateSettings(answer="sampled"), 60)
            process.request, process.positions, process.chosen, process.drafted = Request(2, 2, 1), 0, [3], []
            process._half = None
            process.request.prompt, process.request.sampling = [2, 3], Sampling(1.0, seed=0)
            process._noise = Noise(process.request.sampling, program_config.vocab_size)
            process.tell, process.tables = lambda event: None, {}
            process._compiler = SimpleNamespace(submit=lambda *work: SimpleNamespace(result=list))
            process._compare, noises = lambda program: None, []
            process._was_out_of_range, process._exchange = lambda index: next(found), lambda span: None
            process.participant = SimpleNamespace(infer=lambda program, span, given, tell: noises.append(given[NOISE]))
            for index, span in enumerate((Span(0, 2), Span(2, 1))):
                process._answer(index, span, [])
            return noises

        first, again, second = draw(1)
        assert np.array_equal(first, again)
        for noise, expected in zip((first, second), draw(0), strict=True):
            assert np.array_equal(noise, expected)


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
        with serving() as server, pytest.raises(PrivateInferenceError, match="need 0 GB of memory"):
            monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
            Client(*server.address, None)

    def test_a_containers_memory_is_its_own(self, monkeypatch, tmp_path):
        (tmp_path / "most").write_text("1000\n")
        (tmp_path / "none").write_text("max\n")
        monkeypatch.setattr(memory, "LIMITS", (tmp_path / "most", tmp_path / "none", tmp_path / "missing"))
        assert memory.machine_memory() == 1000


class TestPublicEmbeddings:
    """What a server's word makes a client do: nothing."""

    @pytest.fixture
    def offer(self) -> Offer:
        checkpoint = PublicCheckpoint("/etc/\x1b[31mpasswd", "0123abc")
        return replace(make_offer(), settings=PrivateSettings(embedding="public"), checkpoint=checkpoint)

    def test_a_client_loads_nothing_by_a_servers_word(self, offer):
        with serving(offer=offer) as server, pytest.raises(EmbeddingsError) as refused:
            Client(*server.address, None)
        assert str(refused.value) == (
            "the server has the public embeddings of /etc/[31mpasswd (revision 0123abc), and its word alone loads "
            "nothing: name a copy with --public-checkpoint, a folder or a repository on the Hub."
        )

    def test_a_client_that_has_other_ones_leaves_before_any_request(self, offer, tmp_path):
        lines: list[str] = []
        make_model("SM", n_layer=1).save_pretrained(tmp_path)
        with serving(lines.append, offer=offer) as server:
            with pytest.raises(EmbeddingsError, match=rf"w[tp]e of {tmp_path} is not the server's"):
                Client(*server.address, None, public_checkpoint=tmp_path)
            assert eventually(lambda: any("the peer refuses: the client failed" in line for line in lines))
        assert str(tmp_path) not in "".join(lines)

    def test_a_copy_for_a_server_that_has_none_is_refused(self, tmp_path):
        make_model("SM", n_layer=1).save_pretrained(tmp_path)
        with serving() as server, pytest.raises(EmbeddingsError, match=r"--public-checkpoint .* has no effect"):
            Client(*server.address, None, public_checkpoint=tmp_path)

    def test_a_copy_is_read_before_a_server_waits_for_it(self, tmp_path):
        with pytest.raises(ConversionError, match="has no weights"):
            Client("127.0.0.1", free_port(), None, public_checkpoint=tmp_path)  # where nobody listens

    @pytest.mark.parametrize(
        "changed",
        [
            {"tables": {}},
            {"tables": {"wte": {"hash": "0" * 64, "precision": "float32"}}},
            *(
                {"tables": {name: {"hash": told, "precision": "float32"} for name in ("wte", "wpe")}}
                for told in ("../" + "0" * 61, "0" * 64 + "\n", "", "A" * 64)
            ),
            {"tables": {name: {"hash": "0" * 64, "precision": "int8"} for name in ("wte", "wpe")}},
            {"checkpoint": None},
            {"checkpoint": {"name": None}},
        ],
    )
    def test_broken_terms_are_refused(self, changed, offer):
        with (
            refusing({"kind": "terms", **offer.terms(), "store": None, **changed}) as address,
            pytest.raises(PrivateInferenceError, match="the server's terms are broken"),
        ):
            Client(*address, None)


class TestWeights:
    def test_they_go_through_a_pipe_as_they_are(self, program_config):
        weights = make_offer().weights
        reading, writing = map(os.fdopen, os.pipe(), ("rb", "wb"))

        def write():
            with writing:
                write_arrays(weights, weight_shapes(program_config), writing)

        threading.Thread(target=write, daemon=True).start()
        with reading:
            read = read_arrays(reading, weight_shapes(program_config))
            assert reading.read() == b""
        assert [*read] and all(np.array_equal(read[name], weights[name]) for name in read)

    def test_a_pipe_that_ends_early_is_noticed(self, program_config, tmp_path):
        (tmp_path / "half").write_bytes(bytes(1000))
        with (tmp_path / "half").open("rb") as half, pytest.raises(EOFError):
            read_arrays(half, weight_shapes(program_config))

    def test_other_weights_are_not_sent(self, program_config, tmp_path):
        weights = make_offer().weights
        with (tmp_path / "sink").open("wb") as sink:
            with pytest.raises(KeyError):
                write_arrays({}, weight_shapes(program_config), sink)
            with pytest.raises(ValueError, match="wte is"):
                write_arrays({**weights, "wte": weights["wte"].T}, weight_shapes(program_config), sink)

    def test_logits_come_back_as_part_of_an_event(self):
        logits = np.arange(6, dtype=np.float64).reshape(2, 3)
        assert np.array_equal(read_array(write_array(logits)), logits)


class TestPasses:
    def test_each_is_compiled_while_the_one_before_runs(self, monkeypatch, program_config):
        compiled: list[int] = []
        ran: list[tuple[int, int]] = []
        monkeypatch.setattr(party_process, "EngineLog", lambda: None)
        monkeypatch.setattr(party_process, "compile_pass", lambda config, settings, span: compiled.append(span) or [])
        monkeypatch.setattr(party_process, "compiled_digest", lambda program, settings: "00")
        process = PartyProcess(Job(SERVER, program_config, PrivateSettings(), 60), lambda event: None)
        monkeypatch.setattr(process, "_compare", lambda program: None)

        def run(index: int, span: Span, program: list):
            eventually(lambda: len(compiled) == min(index + 2, 3))
            ran.append((index, len(compiled)))

        monkeypatch.setattr(process, "_answer", run)
        process.prepare(Request(4, 3, 1))
        assert len(compiled) == 1
        process.answer(lambda: b"")
        assert ran == [(0, 2), (1, 3), (2, 3)]


def test_an_engines_stack_is_not_shown():
    said = "[external/yacl/link/channel.cc:42] Get data timeout, key=P2P-1:1->0"
    assert one_line(f"what: \n\t{said}\nStacktrace:\n#0 0x7f (a)\n#1") == said
    assert len(one_line("x" * 10_000)) == 300


@dataclass
class ShareOf:
    """A share as the engine has it."""

    meta: bytes = b""
    share_chunks: list[bytes] | None = None


def make_share(*chunks: bytes) -> ShareOf:
    return ShareOf(b"meta", list(chunks))


@contextlib.contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    """The two ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        with contextlib.closing(Channel(listener.accept()[0])) as one, contextlib.closing(Channel(theirs)) as other:
            yield one, other


@contextlib.contextmanager
def refusing(message: dict) -> Iterator[tuple[str, int]]:
    """A server that says one thing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with contextlib.closing(Channel(listener.accept()[0])) as channel:
                channel.receive(WITHOUT_WAITING, ("hello",))
                channel.send(message)

        threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()


def flood(connection: socket.socket):
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x" * 2**16)
