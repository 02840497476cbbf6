"""What docs/private_inference.md says of the engine's parameters, and of what answers tell of the weights."""

import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.private_inference.parties import engine
from entropy_gpt.evaluation.private_inference.parties.engine import EngineLog, Party, compile_steps, runtime_config
from entropy_gpt.evaluation.private_inference.parties.local import run_parties
from entropy_gpt.evaluation.private_inference.parties.participant import Participant
from entropy_gpt.evaluation.private_inference.parties.shares import make_placeholder
from entropy_gpt.evaluation.private_inference.program.ciphertexts import INPUTS
from entropy_gpt.evaluation.private_inference.program.counting import make_shape
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic, emulate
from entropy_gpt.evaluation.private_inference.program.prices import load_prices
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, OUT_OF_RANGE, TOKENS, build_steps
from entropy_gpt.evaluation.private_inference.program.range_audit import bound
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, Step, run_steps
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM


ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "private_inference.md"
WIDTH, VOCABULARY, POSITIONS = 64, 512, 128
# Bytes of machine code within which parameters that belong together stand.
NEAR = 64


def make_small_model(notation: str) -> EntropyGPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": POSITIONS}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = EntropyGPTForCausalLM(EntropyGPTConfig.from_notation(notation, **sizes, **tokens)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5
    return model


def find_head(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The space of a head's rows, with the size of each direction, from logits alone (arXiv 2403.06634, section 4)."""
    _, sizes, rows = np.linalg.svd(logits - logits.mean(0), full_matrices=False)
    return sizes, rows


def missed(head: np.ndarray, rows: np.ndarray) -> float:
    """The share of a head that lies outside of a space of rows."""
    return float(np.linalg.norm(head - head @ rows.T @ rows) / np.linalg.norm(head))


@pytest.mark.parametrize("notation", ["SM", "SM+LN+G"])
def test_three_requests_of_128_positions_tell_the_head(notation):
    config, weights = prepare_weights(make_small_model(notation))
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (3, POSITIONS)).tolist()
    answers = [
        emulate(config, weights, PrivateSettings(), prompt, POSITIONS, seed) for seed, prompt in enumerate(prompts)
    ]
    logits = np.concatenate(answers)
    head = weights["head.weight"]
    sizes, rows = find_head(logits)
    gaps = sizes[:-1] / sizes[1:]
    width = int(gaps[: 2 * WIDTH].argmax()) + 1
    assert WIDTH - width in (0, 1)  # a norm takes one direction away
    assert missed(head, rows[:WIDTH]) < 0.0065
    # Fewer positions than the model is wide tell no more than as many directions of it.
    _, rows = find_head(logits[:32])
    assert missed(head, rows) > 0.5


def find_hidden_states(logits: np.ndarray, head: np.ndarray) -> np.ndarray:
    """What a known head `(vocabulary, width)` was multiplied with."""
    return np.linalg.lstsq(head.astype(np.float64), logits.T, rcond=None)[0].T


def find_final_norm(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The gain of a LayerNorm, most of it above 0, and its bias, from what comes out, `(positions, width)`. That is
    y = g n + b, where each n has a sum of 0 and squares with a sum of the width. So 1 / g is normal to the plane of
    all y, and y / g = n + b / g lies on a sphere in that plane. Least squares find its centre and radius.
    """
    width = hidden.shape[1]
    normal = np.linalg.svd(hidden - hidden.mean(0))[2][-1]
    normal *= np.sign(normal.sum())
    scaled = hidden * normal
    mean = scaled.mean()
    apart = scaled - scaled.mean(1, keepdims=True)
    unknown = np.column_stack([2 * apart, np.ones(len(apart))])
    *centre, rest = np.linalg.lstsq(unknown, np.square(apart).sum(1), rcond=None)[0]
    radius = np.sqrt(rest + np.square(centre).sum())
    return radius / np.sqrt(width) / normal, (np.array(centre) + mean) / normal


@pytest.mark.parametrize("notation", ["SM", "SM+LN+G"])
def test_a_known_head_gives_the_last_hidden_state_and_in_time_the_norm_before_it(notation):
    model = make_small_model(notation)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1 + 0.3 * torch.randn(WIDTH))
        model.transformer.ln_f.bias.add_(torch.randn(WIDTH))
    config, weights = prepare_weights(model)
    prompts = np.random.default_rng(0).integers(0, VOCABULARY, (3, POSITIONS)).tolist()
    logits = [
        emulate(config, weights, PrivateSettings(), prompt, POSITIONS, seed) for seed, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        exact = model.transformer(torch.tensor(prompts)).last_hidden_state.flatten(0, 1).numpy()
    hidden = find_hidden_states(np.concatenate(logits), weights["wte"])
    assert is_within(0.0005, hidden[0], exact[0])  # from one answer
    gain, bias = find_final_norm(hidden)
    assert is_within(0.0003, gain, model.transformer.ln_f.weight.detach().numpy())
    assert is_within(0.01, bias, model.transformer.ln_f.bias.detach().numpy())
    few, _ = find_final_norm(hidden[: WIDTH + 2])
    assert is_within(0.01, few, gain)


def is_within(share: float, found: np.ndarray, exact: np.ndarray) -> bool:
    return np.linalg.norm(found - exact) < share * np.linalg.norm(exact)


def test_rows_that_are_no_tokens_are_answered_too():
    """Mixtures of embeddings give logits; their size tells of the bounds."""
    model, mixed = make_small_model("SM"), np.zeros((2, VOCABULARY), np.float32)
    mixed[:, [3, 7]] = 0.5
    config, weights = prepare_weights(model)
    ops = FixedPointArithmetic(PrivateSettings())
    weights, _ = bound(config, weights, ops.settings)

    def answer(rows: np.ndarray) -> dict:
        encoded = {name: ops.encode(value) for name, value in (weights | {TOKENS: rows}).items()}
        return run_steps(build_steps(config, ops.settings, Span(0, len(rows))), ops, encoded)

    with torch.no_grad():
        embeddings = torch.from_numpy(mixed) @ model.transformer.wte.weight
        expected = model(inputs_embeds=embeddings[None]).logits[0, -1].numpy()
    assert np.abs(answer(mixed)[LOGITS][-1] - expected).max() < 0.05
    assert [bool(answer(mixed * size)[OUT_OF_RANGE]) for size in (1, 1000)] == [False, True]


def test_ciphertexts_are_as_long_as_three_primes_of_60_bits():
    measured = load_prices().bytes[INPUTS]
    assert f"takes {measured:,.0f} bytes" in PAGE.read_text(encoding="utf-8")
    assert measured == pytest.approx(8192 * 3 * 60 / 8, rel=0.005)


@pytest.mark.private
class TestEngine:
    @pytest.fixture(autouse=True)
    def _engine(self):
        pytest.importorskip("spu")

    def test_its_parameters_are_those_of_the_page(self):
        log, settings, shape = EngineLog(), PrivateSettings(), (4, 4)

        def multiply(link):
            party = Party(link, settings)
            for name, owner in (("server's", SERVER), ("client's", CLIENT)):
                if link.rank == owner:
                    party.set_own(name, np.full(shape, 0.5, np.float32))
                else:
                    party.set_foreign(name, shape, owner)
            step = Step("both", None, _multiply_twice, ("server's", "client's"), ("product",))
            variables = {"server's": make_shape(shape, SERVER), "client's": make_shape(shape, CLIENT)}
            party.run(*compile_steps([step], variables, settings))

        run_parties(settings, multiply)
        said = os.pread(log._file.fileno(), 2**20, 0).decode()
        page = " ".join(PAGE.read_text(encoding="utf-8").split())
        (primes, kept, degree) = re.search(
            r"CheetahDot uses (\d+)@(\d+) modulus (\d+) degree for 64 bit", said
        ).groups()
        assert f"ring dimension {int(degree):,}, {primes} primes for ciphertexts, {kept} for answers" in page
        (primes,) = re.search(r"CheetahMul uses (\d+) modulus for 64 bit input over 64 bit ring", said).groups()
        assert f"in {primes} plaintext primes" in page

    @pytest.mark.parametrize("protocol", ["cheetah", "semi2k", "aby3"])
    @pytest.mark.parametrize("shape", [(1,), (300,), (2, 3, 4), (1, 1)])
    def test_a_placeholder_is_what_the_engine_makes_of_zeros(self, protocol, shape):
        from spu import api, libspu

        config = runtime_config(PrivateSettings(protocol=protocol))
        config.share_max_chunk_size = 64
        parties = 3 if protocol == "aby3" else 2
        io = api.Io(parties, config)
        zeros = io.make_shares(np.zeros(shape, np.float32), libspu.Visibility.VIS_SECRET, SERVER)
        for rank in range(1, parties):
            placeholder = make_placeholder(io, shape, SERVER, rank, config.share_max_chunk_size)
            assert placeholder.meta == zeros[rank].meta
            assert placeholder.share_chunks == zeros[rank].share_chunks

    def test_its_settings_are_those_of_the_page(self):
        from spu import libspu

        config = runtime_config(PrivateSettings())
        assert (config.protocol, config.field) == (libspu.ProtocolKind.CHEETAH, libspu.FieldType.FM64)
        assert not config.trunc_allow_msb_error
        assert not config.cheetah_2pc_config.enable_mul_lsb_error

    @pytest.mark.slow
    def test_the_lpn_parameters_stand_in_the_installed_engine(self):
        """As 32-bit operands of instructions that follow one another."""
        from spu import libspu

        page = " ".join(PAGE.read_text(encoding="utf-8").split())
        found = re.search(
            r"LPN: n = ([\d,]+), k = ([\d,]+), t = ([\d,]+), .* before that ([\d,]+), ([\d,]+), ([\d,]+) ", page
        )
        numbers = [int(number.replace(",", "")).to_bytes(4, "little") for number in found.groups()]
        with Path(libspu.__file__).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
            places = [match.start() for match in re.finditer(re.escape(numbers[1]), code)]
            near = [code[max(0, place - NEAR) : place + NEAR] for place in places]
        assert any(all(number in part for number in numbers) for part in near)

    @pytest.mark.slow
    def test_oblivious_transfers_are_set_up_in_the_set_up_whatever_the_number_of_processors(self, monkeypatch):
        settings, shape, log, make_config = PrivateSettings(), (200, 200), EngineLog(), engine.runtime_config
        step = Step("compare", None, _compare, ("server's", "client's"), ("larger",))
        variables = {"server's": make_shape(shape, SERVER), "client's": make_shape(shape, CLIENT)}

        def compare(link):
            participant = Participant.__new__(Participant)
            participant.settings = settings
            participant.party = Party(link, settings, log if link.rank == SERVER else None)
            participant.set_up()
            for name, owner in (("server's", SERVER), ("client's", CLIENT)):
                if link.rank == owner:
                    participant.party.set_own(name, np.full(shape, 0.5, np.float32))
                else:
                    participant.party.set_foreign(name, shape, owner)
            return participant.party.run(*compile_steps([step], variables, settings)).total_bytes

        sent = []
        for processors in (1, 8):

            def config_for(settings, processors=processors):
                config = make_config(settings)
                config.max_concurrency = processors
                return config

            monkeypatch.setattr(engine, "runtime_config", config_for)
            sent.append(run_parties(settings, compare)[SERVER])
        # Threads of a busy machine use instances in another order. A set-up for each would take half as much more.
        assert sent[1] == pytest.approx(sent[0], rel=0.1)


def _multiply_twice(ops, server, client):
    return ops.multiply(ops.matmul(server, client), ops.matmul(client, server))


def _compare(ops, server, client):
    return ops.positive_part(server + client)


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    there = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    assert len(named) > 10
    assert named <= there
