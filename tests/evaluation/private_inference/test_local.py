"""The engine's arithmetic and its protocols, all parties in one process."""

import numpy as np
import pytest
import torch

from tests.architectures import ARCHITECTURES, make_model


pytest.importorskip("spu")

from evaluation.private_inference.engine import EngineLog, compiled_digest
from evaluation.private_inference.local import infer_locally
from evaluation.private_inference.participant import compile_pass
from evaluation.private_inference.program import Span, prepare_weights
from evaluation.private_inference.settings import PrivateSettings


pytestmark = pytest.mark.private
LENGTH = 12


@pytest.fixture(scope="module")
def log() -> EngineLog:
    return EngineLog()


def prompts(count: int = 1) -> list[list[int]]:
    return np.random.default_rng(0).integers(2, 101, (count, LENGTH)).tolist()


def clear_logits(model, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("notation", ARCHITECTURES)
def test_fixed_point_keeps_the_answer(notation):
    model = make_model(notation)
    run = infer_locally(*prepare_weights(model), PrivateSettings("ref2k"), prompts(2), LENGTH)
    for tokens, logits in zip(prompts(2), run.answers, strict=True):
        clear = clear_logits(model, tokens)
        assert np.abs(logits - clear).max() < 0.005 * np.abs(clear).max() + 0.03
        assert (logits.argmax(-1) == clear.argmax(-1)).mean() > 0.9


@pytest.mark.parametrize("protocol", ["cheetah", "semi2k", "aby3"])
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_every_protocol_keeps_the_answer(notation, protocol, log):
    model = make_model(notation, n_layer=1)
    run = infer_locally(*prepare_weights(model), PrivateSettings(protocol), prompts(2), LENGTH, log)
    for tokens, logits in zip(prompts(2), run.answers, strict=True):
        clear = clear_logits(model, tokens)
        assert np.abs(logits - clear).max() < 0.005 * np.abs(clear).max() + 0.03
    first, second = (sum(step.total_bytes for step in steps) for steps in run.steps)
    assert first > 0
    assert second == pytest.approx(first, rel=0.2), "the set-up is paid apart"


def test_a_secure_comparison_gives_the_token_alone():
    model = make_model("SM+ScFuFFN", n_layer=1)
    for settings in (PrivateSettings("ref2k", answer="token"), PrivateSettings("cheetah", answer="token")):
        run = infer_locally(*prepare_weights(model), settings, prompts())
        assert run.answers[0].tolist() == [clear_logits(model, prompts()[0])[-1].argmax()]


def test_embeddings_looked_up_by_the_client_cost_no_product(log):
    model = make_model("SM+ScFuFFN", n_layer=1)
    settings = PrivateSettings(embedding="client_table")
    run = infer_locally(*prepare_weights(model), settings, prompts(), 1, log)
    assert np.abs(run.answers[0] - clear_logits(model, prompts()[0])[-1:]).max() < 0.1
    assert "embedding" not in {step.operation for step in run.steps[0]}


def test_the_economies_save_what_they_claim(log):
    model = make_model("SM+LN+G", n_layer=1)
    totals = {}
    for softmax, gelu in (("stock", "tanh"), ("efficient", "piecewise")):
        settings = PrivateSettings(softmax=softmax, gelu=gelu)
        run = infer_locally(*prepare_weights(model), settings, prompts(), LENGTH, log)
        totals[softmax] = sum(step.total_bytes for step in run.steps[0])
    assert totals["efficient"] < 0.75 * totals["stock"]


def test_the_digest_names_code_settings_and_order():
    config, _ = prepare_weights(make_model("SM"))
    other, _ = prepare_weights(make_model("SM+R"))
    settings = PrivateSettings()
    program = compile_pass(config, settings, Span(0, 4))
    same = compile_pass(config, settings, Span(0, 4))
    assert compiled_digest(program, settings) == compiled_digest(same, settings)
    others = [
        (compile_pass(config, settings, Span(0, 5)), settings),
        (compile_pass(other, settings, Span(0, 4)), settings),
        (program[:-1], settings),
        (program, PrivateSettings(fraction_bits=17)),
    ]
    for changed, with_settings in others:
        assert compiled_digest(changed, with_settings) != compiled_digest(program, settings)
