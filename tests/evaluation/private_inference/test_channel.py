"""Messages over real sockets: what is carried as it is, and what is refused with one line."""

import contextlib
import io
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import (
    LENGTH,
    MAX_MESSAGE_BYTES,
    MAX_REASON_CHARACTERS,
    Channel,
    Listener,
    TLSFiles,
    check_plain_allowed,
    connect,
    parse_address,
)
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def tls_files(folder: Path, name: str, authority: trustme.CA, *identities: str) -> TLSFiles:
    """Files of a new certificate, signed by an authority that its owner trusts too."""
    certificate = authority.issue_cert(*identities)
    files = TLSFiles(folder / f"{name}.pem", folder / f"{name}.key", folder / f"{name}-authority.pem")
    certificate.cert_chain_pems[0].write_to_path(files.certificate)
    certificate.private_key_pem.write_to_path(files.key)
    authority.cert_pem.write_to_path(files.authority)
    return files


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_files(tmp_path_factory, authority) -> TLSFiles:
    return tls_files(tmp_path_factory.mktemp("server"), "server", authority, "127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def client_files(tmp_path_factory, authority) -> TLSFiles:
    return tls_files(tmp_path_factory.mktemp("client"), "client", authority, "client.example")


@pytest.fixture
def raw_and_channel() -> Iterator[tuple[socket.socket, Channel]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as raw:
        channel = Channel(server.accept()[0])
        yield raw, channel
        channel.close()


@contextlib.contextmanager
def joined(server_files: TLSFiles | None, client_files: TLSFiles | None) -> Iterator[tuple[Channel, Channel]]:
    """The server's channel and the client's."""
    listener = Listener("127.0.0.1", 0, server_files)
    with ThreadPoolExecutor(1) as pool:
        welcomed = pool.submit(lambda: listener.welcome(listener.accept()))
        client = connect(*listener.address, client_files)
        server = welcomed.result()
    yield server, client
    for ended in (server, client, listener):
        ended.close()


@given(st.integers(0, 65535), st.ip_addresses() | st.from_regex(r"[a-z][a-z0-9.-]{0,20}", fullmatch=True))
def test_addresses_are_read_as_they_are_written(port, host):
    host = str(host)
    text = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    assert parse_address(text) == (host, port)


@given(st.text())
def test_any_other_text_is_refused_with_its_value(text):
    try:
        host, port = parse_address(text)
    except PrivateInferenceError as error:
        assert repr(text) in str(error) and "HOST:PORT" in str(error)
    else:
        assert text in (f"{host}:{text.rpartition(':')[2]}", f"[{host}]:{text.rpartition(':')[2]}")
        assert host and 0 <= port <= 65535


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:", "host:-1", "host:65536", "::1:5", "a b:1", "[::1]", "h:１"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(PrivateInferenceError, match="write HOST:PORT"):
        parse_address(text)


def test_plain_connections_stay_on_this_machine():
    settings = PrivateSettings(embedding="public")
    telling = [PrivateSettings(protocol="semi2k"), PrivateSettings(embedding="client_table")]
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        for each in (settings, *telling):
            check_plain_allowed(host, insecure=False, settings=each)
    check_plain_allowed("0.0.0.0", insecure=True, settings=settings)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org"):
        with pytest.raises(PrivateInferenceError, match=r"--cert, --key and --ca .* --insecure"):
            check_plain_allowed(host, insecure=False, settings=settings)
        for each in telling:
            with pytest.raises(PrivateInferenceError, match="would show weights or prompt to whoever listens"):
                check_plain_allowed(host, insecure=True, settings=each)


@pytest.mark.parametrize("secure", [True, False])
def test_messages_go_both_ways(secure, server_files, client_files):
    with joined(server_files if secure else None, client_files if secure else None) as (server, client):
        large = {"kind": "large", "text": "x" * (MAX_MESSAGE_BYTES - 40)}
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(server.send, large)
            assert client.receive(5, ("large",)) == large
            sent.result()
        client.send({"kind": "small", "text": "é\u2028\0"})
        assert server.receive(5, ("large", "small")) == {"kind": "small", "text": "é\u2028\0"}
        if secure:
            assert server.connection.version() == client.connection.version() == "TLSv1.3"


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=4))
def test_messages_arrive_as_they_were_sent(messages):
    with joined(None, None) as (server, client):
        for message in messages:
            client.send({**message, "kind": "any"})
        for message in messages:
            assert server.receive(5, ("any",)) == {**message, "kind": "any"}


@pytest.mark.parametrize("secure", [True, False])
def test_both_sides_send_while_they_receive(secure, server_files, client_files):
    with (
        joined(server_files if secure else None, client_files if secure else None) as (server, client),
        ThreadPoolExecutor(4) as pool,
    ):

        def send(channel: Channel):
            for number in range(300):
                channel.send({"kind": "number", "number": number, "padding": "x" * (number * 97 % 30_000)})

        def receive(channel: Channel) -> list[int]:
            return [channel.receive(10, ("number",))["number"] for _ in range(300)]

        work = [pool.submit(send, server), pool.submit(send, client)]
        read = [pool.submit(receive, server), pool.submit(receive, client)]
        assert [done.result() for done in work + read] == [None, None, list(range(300)), list(range(300))]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"kind": "a", "kind": "a"}', "twice"),
        (b'{"kind": "a", "b": {"c": 1, "c": 1}}', "twice"),
        (b'{"kind": "a", "b": NaN}', "NaN"),
        (b'{"kind": "a", "b": [-Infinity]}', "Infinity"),
        (b'{"kind": "a"', "no proper message"),
        (b"", "no proper message"),
        (b"\xff\xfe", "no proper message"),
        (b"[" * 60_000, "no proper message"),
        (b'{"kind": "a", "b": ' + b"9" * 10_000 + b"}", "no proper message"),
        (b"[]", "no kind"),
        (b"{}", "no kind"),
        (b'{"kind": 1}', "no kind"),
        (b'{"kind": "b\\u001b[2J\\n"}', r"'b\[2J' where a belongs"),
    ],
)
def test_broken_messages_are_refused_in_one_line(content, complaint, raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(LENGTH.pack(len(content)) + content)
    with pytest.raises(PrivateInferenceError, match=complaint) as caught:
        channel.receive(5, ("a",))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_length_too_large_is_refused_unread(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(LENGTH.pack(MAX_MESSAGE_BYTES + 1))
    with pytest.raises(PrivateInferenceError, match="65,537"):
        channel.receive(5, ("a",))


def test_too_large_a_message_is_not_sent(raw_and_channel):
    raw, channel = raw_and_channel
    with pytest.raises(PrivateInferenceError, match=r"more than 65,536"):
        channel.send({"kind": "a", "text": "x" * MAX_MESSAGE_BYTES})
    channel.send({"kind": "b"})
    assert raw.recv(100).endswith(b'{"kind": "b"}')


def test_a_message_cut_short_is_refused(raw_and_channel):
    raw, channel = raw_and_channel
    raw.sendall(LENGTH.pack(20) + b'{"kind"')
    raw.close()
    with pytest.raises(PrivateInferenceError, match="closed the connection"):
        channel.receive(5, ("a",))


def test_a_silent_peer_is_given_up(raw_and_channel):
    _, channel = raw_and_channel
    with pytest.raises(PrivateInferenceError, match=r"for 0\.2 seconds"):
        channel.receive(0.2, ("a",))


def test_a_peer_that_drips_is_given_up(raw_and_channel):
    raw, channel = raw_and_channel

    def drip():
        with contextlib.suppress(OSError):
            raw.sendall(LENGTH.pack(1000))
            for _ in range(1000):
                raw.sendall(b" ")
                time.sleep(0.05)

    threading.Thread(target=drip, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(PrivateInferenceError, match="seconds"):
        channel.receive(0.3, ("a",))
    assert time.monotonic() - start < 20


def test_a_refusal_is_told_without_what_drives_a_terminal(raw_and_channel):
    raw, channel = raw_and_channel
    content = json.dumps({"kind": "refusal", "reason": "no\x1b[31m\n\u202e\ud800 more" + "!" * 10_000}).encode()
    raw.sendall(LENGTH.pack(len(content)) + content)
    with pytest.raises(PrivateInferenceError, match=r"refuses: no\[31m more!+$") as caught:
        channel.receive(5, ("a",))
    assert len(str(caught.value)) <= MAX_REASON_CHARACTERS + 30


def test_closing_wakes_who_receives(server_files, client_files):
    with joined(server_files, client_files) as (server, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.receive, None, ("a",))
        time.sleep(0.1)
        server.close()
        with pytest.raises(PrivateInferenceError):
            waiting.result(timeout=5)


def test_a_peer_that_is_killed_is_noticed():
    listener = Listener("127.0.0.1", 0, None)
    script = f"import socket, time; s = socket.create_connection({listener.address!r}); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script])
    channel = listener.welcome(listener.accept())
    process.kill()
    process.wait()
    with pytest.raises(PrivateInferenceError, match="closed the connection"):
        channel.receive(5, ("a",))
    channel.close()
    listener.close()


def test_both_need_a_certificate_of_the_authority(tmp_path, server_files, client_files):
    stranger = tls_files(tmp_path, "stranger", trustme.CA(), "127.0.0.1")
    trusting = TLSFiles(stranger.certificate, stranger.key, client_files.authority)
    listener = Listener("127.0.0.1", 0, server_files)
    with ThreadPoolExecutor(1) as pool:
        for files, side in ((stranger, "client"), (trusting, "server")):
            welcomed = pool.submit(lambda: listener.welcome(listener.accept()))
            if side == "client":
                with pytest.raises(PrivateInferenceError, match=r"TLS failed: .*certificate"):
                    connect(*listener.address, files)
            else:  # TLS 1.3: the client learns only when it reads that it was not believed
                with pytest.raises(PrivateInferenceError, match="the peer"):
                    connect(*listener.address, files).receive(5, ("a",))
            with pytest.raises(PrivateInferenceError, match="TLS failed"):
                welcomed.result()
    listener.close()


def test_a_client_without_a_certificate_is_refused(server_files):
    listener = Listener("127.0.0.1", 0, server_files)
    context = ssl.create_default_context(cafile=server_files.authority)
    with ThreadPoolExecutor(1) as pool:
        welcomed = pool.submit(lambda: listener.welcome(listener.accept()))
        with (
            socket.create_connection(listener.address) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as secured,
        ):
            with pytest.raises(PrivateInferenceError, match="TLS failed"):
                welcomed.result()
            with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
                secured.recv(1)
    listener.close()


def test_tls_before_1_3_is_refused(server_files, client_files):
    listener = Listener("127.0.0.1", 0, server_files)
    context = client_files.context(server=False)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with ThreadPoolExecutor(1) as pool:
        welcomed = pool.submit(lambda: listener.welcome(listener.accept()))
        with socket.create_connection(listener.address) as raw, pytest.raises(ssl.SSLError):
            context.wrap_socket(raw, server_hostname="127.0.0.1")
        with pytest.raises(PrivateInferenceError, match="TLS failed"):
            welcomed.result()
    listener.close()


def test_the_servers_name_is_compared(tmp_path, authority, client_files):
    listener = Listener("127.0.0.1", 0, tls_files(tmp_path, "other", authority, "other.example"))
    with ThreadPoolExecutor(1) as pool:
        welcomed = pool.submit(lambda: listener.welcome(listener.accept()))
        with pytest.raises(PrivateInferenceError, match=r"127\.0\.0\.1"):
            connect(*listener.address, client_files)
        with pytest.raises(PrivateInferenceError, match="TLS failed"):
            welcomed.result()
    listener.close()


def test_strangers_who_say_nothing_or_nonsense_stop_nobody(server_files, client_files):
    listener = Listener("127.0.0.1", 0, server_files)
    refused: list[str] = []
    welcomed: list[Channel] = []

    def greet(connection: socket.socket):
        try:
            welcomed.append(listener.welcome(connection))
            welcomed[-1].send({"kind": "welcome"})
        except PrivateInferenceError as error:
            refused.append(str(error))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=greet, args=(listener.accept(),), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with socket.create_connection(listener.address), socket.create_connection(listener.address) as speaker:
        speaker.sendall(b"GET / HTTP/1.1\r\n\r\n")
        client = connect(*listener.address, client_files)
        assert client.receive(5, ("welcome",)) == {"kind": "welcome"}
        client.close()
        speaker.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while speaker.recv(100):
                pass
        speaker.close()
        until = time.monotonic() + 5
        while not refused and time.monotonic() < until:
            time.sleep(0.01)
        assert len(refused) == 1 and "TLS failed" in refused[0]
    listener.close()
    thread.join(5)
    assert not thread.is_alive()
    for channel in welcomed:
        channel.close()


def test_a_port_in_use_is_named():
    first = Listener("127.0.0.1", 0, None)
    with pytest.raises(PrivateInferenceError, match=rf"127\.0\.0\.1:{first.address[1]} .*in use"):
        Listener(*first.address, None)
    first.close()
    with pytest.raises(PrivateInferenceError, match=f"no server at .*:{first.address[1]}: .*refused"):
        connect(*first.address, None)


def test_a_name_that_is_no_hosts_is_refused():
    name = "a" * 64 + ".example"
    with pytest.raises(PrivateInferenceError, match="no server at"):
        connect(name, 1, None)
    with pytest.raises(PrivateInferenceError, match="can't be listened on"):
        Listener(name, 1, None)


@pytest.mark.parametrize("name", ["certificate", "key", "authority"])
@pytest.mark.parametrize("content", [None, b"", b"nonsense\xff"])
def test_wrong_files_of_tls_are_named(name, content, tmp_path, client_files):
    wrong = tmp_path / "wrong"
    if content is not None:
        wrong.write_bytes(content)
    files = replace(client_files, **{name: wrong})
    with pytest.raises(PrivateInferenceError, match=str(wrong)):
        files.context(server=False)


def test_a_key_of_another_certificate_is_refused(client_files, server_files):
    with pytest.raises(PrivateInferenceError, match="no certificate and its key"):
        TLSFiles(client_files.certificate, server_files.key, client_files.authority).context(server=True)


def meet(ours: TLSFiles | None, theirs: TLSFiles | None) -> tuple[str, str]:
    """What a client and a server complain of, each on its own."""

    def serve() -> str:
        try:
            channel = listener.welcome(listener.accept())
            with contextlib.closing(channel):
                channel.receive(5, ("hello",))
        except PrivateInferenceError as error:
            return str(error)
        return ""

    listener = Listener("127.0.0.1", 0, theirs)
    with ThreadPoolExecutor(1) as pool:
        served, said = pool.submit(serve), ""
        try:
            with contextlib.closing(connect(*listener.address, ours)) as channel:
                channel.send({"kind": "hello"})
                channel.receive(5, ("terms",))
        except PrivateInferenceError as error:
            said = str(error)
        listener.close()
        return said, served.result()


class TestMistakesOfTLS:
    """Each side says in a line what to do."""

    @pytest.fixture(autouse=True)
    def _files(self, tmp_path, authority, server_files, client_files):
        self.folder, self.authority = tmp_path, authority
        self.server, self.client = server_files, client_files

    def issue(self, *identities: str, **options) -> TLSFiles:
        issued = self.authority.issue_cert(*identities, **options)
        files = TLSFiles(self.folder / "other.pem", self.folder / "other.key", self.server.authority)
        issued.cert_chain_pems[0].write_to_path(files.certificate)
        issued.private_key_pem.write_to_path(files.key)
        return files

    def expired(self) -> TLSFiles:
        now = datetime.now(UTC)
        return self.issue("127.0.0.1", not_before=now - timedelta(days=2), not_after=now - timedelta(days=1))

    def test_a_plain_client_at_a_port_of_tls(self):
        client, server = meet(None, self.server)
        assert client == "the peer refuses: TLS is wanted: give --cert, --key and --ca."
        assert "the peer speaks no TLS: give --cert, --key and --ca on both sides or on neither" in server

    def test_a_client_of_tls_at_a_plain_port(self):
        client, server = meet(self.client, None)
        assert "the peer wants TLS, and this side has none" in server
        assert "ended the connection: it has other certificates, or no TLS" in client or "speaks no TLS" in client

    @pytest.mark.parametrize("options", [{"common_name": "127.0.0.1"}, {"identities": ["other.example"]}])
    def test_a_certificate_that_does_not_name_the_host(self, options):
        files = self.issue(*options.pop("identities", []), **options)
        client, _ = meet(self.client, files)
        assert "its subjectAltName has to name the host that --connect names" in client
        assert client.isprintable() and len(client) < 300

    def test_a_servers_certificate_that_has_expired(self):
        client, server = meet(self.client, self.expired())
        assert "certificate has expired: its owner needs a new one" in client
        assert "does not accept this side's --cert, which has expired" in server

    def test_a_clients_certificate_that_has_expired(self):
        client, server = meet(self.expired(), self.server)
        assert "certificate has expired: its owner needs a new one" in server
        assert "does not accept this side's --cert, which has expired" in client

    def test_an_authority_that_is_not_known(self):
        stranger = tls_files(self.folder, "stranger", trustme.CA(), "127.0.0.1")
        client, server = meet(self.client, stranger)
        assert "it is not signed by an authority of this side's --ca" in client
        assert "which no authority of its --ca has signed" in server

    @pytest.mark.parametrize("make", ["server", "client"])
    def test_an_encrypted_key_without_a_terminal(self, make, monkeypatch):
        files = getattr(self, make)
        key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        encrypted = self.folder / "encrypted.key"
        encryption = serialization.BestAvailableEncryption(b"secret")
        encrypted.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
        )
        monkeypatch.setattr("sys.stdin", io.StringIO())
        with pytest.raises(PrivateInferenceError, match=r"encrypted\.key is encrypted, and there is no terminal"):
            replace(files, key=encrypted).context(server=make == "server")

    def test_every_complaint_is_one_short_line(self):
        for ours, theirs in ((None, self.server), (self.client, None), (self.client, self.expired())):
            for said in meet(ours, theirs):
                assert said.isprintable()
                assert 0 < len(said) < 300


def test_a_client_is_known_by_its_certificate_and_else_by_its_address(server_files, client_files):
    with joined(server_files, client_files) as (server, _):
        first = server.peer
    with joined(server_files, client_files) as (server, _):
        assert server.peer == first
        assert re.fullmatch("[0-9a-f]{64}", first)
    with joined(None, None) as (server, _):
        assert server.peer == "127.0.0.1"
