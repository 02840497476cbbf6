"""A server and a client with engines of their own: the right answer, nothing else to be seen, and ways to fail."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import trustme

from tests.architectures import make_model
from tests.slow import slow_cases

from .test_channel import tls_files


pytest.importorskip("spu")

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import SET_UP_BYTES
from entropy_gpt.evaluation.private_inference.parties.channel import Channel, TLSFiles, connect
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.drafts import Drafts
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED, Limits
from entropy_gpt.evaluation.private_inference.parties.memory import RESERVED_BYTES, machine_memory
from entropy_gpt.evaluation.private_inference.parties.participant import Participant
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling, draw_noise
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.session import SET_UP_ALLOWANCE, Outcome, free_port
from entropy_gpt.evaluation.private_inference.parties.tables import PublicCheckpoint
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION, Offer
from entropy_gpt.evaluation.private_inference.parties.tunnel import ClientTunnel
from entropy_gpt.evaluation.private_inference.program.fixed_point import emulate
from entropy_gpt.evaluation.private_inference.program.program import CHECKED, LOGITS, TOKENS, bounds_name
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.variables import encode_tokens
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights


pytestmark = pytest.mark.private
ROOT = Path(__file__).resolve().parents[3]
PROMPT = [17, 93, 5, 64]
SECONDS = 300
SCALE = 2**18
EIGHT_ANSWERS = replace(UNLIMITED, answers=8)


def make_offer(notation: str = "SM", protocol: str = "cheetah") -> tuple[Offer, list[int]]:
    """A tiny model as a server offers it, and what it generates in the clear after the prompt."""
    torch.manual_seed(0)
    model = make_model(notation, n_layer=1)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(2):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    offer = Offer(*prepare_weights(model), notation, PrivateSettings(protocol), "hash")
    return offer, tokens[0, len(PROMPT) :].tolist()


@dataclass
class Served:
    """A server that runs in this process, and what it said."""

    server: Server
    expected: list[int]
    thread: threading.Thread
    lines: list[str] = field(default_factory=list)

    def said(self, words: str, seconds: float) -> bool:
        return eventually(lambda: any(words in line for line in self.lines), seconds)


@contextlib.contextmanager
def serving(
    offer: Offer,
    expected: list[int],
    tls: TLSFiles | None = None,
    host: str = "127.0.0.1",
    limits: Limits = EIGHT_ANSWERS,
    prepared: Path | None = None,
) -> Iterator[Served]:
    lines: list[str] = []
    server = Server(offer, host, 0, tls, SECONDS, limits, lines.append, prepared=prepared)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Served(server, expected, thread, lines)
    server.close()


@pytest.fixture(scope="module")
def softmax_only() -> Iterator[Served]:
    with serving(*make_offer()) as served:
        yield served


@pytest.fixture
def served(softmax_only) -> Served:
    """Free again after whatever another test did to it."""
    assert eventually(lambda: not softmax_only.server.turns.active, 30)
    softmax_only.lines.clear()
    return softmax_only


def eventually(holds: Callable[[], object], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not holds() and time.monotonic() < limit:
        time.sleep(0.05)
    return bool(holds())


def engines_here() -> list[psutil.Process]:
    """Processes of engines that this one started; other tests have children of their own."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if any("party_process" in word for word in child.cmdline())]


def ask_at(address: tuple[str, int], new_tokens: int = 2, tls: TLSFiles | None = None, **options) -> Outcome:
    with contextlib.closing(Client(*address, tls, SECONDS)) as client:
        return client.ask(Question(PROMPT, new_tokens), **options)


def ask(served: Served, new_tokens: int = 2, **options) -> list[int]:
    return ask_at(served.server.address, new_tokens, **options).tokens


def greet(served: Served, **request) -> Channel:
    """A client that speaks for itself, up to its request."""
    channel = connect(*served.server.address, None)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(30, ("terms",))
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1, **request})
    return channel


def run_here(function: Callable, *arguments, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A function of a test in a process of its own, which leads a group; behind the words of another command."""
    code = f"from {function.__module__} import {function.__name__} as run; run(*{arguments!r})"
    return subprocess.Popen(
        [*before, sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def serve_until_killed(host: str = "127.0.0.1"):
    with serving(*make_offer(), host=host) as served:
        print(served.server.address[1], flush=True)
        signal.pause()


def ask_aloud(port: int):
    ask_at(("127.0.0.1", port), on_event=lambda event: print(event["event"], flush=True))


def wait_for_line(process: subprocess.Popen, word: str):
    assert any(line.strip() == word for line in process.stdout)


def test_an_engines_process_needs_neither_torch_nor_transformers():
    code = "import sys, entropy_gpt.evaluation.private_inference.parties.party_process; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets"} & {*imported.stdout.split()}


@dataclass
class Oracle:
    """Drafts right tokens, but for some places."""

    right: list[int]
    wrong: set[int] = field(default_factory=set)

    def begin(self, prompt: list[int], sampling: Sampling, vocab_size: int) -> Callable:
        def draft(known: list[int], count: int) -> list[int]:
            places = range(len(known), len(known) + count)
            right = [*self.right, *[0] * count]  # beyond the answer, what is drafted is not used
            return [(right[place] + (place in self.wrong)) % vocab_size for place in places]

        return draft


@pytest.mark.parametrize(("notation", "protocol"), [("SM", "semi2k"), *slow_cases(("SM+LN+G", "cheetah"))])
def test_answers_under_tls(notation, protocol, tmp_path):
    """Cheetah's keys take most of the time, and the demonstration of tests/entropy_gpt/test_private.py has them."""
    authority = trustme.CA()
    ours, theirs = (tls_files(tmp_path, name, authority, "127.0.0.1") for name in ("server", "client"))
    with (
        serving(*make_offer(notation, protocol), ours) as served,
        contextlib.closing(Client(*served.server.address, theirs, SECONDS, protocol)) as client,
    ):
        answer, another = client.ask(Question(PROMPT, 2)), client.ask(Question(PROMPT))
        drafted = client.ask(Question(PROMPT, 2, drafts=Drafts(Oracle(answer.tokens))))
    assert answer.tokens == served.expected
    assert len(answer.logits) == 2
    assert sum(cost.total_bytes for cost in answer.steps) > 0
    # One connection carries many prompts: the set-up is paid once.
    assert another.tokens == served.expected[:1]
    assert another.set_up is answer.set_up
    assert len(answer.set_up) == 1
    # A draft that is right is verified with the prompt.
    assert drafted.tokens == served.expected
    assert drafted.verified == [(1, 1)]


@pytest.mark.slow
def test_a_request_that_is_none_is_refused_and_the_next_client_is_served(served):
    absurd = [
        *({"length": value} for value in (0, -1, 65, True, "4", 4.0, None, [4], 10**30, 10**4299)),
        *({"new_tokens": value} for value in (0, 9, True, "1", 62)),
        *({"answers": value} for value in (0, 5, False, "1")),
        {"new_tokens": 2, "answers": 2},
        {"length": 9, "answers": 9},
    ]
    for request in absurd:
        with contextlib.closing(greet(served, **request)) as channel:
            with pytest.raises(PrivateInferenceError, match="the peer refuses") as refused:
                channel.receive(10, ("accepted",))
            assert len(str(refused.value)) < 600
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2{}", b"\xff" * 100, b"\0\0\0\0"):
        with socket.create_connection(served.server.address, timeout=10) as raw:
            raw.sendall(content)
            with contextlib.suppress(ConnectionResetError):
                assert b"refusal" in raw.recv(1000)
    assert ask(served) == served.expected


@pytest.mark.parametrize(
    "changed",
    [
        *({"program": {"n_embd": value}} for value in ("x", -1, None, 10**9, 7)),
        *({"program": {name: "none of them"}} for name in ("ffn_type", "normalization", "attention_temperature")),
        {"program": {"n_layer": 1024, "n_embd": 2**16, "n_head": 1024}},
        *({"program": {"layer_norm_epsilon": value}} for value in (-1, "nan")),
        *({"program": {"pruned_ffn_layers": layers}} for layers in ([0, 0], [-1], [1], list(range(10**4)))),
        {"program": {"num_labels": 10**9}},
        *({"notation": value} for value in (None, ["a"])),
        {"program": None},
        {"settings": {"protocol": "none"}},
        *({"settings": {name: 10**9}} for name in ("fraction_bits", "exponential_squarings", "reciprocal_iterations")),
        {"versions": "\x1b[31m" * 1000},
    ],
)
def test_a_client_refuses_broken_terms_in_one_line(changed):
    offered = make_offer()[0].terms()
    parts = {name: {**offered[name], **part} if isinstance(part, dict) else part for name, part in changed.items()}
    terms = {"kind": "terms", **offered, **parts}
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with contextlib.closing(Channel(listener.accept()[0])) as channel:
                channel.receive(10, ("hello",))
                channel.send(terms)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(PrivateInferenceError, match=r"terms are broken|server runs|GB of memory") as refused:
            Client(*listener.getsockname(), None, SECONDS)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 700


@pytest.mark.slow
def test_a_busy_server_says_so_and_another_program_is_no_match(served):
    served.server.turns.longest = 0
    with contextlib.closing(greet(served)) as first, contextlib.closing(greet(served)) as second:
        refusals = []
        for channel in (first, second):
            try:
                channel.receive(10, ("accepted",))
                accepted = channel
            except PrivateInferenceError as error:
                refusals.append(str(error))
        (refusal,) = refusals
        assert "busy with other clients" in refusal
        served.server.turns.longest = 16
        accepted.send({"kind": "program", "digest": "another"})
        accepted.receive(30, ("program",))
        with pytest.raises(PrivateInferenceError, match="different programs"):
            accepted.receive(10, ("done",))
    assert served.said("different programs", 5)


@dataclass(frozen=True)
class Lie(Offer):
    """An offer whose terms are not those of its program."""

    part: str = ""

    def terms(self) -> dict:
        terms = super().terms()
        return terms | {"program": terms["program"] | {self.part: 2 * terms["program"][self.part]}}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vocab_size", "n_positions", "inner_size"])
def test_a_server_whose_terms_are_not_its_programs_gets_no_prompt(part):
    offer, _ = make_offer("SM+R")
    with serving(Lie(**vars(offer), part=part), []) as lying:
        with pytest.raises(PrivateInferenceError, match="made different programs of the same terms"):
            ask(lying, 1)
        assert lying.said("made different programs of the same terms", 10)
    assert not engines_here()


@pytest.mark.slow
def test_what_ails_the_clients_engine_is_not_the_servers_business(served):
    with contextlib.closing(Client(*served.server.address, None, SECONDS)) as client:

        def kill(event: dict):
            client._session._process._process.kill()

        with pytest.raises(PrivateInferenceError, match="this side's engine ended with status -9"):
            client.ask(Question(PROMPT), kill)
    assert served.said("the peer refuses: the client failed.", 10)


@pytest.mark.slow
def test_the_clients_tables_are_sent_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    offer, expected = make_offer()
    with serving(replace(offer, settings=PrivateSettings(embedding="client_table")), expected) as served:
        first, second = (ask_at(served.server.address) for _ in range(2))
    assert first.tokens == second.tokens == expected
    tables, keys = first.set_up
    size = sum(offer.weights[name].nbytes for name in ("wte", "wpe"))
    assert (tables.operation, tables.sent_bytes) == ("tables", 0)
    assert tables.received_bytes == size
    assert keys.total_bytes == pytest.approx(SET_UP_BYTES, rel=0.02)
    assert [step.operation for step in second.set_up] == [keys.operation]
    assert len([line for line in served.lines if "was sent the embeddings" in line]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True])
def test_public_embeddings_take_nothing(prepared, tmp_path):
    """Neither bytes nor steps, in one phase and in two, for prompts and for further tokens."""
    offer, expected = make_offer()
    torch.manual_seed(0)
    make_model("SM", n_layer=1).save_pretrained(tmp_path / "public")
    settings, checkpoint = PrivateSettings(embedding="public"), PublicCheckpoint("public")
    folders = {"server": tmp_path / "server", "client": tmp_path / "client"} if prepared else {}
    with (
        serving(
            replace(offer, settings=settings, checkpoint=checkpoint), expected, prepared=folders.get("server")
        ) as s,
        contextlib.closing(
            Client(
                *s.server.address,
                *(None, SECONDS),
                prepared=folders.get("client"),
                public_checkpoint=tmp_path / "public",
            )
        ) as client,
    ):
        if prepared:
            client.prepare(len(PROMPT), 2)
        answer = client.ask(Question(PROMPT, 2), require_prepared=prepared)
    assert answer.tokens == expected
    assert bool(answer.before) == prepared
    assert len(answer.set_up) == 1
    operations = {step.operation for step in (*answer.steps, *answer.before)}
    assert "head" in operations and "embedding" not in operations


@pytest.mark.slow
def test_a_client_that_wants_tables_where_none_are_sent_is_refused(served):
    with contextlib.closing(greet(served, tables=True)) as channel:
        channel.receive(10, ("accepted",))
        with pytest.raises(PrivateInferenceError, match="no embeddings are sent here"):
            channel.receive(30, ("program",))
    assert served.said("no embeddings are sent here", 5)


@pytest.mark.slow
def test_a_sampled_token_is_the_largest_with_the_clients_noise():
    offer, _ = make_offer()
    settings, tokens, random, expected = PrivateSettings(answer="sampled"), [*PROMPT], np.random.default_rng(7), []
    for _ in range(3):
        logits = emulate(offer.config, offer.weights, settings, np.array(tokens))
        noise = draw_noise(logits.shape, Sampling(9.0), random)
        expected.append(int((logits + noise).argmax()))
        tokens.append(expected[-1])
    with (
        serving(replace(offer, settings=settings), []) as served,
        contextlib.closing(Client(*served.server.address, None, SECONDS)) as client,
    ):
        answer = client.ask(Question(PROMPT, 3, sampling=Sampling(9.0, seed=7)))
        likely = client.ask(Question(PROMPT, 3))
    assert answer.tokens == expected != likely.tokens
    assert not answer.logits


@pytest.mark.slow
def test_what_ails_the_servers_engine_is_not_the_clients_business(served):
    weights = {name: weight for name, weight in served.server.offer.weights.items() if name != "head.bias"}
    with serving(replace(served.server.offer, weights=weights), []) as broken:
        with pytest.raises(PrivateInferenceError, match=r"^the peer refuses: the server failed\.$"):
            ask(broken, 1)
        assert broken.said("head.bias", 10)


@pytest.mark.slow
def test_a_client_that_is_killed_leaves_the_server_ready(served):
    client = run_here(ask_aloud, served.server.address[1])
    wait_for_line(client, "step")
    os.killpg(client.pid, signal.SIGKILL)
    client.communicate()
    assert served.said("ended early", 10)
    assert len([line for line in served.lines if "ended early" in line]) == 1
    assert eventually(lambda: not served.server.turns.active, 5)
    assert not engines_here()


@pytest.mark.slow
def test_a_server_that_is_killed_ends_the_client_and_its_own_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests leave and clear theirs at the same time
    server = run_here(serve_until_killed)
    port = int(server.stdout.readline())
    engines: list[psutil.Process] = []

    def kill(event: dict):
        if event["event"] == "step" and not engines:
            engines.extend(psutil.Process(server.pid).children(recursive=True))
            server.kill()

    with pytest.raises(PrivateInferenceError) as failure:
        ask_at(("127.0.0.1", port), on_event=kill)
    assert "\n" not in str(failure.value)
    assert "peer" in str(failure.value) or "broke off" in str(failure.value)
    server.communicate()
    assert engines
    assert eventually(lambda: not any(engine.is_running() for engine in engines), 10)
    assert not engines_here()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_closing_the_server_ends_the_inference():
    with serving(*make_offer()) as served, ThreadPoolExecutor(1) as pool:
        compiled = threading.Event()
        asked = pool.submit(ask, served, 1, on_event=lambda event: compiled.set())
        assert compiled.wait(SECONDS)
        start = time.monotonic()
        served.server.close()
        served.thread.join(20)
        assert not served.thread.is_alive()
        assert not served.server.turns.active
        with pytest.raises(PrivateInferenceError, match=r"peer|broke off"):
            asked.result()
        assert time.monotonic() - start < 30
    assert not engines_here()


def test_closing_the_server_ends_a_connection_that_says_nothing():
    with serving(*make_offer()) as served, contextlib.closing(connect(*served.server.address, None)) as channel:
        channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
        channel.receive(10, ("terms",))
        served.server.close()
        with pytest.raises(PrivateInferenceError, match="the peer"):
            channel.receive(1, ("accepted",))


def test_a_stream_of_another_session_is_refused(served):
    def try_stream(session: object):
        with contextlib.closing(connect(*served.server.address, None)) as channel:
            channel.send({"kind": "stream", "session": session, "direction": "to_server"})
            with pytest.raises(PrivateInferenceError, match="refuses: a stream belongs to no inference"):
                channel.receive(10, ("open",))

    try_stream("")
    with contextlib.closing(greet(served)) as asking:
        session = asking.receive(10, ("accepted",))["session"]
        for wrong in ("", session[:-1], session[::-1], session + "0", "é" * 64, None, 1, [session], {}):
            try_stream(wrong)
    assert eventually(lambda: not served.server.turns.active, 10)
    try_stream(session)


def test_a_client_that_is_refused_closes_its_connection(served):
    for prompt, new_tokens, reason in (
        (PROMPT, 100, "n_positions=64"),
        (PROMPT, 9, "the peer refuses: 9 answers are asked for; 8 is the most here"),
    ):
        client = Client(*served.server.address, None, SECONDS)
        with pytest.raises(PrivateInferenceError, match=reason):
            client.ask(Question(prompt, new_tokens))
        assert client.channel.connection.fileno() == -1


def out_of_range(offer: Offer, part: str, answer: str = "logits") -> Offer:
    """With bounds of the check that no number keeps."""
    bounds = np.full_like(offer.weights[bounds_name(part)], 1e-4)
    return replace(
        offer, weights=offer.weights | {bounds_name(part): bounds}, settings=replace(offer.settings, answer=answer)
    )


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["logits", "token"])
@pytest.mark.parametrize("part", CHECKED)
def test_an_answer_out_of_range_is_repeated_and_then_refused(served, part, answer):
    events: list[str] = []
    with serving(out_of_range(served.server.offer, part, answer), []) as doubtful:
        with pytest.raises(PrivateInferenceError, match="out of range 3 times"):
            ask(doubtful, 1, on_event=lambda event: events.append(event["event"]))
        assert doubtful.said("out of range 3 times", 10)
    assert events.count("repeat") == 3
    assert "token" not in events


@pytest.mark.slow
def test_answers_out_of_range_count_against_what_a_client_may_ask_for(served):
    offer = out_of_range(served.server.offer, LOGITS)
    with serving(offer, [], limits=replace(UNLIMITED, answers=2)) as strict:
        with pytest.raises(
            PrivateInferenceError,
            match=r"^the peer refuses: this answer would take 3 positions: 2 is the most here, with those of wrong "
            r"drafts and those that are computed again, out of range \(--max-new-tokens\)\.$",
        ):
            ask(strict, 1)
        assert strict.said("2 is the most here, with those of wrong drafts", 10)
    assert sum("out of range, and has it repeated" in line for line in strict.lines) == 2
    assert [use.positions for use in strict.server._accounts._uses["127.0.0.1"]] == [2]


@pytest.mark.slow
@pytest.mark.parametrize(("stops_at", "seconds"), [("accepted", 20), ("program", 60)])
def test_a_client_that_stops_holds_the_engine_for_a_bounded_time(served, stops_at, seconds):
    """A busy machine may take half a minute to compile a program."""
    with serving(served.server.offer, [], limits=replace(UNLIMITED, seconds=seconds)) as strict:
        started = time.monotonic()
        with contextlib.closing(greet(strict)) as channel:
            channel.receive(30, ("accepted",))
            if stops_at == "program":
                channel.send(channel.receive(seconds, ("program",)))
            assert strict.said(f"took {seconds} seconds, the most that this client has left here", 2 * seconds)
        assert time.monotonic() - started < 2 * seconds
        assert eventually(lambda: not strict.server.turns.active, 10)
    assert not engines_here()


def flood_server(port: int):
    """A client whose engine sends what nobody has asked for."""

    def send():
        from spu import libspu

        description = libspu.link.Desc()
        description.throttle_window_size = 0  # an honest one waits until it is asked
        for name, its_port in (("server", tunnel.local_port), ("client", own_port)):
            description.add_party(name, f"127.0.0.1:{its_port}")
        link = libspu.link.create_brpc(description, CLIENT)
        print("flooding", flush=True)
        while True:
            link.send(SERVER, b"x" * 2**22)

    channel = connect("127.0.0.1", port, None)
    channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
    channel.receive(30, ("terms",))
    channel.send({"kind": "request", "length": 4, "new_tokens": 1, "answers": 1})
    token, own_port = channel.receive(30, ("accepted",))["session"], free_port()
    tunnel = ClientTunnel(lambda: connect("127.0.0.1", port, None), token, own_port)
    channel.send(channel.receive(60, ("program",)))
    threading.Thread(target=send, daemon=True).start()
    with contextlib.suppress(PrivateInferenceError):
        channel.receive(120, ("done",))


@pytest.mark.slow
def test_a_flood_is_not_taken_into_memory(served):
    client = run_here(flood_server, served.server.address[1])
    try:
        wait_for_line(client, "flooding")
        (engine,) = engines_here()
        begin, most = engine.memory_info().rss, 0
        assert engine.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert engine.rlimit(psutil.RLIMIT_AS)[0] <= machine_memory() + RESERVED_BYTES * os.cpu_count()
        while not served.said("ended early", 0.2) and len(served.lines) < 2:
            with contextlib.suppress(psutil.NoSuchProcess):
                most = max(most, engine.memory_info().rss)
    finally:
        os.killpg(client.pid, signal.SIGKILL)
        client.communicate()
    assert served.said("sends more than its program does", 5)
    assert most - begin < 3 * SET_UP_ALLOWANCE


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
