"""The engine's arithmetic and its protocols, all parties in one process."""

import numpy as np
import pytest
import torch

from tests.architectures import make_model
from tests.slow import slow_but


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.parties.engine import EngineLog, compiled_digest
from entropy_gpt.evaluation.private_inference.parties.local import infer_locally, run_parties
from entropy_gpt.evaluation.private_inference.parties.participant import Participant, compile_pass
from entropy_gpt.evaluation.private_inference.program.program import CHECKED, OUT_OF_RANGE, bounds_name
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights


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


@pytest.mark.parametrize("notation", slow_but(["SM+LN+G"], ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"]))
def test_fixed_point_keeps_the_answer(notation):
    model = make_model(notation, n_layer=1)
    run = infer_locally(*prepare_weights(model), PrivateSettings("ref2k"), prompts(2), LENGTH)
    for tokens, logits in zip(prompts(2), run.answers, strict=True):
        clear = clear_logits(model, tokens)
        assert np.abs(logits - clear).max() < 0.005 * np.abs(clear).max() + 0.03
        assert (logits.argmax(-1) == clear.argmax(-1)).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notation", "protocol"),
    [
        *(("SM+LN+G", "semi2k"), ("SM+LN+G", "aby3"), ("EReg(SM(t)+ScFuFFN)", "cheetah")),
        *(("EReg(SM(t)+ScFuFFN)", "aby3"), ("Pow4(t_h)+ScFuFFN", "cheetah")),
    ],
)
def test_every_protocol_keeps_the_answer(notation, protocol, log):
    model = make_model(notation, n_layer=1)
    run = infer_locally(*prepare_weights(model), PrivateSettings(protocol), prompts(2), LENGTH, log)
    for tokens, logits in zip(prompts(2), run.answers, strict=True):
        clear = clear_logits(model, tokens)
        assert np.abs(logits - clear).max() < 0.005 * np.abs(clear).max() + 0.03
    first, second = (sum(step.total_bytes for step in steps) for steps in run.steps)
    assert first > 0
    assert second == pytest.approx(first, rel=0.2), "the set-up is paid apart"


@pytest.mark.slow
@pytest.mark.parametrize(("protocol", "answer"), [("ref2k", "token"), ("cheetah", "token"), ("cheetah", "sampled")])
def test_embeddings_looked_up_by_the_client_and_a_secure_comparison(protocol, answer, log):
    model = make_model("SM+ScFuFFN", n_layer=1)
    settings = PrivateSettings(protocol, embedding="client_table", answer=answer)
    run = infer_locally(*prepare_weights(model), settings, prompts(), 1, log)
    assert run.answers[0].tolist() == [clear_logits(model, prompts()[0])[-1].argmax()]
    operations = {step.operation for step in run.steps[0]}
    assert "embedding" not in operations
    assert "argmax" in operations


@pytest.mark.parametrize("protocol", slow_but(["ref2k"], ["ref2k", "cheetah", "semi2k", "aby3"]))
def test_the_check_says_whether_numbers_are_out_of_range(protocol):
    """Of weights as they are, and with bounds of each part that no number keeps."""
    (config, weights), settings = prepare_weights(make_model("SM", n_layer=1)), PrivateSettings(protocol)
    span, (tokens,) = Span(0, LENGTH), prompts()
    program = compile_pass(config, settings, span)

    def take_part(link) -> tuple:
        participant, found = Participant(link, config, settings, weights), []
        for part in (None, *CHECKED):
            bounds = {bounds_name(part): np.full_like(weights[bounds_name(part)], 1e-4)} if part else {}
            for name in map(bounds_name, CHECKED) if link.rank == SERVER else ():
                participant.party.set_own(name, (weights | bounds)[name])
            given = client_inputs(config, settings, span, tokens, weights) if participant.is_client else {}
            participant.infer(program, span, given)
            found.append(participant.party.share(OUT_OF_RANGE))
        return participant.party, found

    (party, *_), shares = zip(*run_parties(settings, take_part), strict=True)
    found = [bool(party.reconstruct(list(parts))) for parts in zip(*shares, strict=True)]
    assert found == [False] + [True] * len(CHECKED)


def test_the_digest_names_code_settings_and_order():
    config, _ = prepare_weights(make_model("SM", n_layer=1))
    other, _ = prepare_weights(make_model("SM+R", n_layer=1))
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
