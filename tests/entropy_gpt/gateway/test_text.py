"""The text of answers, token by token, is that of the whole; it ends before what it has to stop at."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropy_gpt.evaluation.private_inference.parties.sampling import Sampling, choose, draw_noise
from entropy_gpt.gateway.text import AnswerText, Piece
from entropy_gpt.training.tokenizer import train_tokenizer


WORDS = train_tokenizer(["def main(self):\n    return 'caf\u00e9 \u65e5\u672c'\n" * 20], 300)
TEXTS = st.text(alphabet="def main(slf):\n'\u00e9\u65e5\U0001f600", min_size=1, max_size=30)


def stream(text: AnswerText, tokens: list[int], logits=None) -> list[Piece]:
    return [*(text.add(token, logits) for token in tokens), text.finish()]


@given(TEXTS)
def test_pieces_add_up_to_the_text(text):
    pieces = stream(AnswerText(WORDS), WORDS(text)["input_ids"])
    assert "".join(piece.text for piece in pieces) == text
    assert not any("\ufffd" in piece.text for piece in pieces)


@given(
    TEXTS,
    st.lists(st.text(alphabet="def main(\u00e9\u65e5\U0001f600", min_size=1, max_size=3), min_size=1, max_size=2),
)
def test_it_ends_before_the_first_stop_that_is_complete(text, stops):
    answer = AnswerText(WORDS, stops)
    shown = "".join(piece.text for piece in stream(answer, WORDS(text)["input_ids"]))
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert answer.ended == any(stop in text for stop in stops)
    assert answer.ended or shown == text


def test_a_stop_whose_letter_comes_in_parts_is_not_shown():
    answer = AnswerText(WORDS, ["ab\U0001f600"])
    shown = "".join(piece.text for piece in stream(answer, WORDS("ab\U0001f600")["input_ids"]))
    assert (shown, answer.ended) == ("", True)


def test_it_ends_at_the_end_of_the_text():
    answer = AnswerText(WORDS)
    tokens = WORDS("def")["input_ids"]
    shown = "".join(piece.text for piece in stream(answer, [*tokens, WORDS.eos_token_id, *tokens]))
    assert (shown, answer.ended) == ("def", True)


def test_probabilities_are_those_of_the_logits():
    prompt, tokens = WORDS("def main")["input_ids"], WORDS("(self):")["input_ids"]
    answer, logits = AnswerText(WORDS, logprobs=2), np.zeros(len(WORDS), np.float32)
    logits[prompt] = 3.0
    echoed = answer.echo(prompt, np.tile(logits, (len(prompt), 1)))
    assert echoed.text == "def main"
    found = [
        *echoed.probabilities,
        *(each for piece in stream(answer, tokens, logits) for each in piece.probabilities),
    ]
    assert "".join(each.token for each in found) == "def main(self):"
    assert [each.offset for each in found] == [
        len("".join(each.token for each in found[:i])) for i in range(len(found))
    ]
    assert (found[0].logprob, found[0].top) == (None, None)
    expected = logits - np.log(np.exp(logits).sum())
    assert [each.logprob for each in found[1:]] == pytest.approx(
        [expected[t] for t in [*prompt[1:], *tokens]], abs=1e-5
    )
    for each in found[1:]:
        assert each.top[each.token] == each.logprob
        assert max(each.top.values()) == pytest.approx(expected.max(), abs=1e-5)


def test_a_part_of_a_letter_has_a_name_of_its_own():
    tokens = WORDS("\U0001f600")["input_ids"]
    assert len(tokens) == 4
    pieces = stream(AnswerText(WORDS, logprobs=0), tokens, np.zeros(len(WORDS), np.float32))
    assert len({each.token for piece in pieces for each in piece.probabilities}) == 4


def test_parts_of_a_letter_begin_where_it_does_and_stay_before_a_stop():
    tokens = WORDS("a\U0001f600(")["input_ids"]
    pieces = stream(AnswerText(WORDS, ["("], logprobs=0), tokens, np.zeros(len(WORDS), np.float32))
    found = [each.offset for piece in pieces for each in piece.probabilities]
    assert found == [0, *[1] * (len(tokens) - 2)]
    echoed = AnswerText(WORDS, logprobs=0).echo(tokens, np.zeros((len(tokens), len(WORDS)), np.float32))
    assert [each.offset for each in echoed.probabilities] == [0, *[1] * (len(tokens) - 2), 2]


def test_the_end_of_the_text_has_its_probability():
    logits = np.zeros(len(WORDS), np.float32)
    logits[WORDS.eos_token_id] = 5
    answer = AnswerText(WORDS, logprobs=1)
    tokens = [*WORDS("def")["input_ids"], WORDS.eos_token_id]
    pieces = stream(answer, tokens, logits)
    found = [each for piece in pieces for each in piece.probabilities]
    assert len(found) == len(answer.tokens) == len(tokens)
    assert (found[-1].token, found[-1].offset) == (WORDS.eos_token, 3)
    assert found[-1].logprob == max(found[-1].top.values())


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_errors_of_fixed_point_hardly_change_what_a_seed_draws(top_p):
    generator, sampling, changed = np.random.default_rng(0), Sampling(1.5, top_p=top_p), 0
    for seed in range(100):
        logits = generator.normal(0, 2, 5_000)
        error = generator.normal(0, 1e-3, logits.shape)
        noise = draw_noise(logits.shape, sampling, np.random.default_rng(seed))
        drawn = {choose(given, sampling, noise) for given in (logits, logits + error)}
        changed += len(drawn) > 1
    assert changed <= 1


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [1, 0, 0, 0]),
        (Sampling(1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, top_p=0.0), [1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.5), [1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.6), [0.625, 0.375, 0, 0]),
        (Sampling(0.5), [25 / 36.5, 9 / 36.5, 2.25 / 36.5, 0.25 / 36.5]),
        (Sampling(1e-9), [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling, expected):
    generator = np.random.default_rng(0)
    drawn = [choose(LOGITS, sampling, draw_noise(LOGITS.shape, sampling, generator)) for _ in range(4000)]
    assert np.bincount(drawn, minlength=4) / len(drawn) == pytest.approx(expected, abs=0.03)
