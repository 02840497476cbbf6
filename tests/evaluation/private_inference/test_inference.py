"""A model asked in the clear, emulated, in one process and between two: one kind of result, and the same answer."""

import re
import sys

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference import inference
from entropy_gpt.evaluation.private_inference.inference import MODES, NETWORKS, InferenceResult, PrivateModel
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import BOUNDLESS
from tests.architectures import make_model


SIZES = {"n_layer": 1, "n_embd": 32}
VOCABULARY = 101
PROMPTS = np.random.default_rng(0).integers(2, VOCABULARY, (2, 8)).tolist()
UNLIKE_PROMPTS = [*PROMPTS, PROMPTS[0][:3]]


@pytest.fixture
def private() -> PrivateModel:
    return PrivateModel(make_model("SM+ScFuFFN", **SIZES))


def clear_logits(model, prompt: list[int], answers: int) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -answers:].numpy()


def check_answers(result: InferenceResult, plaintext: InferenceResult):
    for found, clear in zip(result.answers, plaintext.answers, strict=True):
        assert (found.shape, found.dtype) == (clear.shape, clear.dtype)
        assert np.abs(found - clear).max() < 0.005 * np.abs(clear).max() + 0.03


@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_plaintext_is_the_model_and_emulated_is_near(notation):
    model = make_model(notation, **SIZES)
    private = PrivateModel(model)
    plaintext = private.infer(UNLIKE_PROMPTS, "plaintext", answers=3)
    for prompt, logits in zip(UNLIKE_PROMPTS, plaintext.answers, strict=True):
        assert (logits.shape, logits.dtype) == ((3, VOCABULARY), np.float32)
        np.testing.assert_allclose(logits, clear_logits(model, prompt, 3), atol=1e-4)
    emulated = private.infer(UNLIKE_PROMPTS, "emulated", answers=3)
    check_answers(emulated, plaintext)
    assert (plaintext.mode, emulated.mode) == ("plaintext", "emulated")
    assert plaintext.costs is emulated.costs is None
    assert plaintext.seconds > 0 and emulated.seconds > 0


def test_a_gpt2_is_asked_as_it_was_when_it_was_given(tmp_path):
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    gpt2.save_pretrained(tmp_path)
    model = load_language_model(tmp_path).train()
    private = PrivateModel(model)
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    plaintext = private.infer(torch.tensor(PROMPTS), "plaintext")
    for prompt, logits in zip(PROMPTS, plaintext.answers, strict=True):
        np.testing.assert_allclose(logits, clear_logits(gpt2, prompt, 1), atol=1e-4)
    check_answers(private.infer(PROMPTS, "emulated"), plaintext)


@pytest.mark.parametrize(
    ("protocol", "mode", "possible"),
    [
        ("cheetah", "three_party", MODES),
        ("semi2k", "", MODES),
        ("aby3", "two_party", ("plaintext", "emulated", "in_process")),
        ("ref2k", "two_party", ("plaintext", "emulated", "in_process")),
    ],
)
def test_a_mode_that_the_protocol_has_not_is_refused_with_those_that_it_has(protocol, mode, possible):
    private = PrivateModel(make_model("SM", **SIZES), PrivateSettings(protocol))
    assert private.modes == possible
    message = f"mode='{mode}' is not possible with the protocol {protocol}, which has {', '.join(possible)}."
    with pytest.raises(PrivateInferenceError, match=f"^{re.escape(message)}$"):
        private.infer(PROMPTS, mode)


@pytest.mark.parametrize(
    ("prompt", "answers", "message"),
    [
        ([2, 3], 0, "answers=0 is no positive number"),
        ([2, 3], 3, "answers=3 positions are not possible with 2 tokens"),
        ([], 1, "0 tokens are not possible"),
        ([2] * 65, 1, "65 tokens are not possible: this model has n_positions=64"),
        ([2, VOCABULARY], 1, f"token {VOCABULARY} is not one of the model's, which go from 0 to {VOCABULARY - 1}"),
        ([-1], 1, "token -1 is not one of the model's"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_what_the_model_can_not_answer_is_refused_alike_in_every_mode(mode, prompt, answers, message, private):
    with pytest.raises(PrivateInferenceError, match=message):
        private.infer([[2, 3, 4], prompt], mode, answers)


def test_a_model_is_audited_before_an_engine_answers(private, monkeypatch):
    offers: list[Offer] = []

    def serve(offer: Offer):
        offers.append(offer)
        raise PrivateInferenceError("enough")

    monkeypatch.setattr(inference, "serve_on_loopback", serve)
    monkeypatch.setattr(inference, "check_engine", lambda: None)
    with pytest.raises(PrivateInferenceError, match="enough"):
        private.infer(PROMPTS, "two_party")
    bounds = [weight for name, weight in offers[0].weights.items() if name.startswith("bounds.")]
    assert bounds and all(bound.max() < BOUNDLESS for bound in bounds)
    private = PrivateModel(make_model("SM+ScFuFFN", **SIZES), PrivateSettings(fraction_bits=11))
    with pytest.raises(PrivateInferenceError, match="does not fit the ring: logits: rounding makes errors"):
        private.infer(PROMPTS, "two_party")


def test_settings_without_a_comparison_are_refused():
    with pytest.raises(PrivateInferenceError, match="answer='token' can't be compared: use answer='logits'"):
        PrivateModel(make_model("SM", **SIZES), PrivateSettings(answer="token"))
    with pytest.raises(PrivateInferenceError, match="embedding='public' is for a client that has a copy"):
        PrivateModel(make_model("SM", **SIZES), PrivateSettings(embedding="public"))


@pytest.mark.parametrize("mode", ["in_process", "two_party"])
def test_without_the_engine_it_says_what_to_install(mode, private, monkeypatch):
    monkeypatch.setitem(sys.modules, "spu", None)
    with pytest.raises(PrivateInferenceError, match=r"pip install 'entropy-gpt\[private\]'"):
        private.infer(PROMPTS, mode)


@pytest.mark.private
class TestEngine:
    @pytest.fixture(autouse=True)
    def _engine(self):
        pytest.importorskip("spu")

    def test_one_process_and_two_answer_alike_and_tell_their_costs(self):
        private = PrivateModel(make_model("SM", **SIZES), PrivateSettings("semi2k"))
        prompts = PROMPTS[:1]
        plaintext = private.infer(prompts, "plaintext", answers=2)
        costs = {}
        for mode in ("in_process", "two_party"):
            result = private.infer(prompts, mode, answers=2)
            check_answers(result, plaintext)
            (costs[mode],) = result.costs
            assert (costs[mode].notation, costs[mode].context, costs[mode].answers) == ("SM", 8, 2)
            assert result.seconds > costs[mode].seconds > 0
            assert costs[mode].set_up_bytes > 0
        assert {mode: cost.network for mode, cost in costs.items()} == NETWORKS
        assert costs["two_party"].total_bytes == pytest.approx(costs["in_process"].total_bytes, rel=0.1)

    @pytest.mark.slow
    @pytest.mark.parametrize("protocol", ["aby3", "ref2k"])
    def test_protocols_that_have_no_two_parties_run_in_one_process(self, protocol):
        private = PrivateModel(make_model("SM", **SIZES), PrivateSettings(protocol))
        result = private.infer(UNLIKE_PROMPTS, "in_process", answers=2)
        check_answers(result, private.infer(UNLIKE_PROMPTS, "plaintext", answers=2))
        assert [cost.context for cost in result.costs] == [8, 8, 3]
        assert all((cost.total_bytes > 0) == (protocol == "aby3") for cost in result.costs)
