"""The process of an engine: what it is given through its pipes, and the passes of an answer."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from entropy_gpt.evaluation.private_inference.parties import party_process
from entropy_gpt.evaluation.private_inference.parties.job import (
    Job,
    Request,
    read_array,
    read_arrays,
    write_array,
    write_arrays,
)
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.sampling import Noise, Sampling
from entropy_gpt.evaluation.private_inference.program.program import NOISE, weight_shapes
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span
from tests.waiting import eventually

from .serving import make_offer


class TestWeights:
    def test_they_go_through_a_pipe_as_they_are(self, program_config):
        weights = make_offer()[0].weights
        reading, writing = map(os.fdopen, os.pipe(), ("rb", "wb"))

        def write():
            with writing:
                write_arrays(weights, weight_shapes(program_config), writing)

        threading.Thread(target=write, daemon=True).start()
        with reading:
            read = read_arrays(reading, weight_shapes(program_config))
            assert reading.read() == b""
        assert [*read] and all(np.array_equal(read[name], weights[name]) for name in read)

    def test_a_pipe_that_ends_early_is_noticed(self, program_config, tmp_path):
        (tmp_path / "half").write_bytes(bytes(1000))
        with (tmp_path / "half").open("rb") as half, pytest.raises(EOFError):
            read_arrays(half, weight_shapes(program_config))

    def test_other_weights_are_not_sent(self, program_config, tmp_path):
        weights = make_offer()[0].weights
        with (tmp_path / "sink").open("wb") as sink:
            with pytest.raises(KeyError):
                write_arrays({}, weight_shapes(program_config), sink)
            with pytest.raises(ValueError, match="wte is"):
                write_arrays({**weights, "wte": weights["wte"].T}, weight_shapes(program_config), sink)

    def test_logits_come_back_as_part_of_an_event(self):
        logits = np.arange(6, dtype=np.float64).reshape(2, 3)
        assert np.array_equal(read_array(write_array(logits)), logits)


class TestPasses:
    def test_each_is_compiled_while_the_one_before_runs(self, monkeypatch, program_config):
        compiled: list[int] = []
        ran: list[tuple[int, int]] = []
        monkeypatch.setattr(party_process, "EngineLog", lambda: None)
        monkeypatch.setattr(party_process, "compile_pass", lambda config, settings, span: compiled.append(span) or [])
        monkeypatch.setattr(party_process, "compiled_digest", lambda program, settings: "00")
        process = PartyProcess(Job(SERVER, program_config, PrivateSettings(), 60), lambda event: None)
        monkeypatch.setattr(process, "_compare", lambda program: None)

        def run(index: int, span: Span, program: list):
            eventually(lambda: len(compiled) == min(index + 2, 3))
            ran.append((index, len(compiled)))

        monkeypatch.setattr(process, "_answer", run)
        process.prepare(Request(4, 3, 1))
        assert len(compiled) == 1
        process.answer(lambda: b"")
        assert ran == [(0, 2), (1, 3), (2, 3)]

    def test_a_seed_draws_the_same_whether_an_answer_is_repeated_or_not(self, monkeypatch, program_config):
        def draw(repeats: int) -> list[np.ndarray]:
            found, process = iter([True] * repeats + [False, False]), PartyProcess.__new__(PartyProcess)
            process.job = Job(CLIENT, program_config, PrivateSettings(answer="sampled"), 60)
            process.request, process.positions, process.chosen, process.drafted = Request(2, 2, 1), 0, [3], []
            process._half = None
            process.request.prompt, process.request.sampling = [2, 3], Sampling(1.0, seed=0)
            process._noise = Noise(process.request.sampling, program_config.vocab_size)
            process.tell, process.tables = lambda event: None, {}
            process._compiler = SimpleNamespace(submit=lambda *work: SimpleNamespace(result=list))
            process._compare, noises = lambda program: None, []
            process._was_out_of_range, process._exchange = lambda index: next(found), lambda span: None
            process.participant = SimpleNamespace(infer=lambda program, span, given, tell: noises.append(given[NOISE]))
            for index, span in enumerate((Span(0, 2), Span(2, 1))):
                process._answer(index, span, [])
            return noises

        first, again, second = draw(1)
        assert np.array_equal(first, again)
        for noise, expected in zip((first, second), draw(0), strict=True):
            assert np.array_equal(noise, expected)
