"""Requests, terms, streams and programs that are refused, and who hears why."""

import contextlib
import socket
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import Channel, connect
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.program import CHECKED, LOGITS, bounds_name
from tests.waiting import eventually

from .serving import PROMPT, QUICK, SECONDS, ask, engines_here, greet, make_offer, serving


pytest.importorskip("spu")
pytestmark = pytest.mark.private


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
    offer, _ = make_offer("SM+R", QUICK)
    with serving(Lie(**vars(offer), part=part), []) as lying:
        with pytest.raises(PrivateInferenceError, match="made different programs of the same terms"):
            ask(lying, 1)
        assert lying.said("made different programs of the same terms", 10)
    assert not engines_here()


@pytest.mark.slow
def test_a_client_that_wants_tables_where_none_are_sent_is_refused(served):
    with contextlib.closing(greet(served, tables=True)) as channel:
        channel.receive(10, ("accepted",))
        with pytest.raises(PrivateInferenceError, match="no embeddings are sent here"):
            channel.receive(30, ("program",))
    assert served.said("no embeddings are sent here", 5)


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
        client = Client(*served.server.address, None, SECONDS, QUICK)
        with pytest.raises(PrivateInferenceError, match=reason):
            client.ask(Question(prompt, new_tokens))
        assert client.channel.connection.fileno() == -1


@pytest.mark.slow
def test_what_ails_the_clients_engine_is_not_the_servers_business(served):
    with contextlib.closing(Client(*served.server.address, None, SECONDS, QUICK)) as client:

        def kill(event: dict):
            client._session._process._process.kill()

        with pytest.raises(PrivateInferenceError, match="this side's engine ended with status -9"):
            client.ask(Question(PROMPT), kill)
    assert served.said("the peer refuses: the client failed.", 10)


@pytest.mark.slow
def test_what_ails_the_servers_engine_is_not_the_clients_business(served):
    weights = {name: weight for name, weight in served.server.offer.weights.items() if name != "head.bias"}
    with serving(replace(served.server.offer, weights=weights), []) as broken:
        with pytest.raises(PrivateInferenceError, match=r"^the peer refuses: the server failed\.$"):
            ask(broken, 1)
        assert broken.said("head.bias", 10)


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
