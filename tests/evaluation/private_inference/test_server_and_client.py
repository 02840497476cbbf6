"""A server and a client with engines of their own: the right answer, and what they need for it."""

import contextlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import trustme

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import SET_UP_BYTES
from entropy_gpt.evaluation.private_inference.parties.channel import connect
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.drafts import Drafts
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling, draw_noise
from entropy_gpt.evaluation.private_inference.parties.tables import PublicCheckpoint
from entropy_gpt.evaluation.private_inference.parties.terms import PROTOCOL_VERSION
from entropy_gpt.evaluation.private_inference.program.fixed_point import emulate
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from tests.architectures import make_model
from tests.slow import slow_cases

from .serving import PROMPT, QUICK, ROOT, SECONDS, Oracle, ask_at, make_offer, serving
from .test_channel import tls_files


pytest.importorskip("spu")
pytestmark = pytest.mark.private


def test_an_engines_process_needs_neither_torch_nor_transformers():
    code = "import sys, entropy_gpt.evaluation.private_inference.parties.party_process; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets"} & {*imported.stdout.split()}


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
    if protocol == "cheetah":
        assert answer.set_up[0].total_bytes == pytest.approx(SET_UP_BYTES, rel=0.02)
    # A draft that is right is verified with the prompt.
    assert drafted.tokens == served.expected
    assert drafted.verified == [(1, 1)]


@pytest.mark.slow
def test_the_clients_tables_are_sent_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    offer, expected = make_offer()
    with serving(replace(offer, settings=PrivateSettings(QUICK, embedding="client_table")), expected) as served:
        first, second = (ask_at(served.server.address) for _ in range(2))
    assert first.tokens == second.tokens == expected
    tables, keys = first.set_up
    size = sum(offer.weights[name].nbytes for name in ("wte", "wpe"))
    assert (tables.operation, tables.sent_bytes) == ("tables", 0)
    assert tables.received_bytes == size
    assert [step.operation for step in second.set_up] == [keys.operation]
    assert len([line for line in served.lines if "was sent the embeddings" in line]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("prepared", "protocol"), [(False, QUICK), (True, "cheetah")])
def test_public_embeddings_take_nothing(prepared, protocol, tmp_path):
    """Neither bytes nor steps, in one phase and in two, for prompts and for further tokens."""
    offer, expected = make_offer()
    torch.manual_seed(0)
    make_model("SM", n_layer=1).save_pretrained(tmp_path / "public")
    settings, checkpoint = PrivateSettings(protocol, embedding="public"), PublicCheckpoint("public")
    folders = {"server": tmp_path / "server", "client": tmp_path / "client"} if prepared else {}
    with (
        serving(
            replace(offer, settings=settings, checkpoint=checkpoint), expected, prepared=folders.get("server")
        ) as s,
        contextlib.closing(
            Client(
                *s.server.address,
                *(None, SECONDS, protocol),
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
def test_a_sampled_token_is_the_largest_with_the_clients_noise():
    offer, _ = make_offer()
    settings, random = PrivateSettings(QUICK, answer="sampled"), np.random.default_rng(7)
    tokens, expected = [*PROMPT], []
    for _ in range(3):
        logits = emulate(offer.config, offer.weights, settings, np.array(tokens))
        noise = draw_noise(logits.shape, Sampling(9.0), random)
        expected.append(int((logits + noise).argmax()))
        tokens.append(expected[-1])
    with (
        serving(replace(offer, settings=settings), []) as served,
        contextlib.closing(Client(*served.server.address, None, SECONDS, QUICK)) as client,
    ):
        answer = client.ask(Question(PROMPT, 3, sampling=Sampling(9.0, seed=7)))
        likely = client.ask(Question(PROMPT, 3))
    assert answer.tokens == expected != likely.tokens
    assert not answer.logits


def test_closing_the_server_ends_a_connection_that_says_nothing():
    with serving(*make_offer()) as served, contextlib.closing(connect(*served.server.address, None)) as channel:
        channel.send({"kind": "hello", "version": PROTOCOL_VERSION})
        channel.receive(10, ("terms",))
        served.server.close()
        with pytest.raises(PrivateInferenceError, match="the peer"):
            channel.receive(1, ("accepted",))
