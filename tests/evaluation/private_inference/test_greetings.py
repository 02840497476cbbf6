"""Who greets a server, and who is refused: whatever they do costs others nothing."""

import contextlib
import errno
import os
import re
import socket
import time
from dataclasses import replace

import pytest
import trustme

from entropy_gpt.conversion.errors import ConversionError
from entropy_gpt.evaluation.errors import EmbeddingsError, PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import server as server_module
from entropy_gpt.evaluation.private_inference.parties.channel import connect
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.server import MAX_GREETINGS
from entropy_gpt.evaluation.private_inference.parties.session import free_port
from entropy_gpt.evaluation.private_inference.parties.tables import PublicCheckpoint
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION, Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from tests.architectures import make_model
from tests.waiting import eventually

from .attacking import WITHOUT_WAITING, listening, refusing
from .serving import make_offer
from .test_channel import tls_files


class TestGreetings:
    def test_idle_connections_keep_nobody_waiting(self):
        with listening() as server, contextlib.ExitStack() as idle:
            for _ in range(3 * MAX_GREETINGS):
                idle.enter_context(socket.create_connection(server.address))
            started = time.monotonic()
            with contextlib.closing(Client(*server.address, None)) as client:
                assert client.terms.notation == "SM"
            assert time.monotonic() - started < WITHOUT_WAITING

    def test_those_who_said_hello_and_stopped_keep_nobody_waiting_either(self):
        with listening() as server, contextlib.ExitStack() as idle:
            for _ in range(MAX_GREETINGS + 8):
                channel = idle.enter_context(contextlib.closing(connect(*server.address, None)))
                channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
            started = time.monotonic()
            with contextlib.closing(Client(*server.address, None)):
                assert time.monotonic() - started < WITHOUT_WAITING
            assert eventually(lambda: len(server._waiting) <= MAX_GREETINGS)

    def test_the_address_with_most_connections_gives_way(self):
        with listening() as server, contextlib.ExitStack() as idle:
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
            listening(tls=tls_files(tmp_path, "server", trustme.CA(), "127.0.0.1")) as server,
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
        with listening() as server, contextlib.ExitStack() as dripping:
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
        with listening(tls=ours) as server, contextlib.closing(connect(*server.address, theirs)) as channel:
            assert eventually(lambda: server._waiting)
            socket.socket.shutdown(channel.connection, socket.SHUT_WR)
            assert eventually(lambda: not server._waiting)

    def test_a_greeting_has_a_deadline(self, monkeypatch):
        monkeypatch.setattr(server_module, "HANDSHAKE_SECONDS", 0.2)
        with listening() as server, socket.create_connection(server.address, timeout=5) as silent:
            assert b"no whole message for 0.2 seconds" in silent.recv(1000)
            assert eventually(lambda: not server._waiting)

    def test_a_line_of_the_log_has_time_and_address(self):
        lines: list[str] = []
        with listening(lines.append) as server, socket.create_connection(server.address) as raw:
            host, port = raw.getsockname()
            raw.sendall(b"\0\0\0\2{}")
            assert eventually(lambda: lines)
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d {host}:{port} .*it has no kind\.", lines[0])

    def test_what_the_server_lacks_is_one_line_there_and_none_of_the_clients_business(self, monkeypatch):
        def fail(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(server_module, "Session", fail)
        lines: list[str] = []
        with listening(lines.append) as server, contextlib.closing(connect(*server.address, None)) as channel:
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
        with listening(lines.append) as server:
            with pytest.raises(PrivateInferenceError, match="offers the protocol cheetah, and semi2k is asked for"):
                Client(*server.address, None, protocol="semi2k")
            assert eventually(lambda: lines)
        assert "the peer refuses: the server offers the protocol cheetah, and semi2k is asked for" in lines[0]

    def test_a_server_hears_that_a_clients_tokenizer_is_another(self):
        lines: list[str] = []
        with listening(lines.append) as server, contextlib.closing(Client(*server.address, None)) as client:
            client.check_tokenizer("hash")
            with pytest.raises(PrivateInferenceError, match="the tokenizer is not the server's"):
                client.check_tokenizer("another")
            assert eventually(lambda: lines)
        assert "the peer refuses: the tokenizer is not the server's" in lines[0]

    def test_a_token_that_the_model_lacks_is_refused_at_home(self):
        with (
            listening() as server,
            contextlib.closing(Client(*server.address, None)) as client,
            pytest.raises(PrivateInferenceError, match="token 101 is not one of the model's, which go from 0 to 100"),
        ):
            client.ask(Question([4, 101]))

    def test_an_enormous_reason_is_a_short_line_on_both_sides(self):
        reason, lines = "\x1b[2J\n" + "x" * 60_000, []
        with listening(lines.append) as server, contextlib.closing(connect(*server.address, None)) as channel:
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


class TestPublicEmbeddings:
    """What a server's word makes a client do: nothing."""

    @pytest.fixture
    def offer(self) -> Offer:
        checkpoint = PublicCheckpoint("/etc/\x1b[31mpasswd", "0123abc")
        return replace(make_offer()[0], settings=PrivateSettings(embedding="public"), checkpoint=checkpoint)

    def test_a_client_loads_nothing_by_a_servers_word(self, offer):
        with listening(offer=offer) as server, pytest.raises(EmbeddingsError) as refused:
            Client(*server.address, None)
        assert str(refused.value) == (
            "the server has the public embeddings of /etc/[31mpasswd (revision 0123abc), and its word alone loads "
            "nothing: name a copy with --public-checkpoint, a folder or a repository on the Hub."
        )

    def test_a_client_that_has_other_ones_leaves_before_any_request(self, offer, tmp_path):
        lines: list[str] = []
        make_model("SM", n_layer=1).save_pretrained(tmp_path)
        with listening(lines.append, offer=offer) as server:
            with pytest.raises(EmbeddingsError, match=rf"w[tp]e of {tmp_path} is not the server's"):
                Client(*server.address, None, public_checkpoint=tmp_path)
            assert eventually(lambda: any("the peer refuses: the client failed" in line for line in lines))
        assert str(tmp_path) not in "".join(lines)

    def test_a_copy_for_a_server_that_has_none_is_refused(self, tmp_path):
        make_model("SM", n_layer=1).save_pretrained(tmp_path)
        with listening() as server, pytest.raises(EmbeddingsError, match=r"--public-checkpoint .* has no effect"):
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
