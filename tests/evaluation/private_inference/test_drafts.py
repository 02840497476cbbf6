"""Drafts that are verified: the same answers, what a server lets a client choose, and what it counts."""

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


pytest.importorskip("spu")

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties import local, party_process
from entropy_gpt.evaluation.private_inference.parties.client import Client, _read_positions
from entropy_gpt.evaluation.private_inference.parties.draft_model import DraftModel
from entropy_gpt.evaluation.private_inference.parties.drafts import (
    ACCEPTED,
    PROMPT,
    Drafts,
    expected_passes,
    least_positions,
    next_span,
    read_next,
    write_next,
)
from entropy_gpt.evaluation.private_inference.parties.job import Job, Request
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.local import run_parties
from entropy_gpt.evaluation.private_inference.parties.participant import Participant
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.sampling import GREEDY, Noise, Sampling, choose
from entropy_gpt.evaluation.private_inference.program.fixed_point import emulate
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT
from entropy_gpt.evaluation.private_inference.program.steps import Span
from tests.architectures import make_model
from tests.waiting import eventually

from .serving import QUICK, SECONDS, Oracle, Served, make_offer, serving


PROMPT_TOKENS = [17, 93, 5, 64]
NEW_TOKENS = 6


@given(
    length=st.integers(1, 9),
    new_tokens=st.integers(2, 20),
    drafts=st.integers(1, 19),
    keep=st.sampled_from([ACCEPTED, PROMPT]),
    right=st.lists(st.integers(0, 19), min_size=20, max_size=20),
)
def test_every_pass_of_an_honest_client_is_one_that_the_server_allows(length, new_tokens, drafts, keep, right):
    drafts = min(drafts, new_tokens - 1) if keep == ACCEPTED else new_tokens - 1
    span, known, passes = Span(0, length + drafts, 1 + drafts), 0, 0
    while span is not None:
        drafted = span.end - length - known
        known, passes = known + min(right[passes], drafted) + 1, passes + 1
        kept, span = span.end, next_span(length, new_tokens, known, drafts, keep)
        assert read_next(write_next(span), length, new_tokens, drafts, kept) == span
    assert known == new_tokens
    assert passes <= new_tokens


def walk(span: Span | None, new_tokens: int, drafts: int, keep: str, is_right: Sequence[bool]) -> list[Span]:
    """The passes of an answer of which it is known whether the draft of each token would be right."""
    length, known, passes = span.end - drafts, 0, []
    while span is not None:
        passes.append(span)
        drafted = is_right[known : span.end - length]
        known += ([*drafted, False].index(False)) + 1
        span = next_span(length, new_tokens, known, drafts, keep)
    return passes


@pytest.mark.parametrize(
    ("drafts", "keep", "acceptance"),
    [(0, ACCEPTED, 0.3), (2, ACCEPTED, 0.3), (2, ACCEPTED, 0.0), (5, ACCEPTED, 1.0), (5, PROMPT, 0.7)],
)
def test_expected_passes_are_those_of_all_answers_by_how_probable_they_are(drafts, keep, acceptance):
    first, expected = Span(0, 4 + drafts, 1 + drafts), Counter()
    for is_right in itertools.product((False, True), repeat=NEW_TOKENS):
        probability = math.prod(acceptance if right else 1 - acceptance for right in is_right)
        for span in walk(first, NEW_TOKENS, drafts, keep, is_right):
            expected[span] += probability
    found = expected_passes(first, NEW_TOKENS, drafts, keep, acceptance)
    assert found == pytest.approx({span: count for span, count in expected.items() if count})


def test_long_answers_have_the_tokens_a_pass_that_leviathan_has():
    found = expected_passes(Span(0, 12, 9), 4000, 8, ACCEPTED, 0.8)
    assert 4000 / sum(found.values()) == pytest.approx((1 - 0.8**9) / (1 - 0.8), rel=1e-3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes(7),
        bytes(9),
        *(write_next(Span(*wanted)) for wanted in ((3, 1), (0, 4), (7, 1), (5, 4), (6, 3), (2**31, 1), (4, 2**31))),
    ],
)
def test_a_server_refuses_another_pass(content):
    """Of a prompt of 4 tokens and an answer of 5, with up to 2 drafts, where 6 tokens are kept."""
    with pytest.raises(PrivateInferenceError, match=r"the client('s word| wants)"):
        read_next(content, 4, 5, 2, 6)
    assert read_next(write_next(Span(6, 2)), 4, 5, 2, 6) == Span(6, 2, 2)


@pytest.mark.parametrize("right", [0, 2])
def test_an_answer_takes_no_more_positions_than_are_granted(right):
    drafts, granted = 3, least_positions(4, NEW_TOKENS, 1, 3)
    known, taken = right + 1, 1 + drafts
    while known < NEW_TOKENS:
        most = min(drafts, granted - taken - (NEW_TOKENS - known))
        span = next_span(4, NEW_TOKENS, known, most, ACCEPTED)
        known, taken = known + min(right, span.length - 1) + 1, taken + span.length
    assert taken <= granted


@given(new_tokens=st.integers(2, 20), granted=st.integers(20, 500))
def test_where_the_prompt_alone_is_kept_a_client_begins_only_what_it_can_end(new_tokens, granted):
    asked = Question(PROMPT_TOKENS, new_tokens, drafts=Drafts(Oracle([]), 8, PROMPT)).public
    span, taken, known = Span(0, 4 + asked["drafts"], 1 + asked["drafts"]), 0, 0
    while span is not None:  # all drafts are wrong
        taken, known = taken + span.answers, known + 1
        span = next_span(4, new_tokens, known, asked["drafts"], PROMPT)
    if granted < least_positions(**asked):
        return
    if taken <= granted:
        assert _read_positions({"positions": granted}, asked, PROMPT) == granted
    else:
        with pytest.raises(UserError, match=rf"may need {taken}: ask with --draft-keep accepted, or for fewer tokens"):
            _read_positions({"positions": granted}, asked, PROMPT)
    assert _read_positions({"positions": granted}, asked, ACCEPTED) == granted


def continue_naively(model, known: list[int], count: int, sampling: Sampling) -> list[int]:
    """Without a cache."""
    tokens = [*PROMPT_TOKENS, *known]
    for row in Noise(sampling, model.config.vocab_size).rows(len(known), count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
        tokens.append(choose(logits, sampling, row))
    return tokens[-count:]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(30.0, top_k=20, seed=3)])
def test_a_draft_model_goes_on_from_what_is_known_whatever_it_drafted_before(sampling):
    torch.manual_seed(0)
    model = make_model("SM+LN+G")
    vocabulary = model.config.vocab_size
    draft = DraftModel(model).begin(PROMPT_TOKENS, sampling, vocabulary)
    right = continue_naively(model, [], 12, sampling)
    another = [*right[:4], (right[4] + 1) % vocabulary]
    assert len({*right}) > 1
    assert draft([], 6) == right[:6]
    assert draft(another, 3) == continue_naively(model, another, 3, sampling)
    assert draft(right[:5], 7) == right[5:]


def test_a_draft_model_drafts_beyond_its_positions_and_its_vocabulary():
    torch.manual_seed(0)
    model = make_model("SM", n_positions=8)
    draft = DraftModel(model).begin([*PROMPT_TOKENS, 200], GREEDY, 300)
    drafted = draft([], 9)
    assert len(drafted) == 9
    assert max(drafted) < model.config.vocab_size
    assert draft(drafted[:2], 7) == drafted[2:]


def positions_of(served: Served) -> list[int]:
    return [use.positions for use in served.server._accounts._uses["127.0.0.1"]]


class Doubtful(PartyProcess):
    """Finds the first try of the second pass out of range."""

    tried = 0

    def _was_out_of_range(self, index: int) -> bool:
        found, self.tried = super()._was_out_of_range(index), self.tried + 1
        return found or self.tried == 2


@pytest.mark.private
def test_a_pass_out_of_range_is_computed_anew_from_the_prompt_on(monkeypatch):
    monkeypatch.setattr(party_process, "EngineLog", lambda: None)
    monkeypatch.setattr(local, "TIMEOUT_MS", 60_000)  # if one party fails, the other one waits for it
    offer, _ = make_offer("SM", "semi2k")
    settings, passes = offer.settings, []
    tokens = np.array(PROMPT_TOKENS)
    for _ in range(4):
        tokens = np.append(tokens, emulate(offer.config, offer.weights, settings, tokens).argmax())
    right = tokens[len(PROMPT_TOKENS) :].tolist()

    def take_part(link) -> list[int]:
        job = Job(link.rank, ProgramConfig.of(offer.config), settings, SECONDS)
        lines: list[bytes] = []
        draft = Oracle(right, {1}).begin(PROMPT_TOKENS, GREEDY, offer.config.vocab_size)

        def tell(event: dict):
            if event["event"] == "draft":
                lines.append(json.dumps(draft(event["known"], event["count"])).encode())
            elif event["event"] == "pass" and link.rank == CLIENT:
                passes.append(event["answers"])

        process = Doubtful(job, tell)
        process.tables = {}
        process.link, own = link, {"prompt": PROMPT_TOKENS, "positions": 99} if link.rank == CLIENT else {}
        process.participant = Participant(link, job.config, settings, offer.weights)
        process.prepare(Request(len(PROMPT_TOKENS), 4, 1, drafts=2, **own))
        process.answer(lambda: lines.pop())
        return process.chosen

    server, client = run_parties(settings, take_part)
    assert (server, client) == ([], right)
    assert passes == [3, 2, 2]


# Of 6 tokens, drafts of the tokens 1 and 2 are wrong.
PASSES = {ACCEPTED: [(3, 1), (3, 0), (2, 2)], PROMPT: [(5, 1), (3, 0), (2, 2)]}
POSITIONS = {ACCEPTED: 4 + 4 + 3, PROMPT: 6 + 5 + 5}


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize(
    ("protocol", "answer", "sampling"),
    [
        (QUICK, "token", GREEDY),
        (QUICK, "logits", Sampling(9.0, top_k=30, seed=7)),
        ("cheetah", "sampled", Sampling(9.0, seed=7)),
    ],
)
def test_the_answer_is_that_without_drafts(protocol, answer, sampling):
    offer, _ = make_offer("SM", protocol)
    offer, passes = replace(offer, settings=replace(offer.settings, answer=answer)), []
    with (
        serving(offer, [], limits=UNLIMITED) as served,
        contextlib.closing(Client(*served.server.address, None, SECONDS, protocol)) as client,
    ):
        plain = client.ask(Question(PROMPT_TOKENS, NEW_TOKENS, sampling=sampling))
        for keep in (ACCEPTED, PROMPT):
            drafts = Drafts(Oracle(plain.tokens, {1, 2}), 3, keep)

            def note(event: dict):
                if event["event"] == "pass":
                    passes.append(event["bytes"])

            passes.clear()
            question = Question(PROMPT_TOKENS, NEW_TOKENS, sampling=sampling, drafts=drafts)
            drafted = client.ask(question, note)
            assert drafted.tokens == plain.tokens
            assert drafted.verified == PASSES[keep]
            assert eventually(lambda keep=keep: positions_of(served)[-1] == POSITIONS[keep], 30)
            assert len(drafted.logits) == len(plain.logits)
            for found, expected in zip(drafted.logits, plain.logits, strict=True):
                assert np.abs(found - expected).max() < 0.01
        # All passes after the first are alike where the prompt alone is kept: they show nothing.
        assert len(passes) == 3 and passes[1] == passes[2]
        assert client.ask(Question(PROMPT_TOKENS, 2, sampling=sampling)).tokens == plain.tokens[:2]
