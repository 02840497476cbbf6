"""What is done before the prompt comes: the same numbers as in one phase, nothing revealed, and used once."""

import contextlib
import hashlib
import itertools
import math
import os
import shutil
import stat
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.costs.cost_model import predict, predict_phases
from entropy_gpt.evaluation.private_inference.program.ciphertexts import INPUTS
from entropy_gpt.evaluation.private_inference.program.counting import (
    REVEALED,
    SHARED_BATCHES,
    Stock,
    count_step,
)
from entropy_gpt.evaluation.private_inference.program.demands import (
    NUMBERS,
    SCORES,
    SQUARES,
    VALUES,
    WEIGHTS,
    Bound,
    Demand,
    KeptTokens,
)
from entropy_gpt.evaluation.private_inference.program.first_phase import ROWS, multiply_rows
from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, OUT_OF_RANGE, build_steps, weight_shapes
from entropy_gpt.evaluation.private_inference.program.second_phase import MaskFactors
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs, program_variables
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import ARCHITECTURES, make_model
from tests.slow import slow_but


LENGTH = 9
# The prompt, and two tokens after it.
SPANS = [Span(0, LENGTH), Span(LENGTH, 1), Span(LENGTH + 1, 1)]
LONGER = [Span(0, 20), Span(20, 1), Span(21, 1), Span(22, 1)]
QUICK = ["EReg(SM(t_h)+LN+G+WN(QK+FFN))", "EReg(SM(t)+ScFuFFNi1)"]


class FormsOfTwoPhases(FixedPointArithmetic):
    """Squares without the engine's division by 2."""

    def square_by_exp(self, tensor):
        return self.square_by_product(tensor)


def prepared_weights(notation: str, **fields):
    torch.manual_seed(0)
    return prepare_weights(make_model(notation, **fields))


def draw_masks(preparation: Preparation, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: random.integers(-(2**63), 2**63 - 1, mask.shape, np.int64, endpoint=True)
        for name, mask in preparation.masks.items()
    }


def encode(ops, config, private, weights, span: Span, tokens) -> dict:
    given = client_inputs(config, private, span, tokens[span.start : span.end], weights)
    return {name: ops.encode(value) for name, value in given.items()}


def answers_in_one_phase(config, weights, private, spans, tokens, is_prepared: bool = True) -> list[np.ndarray]:
    """In the forms of two phases, or in its own."""
    ops = (FormsOfTwoPhases if is_prepared else FixedPointArithmetic)(private)
    variables, found = {name: ops.encode(weight) for name, weight in weights.items()}, []
    for span in spans:
        variables |= encode(ops, config, private, weights, span, tokens)
        variables = run_steps(build_steps(config, private, span, is_prepared), ops, variables)
        found.append(variables[LOGITS])
    return found


def answers_in_two(config, weights, private, prepared, spans, tokens, ops_class=FixedPointArithmetic):
    preparation = Preparation(config, private, prepared)
    ops = ops_class(private)
    variables = {name: ops.encode(weight) for name, weight in weights.items()} | draw_masks(preparation)
    variables, found = run_steps(preparation.steps, ops, variables), []
    ops = ops_class(private)
    for number, span in enumerate(spans):
        variables |= encode(ops, config, private, weights, span, tokens)
        variables = run_steps(preparation.use(number, span), ops, variables)
        found.append(variables[LOGITS])
    return found


def test_what_a_half_holds_and_means_has_a_format_of_its_own(parties):
    """If the hash differs, a half of before would be used wrongly: raise `FORMAT`, then write both here."""
    private, random = PrivateSettings(), np.random.default_rng(0)
    config, _ = prepared_weights("SM+LN+G", n_layer=1)
    shapes = weight_shapes(config)
    weights = {name: random.integers(-64, 64, shape).astype(np.float32) / 64 for name, shape in shapes.items()}
    preparation, ops = Preparation(config, private, SPANS[:2]), FixedPointArithmetic(private)
    variables = {name: ops.encode(weight) for name, weight in weights.items()} | draw_masks(preparation)
    variables = run_steps(preparation.steps, ops, variables)
    digest = hashlib.sha256()
    for name in sorted([*preparation.masks, *preparation.products]):
        digest.update(name.encode() + np.ascontiguousarray(variables[name]).tobytes())
    assert (parties.FORMAT, digest.hexdigest()[:16]) == (5, "0438c9834301d0cb")


@pytest.mark.parametrize("prepared", [SPANS, LONGER])
@pytest.mark.parametrize("notation", slow_but(QUICK, ARCHITECTURES))
def test_two_phases_give_the_same_numbers_to_the_last_bit(notation, prepared):
    config, weights = prepared_weights(notation, n_layer=2)
    tokens = np.random.default_rng(0).integers(2, 101, LENGTH + 2)
    private = PrivateSettings()
    expected = answers_in_one_phase(config, weights, private, SPANS, tokens)
    found = answers_in_two(config, weights, private, prepared, SPANS, tokens)
    for one, two in zip(expected, found, strict=True):
        assert np.array_equal(one, two)


def list_spans(length: int, new_tokens: int, answers: int) -> list[Span]:
    return [Span(0, length, answers), *(Span(length + index, 1) for index in range(new_tokens - 1))]


@pytest.mark.parametrize("notation", slow_but(["EReg(SM(t)+LN+G)"], ARCHITECTURES))
@pytest.mark.parametrize("most", [(5, 3, 1), (5, 1, 5), (5, 1, 2), (1, 3, 1)])
def test_a_preparation_serves_all_shorter_prompts_and_answers(notation, most):
    """To the last bit, from one token on."""
    config, weights = prepared_weights(notation, n_layer=2)
    tokens, private = np.random.default_rng(0).integers(2, 101, 8), PrivateSettings()
    for length, new_tokens, answers in itertools.product(*(range(1, size + 1) for size in most)):
        if answers > length:
            continue
        spans = list_spans(length, new_tokens, answers)
        expected = answers_in_one_phase(config, weights, private, spans, tokens)
        found = answers_in_two(config, weights, private, list_spans(*most), spans, tokens)
        assert all(np.array_equal(one, two) for one, two in zip(expected, found, strict=True))


@pytest.mark.parametrize("notation", ["SM(t)+ScFuFFN", "EReg(SM(t_h)+LN+G)"])
def test_forms_of_two_phases_answer_like_those_of_one(notation):
    config, weights = prepared_weights(notation, n_layer=2)
    tokens, private = np.random.default_rng(0).integers(2, 101, LENGTH + 2), PrivateSettings()
    forms = [answers_in_one_phase(config, weights, private, SPANS, tokens, form) for form in (True, False)]
    for prepared, one in zip(*forms, strict=True):
        assert np.abs(prepared - one).max() < 0.01


@pytest.mark.parametrize(
    "private",
    [
        PrivateSettings(embedding="client_table", answer="sampled", softmax="tuned", fraction_bits=16),
        pytest.param(PrivateSettings(softmax="stock", gelu="tanh"), marks=pytest.mark.slow),
        pytest.param(PrivateSettings(gelu="erf"), marks=pytest.mark.slow),
    ],
)
def test_every_setting_has_two_phases(private):
    pytest.importorskip("jax")
    config, weights = prepared_weights("SM+LN+G", n_layer=1)
    tokens, spans = np.random.default_rng(0).integers(2, 101, LENGTH), [Span(0, LENGTH, 3)]
    (one,) = answers_in_one_phase(config, weights, private, spans, tokens)
    (two,) = answers_in_two(config, weights, private, spans, spans, tokens)
    assert np.array_equal(one, two)


def test_what_is_prepared_for_less_is_refused():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=1)
    preparation = Preparation(config, PrivateSettings(), [Span(0, 9), Span(9, 1)])
    for number, span in ((0, Span(0, 10)), (0, Span(0, 9, 2)), (1, Span(10, 1)), (1, Span(9, 2)), (2, Span(10, 1))):
        with pytest.raises(PrivateInferenceError, match="the preparation is for less: it does not have what"):
            preparation.use(number, span)


def test_what_is_computed_before_a_product_with_a_weight_is_refused():
    ops = FixedPointArithmetic(PrivateSettings())
    with pytest.raises(TypeError, match="exp comes before a product with a weight"):
        MaskFactors(Bound.of(lambda ops, tensor: ops.matmul(ops.exp(tensor), tensor)), ())(ops, np.zeros((2, 2)))


def test_smaller_factors_are_covered_and_other_weights_are_not():
    weight = Demand(WEIGHTS, (8, 4), (4, 3))
    assert weight.covers(Demand(WEIGHTS, (5, 4), (4, 3)))
    assert not weight.covers(Demand(WEIGHTS, (5, 4), (4, 2)))
    assert not weight.covers(Demand(SCORES, (5, 4), (4, 3)))
    pair = Demand(VALUES, (2, 8, 6), (2, 6, 4))
    assert pair.covers(Demand(VALUES, (2, 5, 3), (2, 3, 4)))
    assert not pair.covers(Demand(VALUES, (2, 9, 3), (2, 3, 4)))
    assert not pair.covers(Demand(VALUES, (2, 5, 3), (2, 3, 4), is_causal=True))
    assert not Demand(NUMBERS, (4,), (4,)).covers(Demand(SQUARES, (4,)))


def test_rows_are_chosen_that_see_all_keys():
    """Of the last 2 of 3 queries of 7 tokens, and of the last one."""
    prepared = Demand(VALUES, (1, 3, 7), (1, 7, 2), is_causal=True)
    for length, queries, first in ((7, 2, 1), (4, 2, 0), (6, 1, 1)):
        demand = Demand(VALUES, (1, queries, length), (1, length, 2), is_causal=True)
        assert KeptTokens(length, 7, 0).choose_rows(prepared, demand) == slice(first, first + queries)


class Watched(FixedPointArithmetic):
    """Keeps what is revealed to both, and what is shown to the server."""

    seen: list[np.ndarray]
    shown: list[np.ndarray]

    def reveal(self, masked):
        self.seen.append(masked.reshape(-1).copy())
        return masked

    def show(self, masked):
        self.shown.append(masked.copy())
        return masked


def revealed(config, weights, masks: tuple[int | None, int | None], tokens) -> np.ndarray:
    """
    All that the parties see of an inference, of a prompt and two tokens after it. Each part of the masks has a seed,
    or is 0: then this is what the party that drew it makes of what it sees, by adding its own part. Where that is the
    client, what only the server is shown is left out.
    """
    private = PrivateSettings()
    preparation, ops = Preparation(config, private, SPANS), Watched(private)
    ops.seen, ops.shown = [], []
    variables = {name: ops.encode(weight) for name, weight in weights.items()}
    for part, seed in zip(("server", "client"), masks, strict=True):
        drawn = draw_masks(preparation, seed or 0)
        own = {name: mask for name, mask in drawn.items() if name.endswith(f"/{part}")}
        variables |= {name: np.zeros_like(mask) if seed is None else mask for name, mask in own.items()}
    variables = run_steps(preparation.steps, ops, variables)
    assert not ops.seen and not ops.shown
    for number, span in enumerate(SPANS):
        variables |= encode(ops, config, private, weights, span, tokens)
        variables = run_steps(preparation.use(number, span), ops, variables)
    assert ops.seen and ops.shown
    return np.concatenate([*ops.seen, *(ops.shown if masks[1] is not None else [])])


def chi_square(numbers: np.ndarray, bits: int = 6) -> float:
    """Of the highest and the lowest bits, each as a standard normal deviation from uniform."""
    largest = 0.0
    for part in ((numbers >> (64 - bits)) + 2 ** (bits - 1), numbers & (2**bits - 1)):
        counts = np.bincount(part.astype(np.int64), minlength=2**bits)
        expected = len(numbers) / 2**bits
        statistic = ((counts - expected) ** 2 / expected).sum()
        freedom = 2**bits - 1
        largest = max(largest, abs(statistic - freedom) / math.sqrt(2 * freedom))
    return largest


@pytest.mark.parametrize("unknown", ["both", "server", "client"])
def test_what_is_revealed_is_uniform_whatever_the_prompt_is(unknown):
    """To a listener, who knows neither part of a mask; and to a party, which knows its own and not the other one's."""
    config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
    same = np.full(LENGTH + 2, 7)
    seeds = [
        (None if unknown == "client" else seed, None if unknown == "server" else seed + 100) for seed in range(1, 7)
    ]
    runs = np.stack([revealed(config, weights, masks, same) for masks in seeds])
    assert chi_square(runs.reshape(-1)) < 5
    # Each of the numbers by itself, over the runs: the sign is a fair coin.
    assert abs((runs < 0).mean() - 0.5) < 0.01


def test_both_parts_of_a_mask_are_in_each_number_that_is_revealed():
    """And the client's in each that is shown, without the server's."""
    config, weights = prepared_weights("SM+LN+G", n_layer=1)
    prompt = np.full(LENGTH + 2, 7)
    first, servers, clients = (revealed(config, weights, masks, prompt) for masks in ((1, 2), (3, 2), (1, 4)))
    both = len(revealed(config, weights, (1, None), prompt))
    assert (first[:both] != servers[:both]).all()
    assert (first != clients).all()
    # Those of the first step are of the client's own prompt alone.
    assert (first[both : both + LENGTH * config.vocab_size] == servers[both : both + LENGTH * config.vocab_size]).all()


def test_a_mask_that_is_used_twice_shows_the_difference_of_two_prompts():
    """What would happen: it is why a preparation serves once."""
    config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
    first, second = (revealed(config, weights, (1, 2), np.full(LENGTH + 2, token)) for token in (7, 8))
    assert chi_square(first - second) > 100
    fresh = revealed(config, weights, (3, 4), np.full(LENGTH + 2, 8))
    assert chi_square(first - fresh) < 5


def solve(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The matrix by which another one, of full rank, was multiplied in the ring."""
    left, right = left.astype(np.uint64), right.astype(np.uint64)
    for column in range(left.shape[1]):
        odd = column + int(np.argmax(left[column:, column] & np.uint64(1)))
        inverse = np.uint64(pow(int(left[odd, column]), -1, 2**64))
        for matrix in (left, right):
            matrix[[column, odd]] = matrix[[odd, column]]
        left[column], right[column] = left[column] * inverse, right[column] * inverse
        factors = left[:, column].copy()
        factors[column] = 0
        left, right = left - np.outer(factors, left[column]), right - np.outer(factors, right[column])
    return right[: left.shape[1]].astype(np.int64)


def test_both_halves_of_a_preparation_give_the_weights():
    """Why a server's halves are as secret as its weights."""
    config, weights = prepared_weights("SM+ScFuFFN", n_layer=1, n_embd=16, n_head=2, n_positions=64)
    private = PrivateSettings()
    preparation, ops = Preparation(config, private, [Span(0, 48, 48)]), FixedPointArithmetic(private)
    variables = {name: ops.encode(weight) for name, weight in weights.items()} | draw_masks(preparation)
    variables = run_steps(preparation.steps, ops, variables)
    place = "0/None/head/compute_logits/0/0"
    found = solve(variables[f"{place}/left/client"], variables[f"{place}/product"])
    assert np.array_equal(found, ops.as_ring(ops.append_checksum(ops.encode(weights["head.weight"]))))


def test_masks_have_a_part_of_each_party_or_of_the_client_alone():
    config, _ = prepared_weights("SM+LN+G", n_layer=1)
    preparation = Preparation(config, PrivateSettings(), SPANS)
    owners = Counter(mask.owner for mask in preparation.masks.values())
    assert owners[CLIENT] > owners[SERVER] > 0
    for name, mask in preparation.masks.items():
        if name.endswith("/server"):
            assert preparation.masks[name.removesuffix("server") + "client"].shape == mask.shape


def test_the_second_phase_waits_and_sends_less():
    config, _ = prepared_weights("SM+ScFuFFN", n_embd=192, n_head=3, n_positions=128)
    spans = [Span(0, 64)]
    one = predict(config, PrivateSettings(), spans[0])
    before, after = predict_phases(config, PrivateSettings(), spans)
    sums = [sum(step.total_bytes for step in steps) for steps in (one, before, after)]
    assert sums[2] < sums[0] / 2
    assert sums[1] + sums[2] < 1.1 * sums[0]
    assert sum(step.round_trips for step in after) < sum(step.round_trips for step in one)
    operations = [sorted({(step.operation, str(step.layer)) for step in steps}) for steps in (after, one)]
    assert operations[0] == operations[1]
    with pytest.raises(PrivateInferenceError, match="not for 'semi2k'"):
        predict_phases(config, PrivateSettings("semi2k"), spans)


def count_phases(config, *spans: Span) -> list[dict[str, Counter]]:
    """What the operations of the first phase, and of each pass of the second, consist of."""
    private, preparation = PrivateSettings(), Preparation(config, PrivateSettings(), spans)
    phases, found = [preparation.steps, *(preparation.use(*numbered) for numbered in enumerate(spans))], []
    for number, steps in enumerate(phases):
        variables = preparation.variables(max(number - 1, 0), spans[max(number - 1, 0)])
        counts: dict[str, Counter] = {}
        for step in steps:
            parts = count_step(step, variables, private, Stock()).parts
            counts.setdefault(step.operation, Counter()).update(parts)
        found.append(counts)
    return found


def test_what_is_0_or_the_servers_to_see_takes_no_bytes_of_others():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=2)
    heads, width = config.n_head, config.n_embd
    _, after = count_phases(config, Span(0, LENGTH, LENGTH))
    visible = heads * LENGTH * (LENGTH + 1) // 2
    assert after["values"][REVEALED] == 2 * visible
    # Shown to the server alone, which takes half.
    assert after["embedding"][REVEALED] == LENGTH * config.vocab_size / 2
    assert after["output"][REVEALED] == 2 * LENGTH * width / 2


def test_kept_keys_and_values_are_revealed_once():
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=2)
    heads, width = config.n_head, config.n_embd
    before, _, *after = count_phases(config, *SPANS)
    for span, counts in zip(SPANS[1:], after, strict=True):
        # Of each layer a query, and a weight for each key and head.
        assert counts["scores"][REVEALED] == 2 * width
        assert counts["values"][REVEALED] == 2 * heads * span.end
        # A key and a value; and what the server is shown, in the last layer for queries apart.
        assert counts["query, key, value"][REVEALED] == 2 * 2 * width + (1 + 2) * width / 2
    # The masks of all passes are one product: the rows of further tokens take next to nothing.
    alone, _ = count_phases(config, SPANS[0])
    assert before["scores"][INPUTS] <= 2 * alone["scores"][INPUTS]


def test_rows_with_one_factor_each_are_products_of_matrices():
    """Where that sends less: not for few rows."""
    config, _ = prepared_weights("SM+LN+G", n_layer=1, n_embd=192, n_head=3, n_positions=128)
    before, _ = count_phases(config, Span(0, 128, 128))
    assert ROWS in before
    products = before[ROWS]
    assert products[INPUTS] and not products[SHARED_BATCHES]
    short, _ = count_phases(config, Span(0, 2, 2))
    assert not short[ROWS][INPUTS]


def test_products_of_rows_are_those_of_their_numbers():
    random, shapes = np.random.default_rng(0), [(2, 100, 64), (2, 100, 1), (3, 35, 64), (3, 35, 1)]
    masks = [random.integers(-(2**63), 2**63 - 1, shape) for shape in shapes for _ in range(2)]
    rows, factors, others, their_factors = (masks[place] + masks[place + 1] for place in range(0, 8, 2))
    found = multiply_rows(FixedPointArithmetic(PrivateSettings()), *masks)
    for product, expected in zip(found, (rows * factors, others * their_factors), strict=True):
        assert np.array_equal(product, expected)


def test_several_answers_share_the_weights():
    """The rows of all passes are one product."""
    config, _ = prepared_weights("SM+ScFuFFN", n_layer=1)
    one, three = (predict_phases(config, PrivateSettings(), spans)[0] for spans in (SPANS[:1], SPANS))
    products = [[step.total_bytes for step in steps if step.operation == "output"] for steps in (one, three)]
    assert len(products[0]) == len(products[1]) == 1
    assert products[1][0] < 2 * products[0][0]


@pytest.fixture
def parties():
    """What needs the engine's package."""
    pytest.importorskip("spu")
    from entropy_gpt.evaluation.private_inference.parties import preparations, store

    return SimpleNamespace(**vars(preparations), Store=store.Store)


@pytest.fixture
def half(parties):
    """A half with one share, as a function of its name."""
    from spu import libspu

    share = libspu.Share()
    share.meta, share.share_chunks = b"meta\x00", [b"first", b"second part"]
    shares, now = {"product": share}, time.time()

    def make(name: str = "0" * 32, **fields):
        given = {"rank": SERVER, "terms": "t", "weights": "w", "store": "", "length": 8, "new_tokens": 2, "answers": 1}
        given |= {"owner": "one", "made": now}
        described = parties.describe_shares(shares)
        return parties.Header(name=name, shares=described, costs=[], **{**given, **fields}), b"s" * 32, shares

    return make


class TestStore:
    def test_a_half_is_taken_once(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", SERVER)
        store.put(*half())
        header, seed, shares = parties.read_half(store.take("0" * 32))
        assert (header, seed) == half()[:2]
        assert (shares["product"].meta, shares["product"].share_chunks) == (b"meta\x00", [b"first", b"second part"])
        with pytest.raises(PrivateInferenceError, match="this preparation is not here: it was used"):
            store.take("0" * 32)
        assert [path.name for path in store.folder.iterdir()] == ["store-0"]

    def test_nobody_else_may_read_it(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", SERVER)
        store.put(*half())
        for path in (store.folder, *store.folder.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0

    def test_the_smallest_comes_first_and_what_is_damaged_is_left_out(self, parties, half, tmp_path):
        store = parties.Store(tmp_path, CLIENT)
        for number, length in enumerate((30, 10, 20)):
            store.put(*half(str(number) * 32, rank=CLIENT, length=length))
        store.path("9" * 32).write_bytes(b"{}\n")
        assert [header.length for header in store.headers()] == [10, 20, 30]
        assert not list(parties.Store(tmp_path, SERVER).headers())

    @pytest.mark.parametrize("cut", [-1, -40, 30])
    def test_a_cut_off_half_is_not_chosen(self, cut, parties, half, tmp_path):
        """Since the other one would be used up for nothing. The others are left alone."""
        store = parties.Store(tmp_path, CLIENT)
        for name in ("0" * 32, "1" * 32):
            store.put(*half(name, rank=CLIENT))
        path = store.path("0" * 32)
        path.write_bytes(path.read_bytes()[:cut])
        assert [header.name for header in store.headers()] == ["1" * 32]

    def test_what_the_other_side_has_not_written_is_not_kept(self, parties, half, tmp_path):
        def fail():
            raise RuntimeError("the peer is gone")

        store = parties.Store(tmp_path, SERVER)
        with pytest.raises(RuntimeError):
            store.put(*half(), fail)
        assert [path.name for path in tmp_path.iterdir()] == ["store-0"]

    @pytest.mark.parametrize("cut", [-1, -40, 30])
    def test_a_damaged_half_is_refused_and_gone(self, cut, parties, half, tmp_path):
        store = parties.Store(tmp_path, SERVER)
        store.put(*half())
        path = store.path("0" * 32)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(PrivateInferenceError, match="is damaged: prepare another one"):
            parties.read_half(store.take("0" * 32))
        assert not list(tmp_path.glob("0*"))

    def test_one_of_another_version_is_refused(self, parties, half, tmp_path):
        store = parties.Store(tmp_path, SERVER)
        store.put(*half(format=parties.FORMAT + 1))
        with pytest.raises(PrivateInferenceError, match="is of another version of entropy-gpt"):
            parties.read_half(store.take("0" * 32))

    def test_a_full_disk_leaves_nothing(self, parties, half, tmp_path, monkeypatch):
        def fail(descriptor):
            raise OSError(28, "No space left on device")

        store = parties.Store(tmp_path, SERVER)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PrivateInferenceError, match=r"can't be written to .*: No space left on device"):
            store.put(*half())
        assert [path.name for path in tmp_path.iterdir()] == ["store-0"]

    def test_a_store_is_the_same_when_it_is_opened_again(self, parties, tmp_path):
        first, second = (parties.Store(tmp_path, SERVER).used.identity for _ in range(2))
        assert first == second != parties.Store(tmp_path / "other", SERVER).used.identity

    def test_what_killed_processes_left_is_cleared_and_what_is_in_use_is_not(self, parties, half, tmp_path):
        store = parties.Store(tmp_path, SERVER)
        store.put(*half())
        taken = store.take("0" * 32)
        left = [tmp_path / f"{'1' * 32}-0{suffix}" for suffix in (".taken", ".part")]
        for path in left:
            path.touch()
        parties.Store(tmp_path, SERVER)
        assert taken.exists() and not any(path.exists() for path in left)
        store.drop(taken)
        assert [path.name for path in tmp_path.iterdir()] == ["store-0"]

    def test_what_a_copy_brings_back_is_not_used_again(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", CLIENT)
        store.put(*half(rank=CLIENT))
        copy = store.path("0" * 32).read_bytes()
        taken = store.take("0" * 32)
        store.spend(taken)
        store.drop(taken)
        store.path("0" * 32).write_bytes(copy)
        taken = store.take("0" * 32)
        with pytest.raises(parties.LostHalfError, match="was used before, and has come back from a copy") as failed:
            store.spend(taken)
        assert failed.value.code == parties.NO_HALF
        store.drop(taken)
        # The folder whole, and another process.
        store.path("0" * 32).write_bytes(copy)
        assert not list(parties.Store(tmp_path / "halves", CLIENT).headers())

    def test_what_was_taken_and_not_used_may_be_used(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", CLIENT)
        store.put(*half(rank=CLIENT))
        store.put_back(store.take("0" * 32))
        store.spend(store.take("0" * 32))

    def test_a_list_that_was_cut_off_is_read(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", CLIENT)
        with store.used.path.open("a") as file:
            file.write("0" * 20)
        for name in ("1" * 32, "2" * 32):
            store.put(*half(name, rank=CLIENT))
            taken = store.take(name)
            store.spend(taken)
            with pytest.raises(PrivateInferenceError, match="was used before"):
                store.spend(taken)
            store.drop(taken)

    @pytest.mark.parametrize("moved", [False, True])
    def test_a_copy_of_a_folder_uses_nothing_twice(self, moved, parties, half, tmp_path):
        """Under another name beside it, both have one list; at another place there is none."""
        store = parties.Store(tmp_path / "halves", CLIENT)
        store.put(*half(rank=CLIENT))
        other = tmp_path / "elsewhere" / "copy" if moved else tmp_path / "copy"
        shutil.copytree(store.folder, other)
        store.spend(store.take("0" * 32))
        if moved:
            with pytest.raises(
                PrivateInferenceError, match=f"{store.used.path.name} is not there.*: bring it back, or"
            ):
                parties.Store(other, CLIENT)
        else:
            assert not list(parties.Store(other, CLIENT).headers())

    def test_a_folder_that_is_moved_takes_its_list_along(self, parties, half, tmp_path):
        store = parties.Store(tmp_path / "halves", CLIENT)
        store.put(*half(rank=CLIENT))
        (tmp_path / "there").mkdir()
        for path in (store.folder, store.used.path):
            path.rename(tmp_path / "there" / path.name)
        assert list(parties.Store(tmp_path / "there" / "halves", CLIENT).headers())

    def test_a_list_that_cannot_be_made_is_named(self, parties, tmp_path, monkeypatch):
        def fail(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "halves").mkdir(mode=0o700)
        monkeypatch.setattr(Path, "touch", fail)
        with pytest.raises(
            PrivateInferenceError, match=r"\.used-0 can't be made, which is to list .*: Permission denied"
        ):
            parties.Store(tmp_path / "halves", SERVER)

    def test_the_other_side_does_not_learn_of_places(self, parties, half, tmp_path):
        from entropy_gpt.evaluation.private_inference.parties.channel import may_be_told

        store = parties.Store(tmp_path / "halves", SERVER)
        store.put(*half())
        taken = store.take("0" * 32)
        store.used.path.unlink()
        for act in (lambda: store.spend(taken), lambda: parties.Store(store.folder, SERVER)):
            with pytest.raises(PrivateInferenceError, match=str(tmp_path)) as failed:
                act()
            assert not may_be_told(failed.value)

    def test_nothing_is_used_where_that_cannot_be_noted(self, parties, half, tmp_path, monkeypatch):
        def fail(descriptor):
            raise OSError(28, "No space left on device")

        store = parties.Store(tmp_path / "halves", SERVER)
        store.put(*half())
        taken = store.take("0" * 32)
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PrivateInferenceError, match="so nothing is used: No space left on device"):
            store.spend(taken)

    def test_one_of_two_processes_takes_it(self, parties, half, tmp_path):
        first, second = (parties.Store(tmp_path, CLIENT) for _ in range(2))
        first.put(*half(rank=CLIENT))
        taken = first.take("0" * 32)
        with pytest.raises(PrivateInferenceError, match="is not here"):
            second.take("0" * 32)
        first.put_back(taken)
        second.drop(second.take("0" * 32))

    def test_a_copy_that_comes_back_while_it_is_taken_is_used_once(self, parties, half, tmp_path):
        first, second = (parties.Store(tmp_path, CLIENT) for _ in range(2))
        first.put(*half(rank=CLIENT))
        copy = first.path("0" * 32).read_bytes()
        taken = first.take("0" * 32)
        first.path("0" * 32).write_bytes(copy)
        again = second.take("0" * 32)
        first.spend(taken)
        with pytest.raises(parties.LostHalfError, match="was used before"):
            second.spend(again)

    def test_what_fails_otherwise_is_not_said_to_be_used(self, parties, half, tmp_path, monkeypatch):
        def fail(*arguments):
            raise OSError(5, "Input/output error")

        store = parties.Store(tmp_path, SERVER)
        store.put(*half())
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PrivateInferenceError, match=r"can't be taken from .*: Input/output error") as failed:
            store.take("0" * 32)
        assert failed.value.code is None

    def test_a_folder_that_cannot_be_synced_keeps_nothing(self, parties, half, tmp_path, monkeypatch):
        def fail(folder):
            raise OSError(5, "Input/output error")

        store = parties.Store(tmp_path, SERVER)
        monkeypatch.setattr(f"{parties.Store.__module__}.sync", fail)
        with pytest.raises(PrivateInferenceError, match="can't be written to"):
            store.put(*half())
        assert [path.name for path in tmp_path.iterdir()] == ["store-0"]

    @pytest.mark.parametrize("content", ["", "0" * 31, "../" + "0" * 29])
    def test_a_damaged_identity_is_refused(self, content, parties, tmp_path):
        (tmp_path / "store-0").write_text(content)
        with pytest.raises(PrivateInferenceError, match=f"store-0 is damaged: delete {tmp_path}, and"):
            parties.Store(tmp_path, SERVER)

    def test_an_identity_is_written_whole_or_not_at_all(self, parties, tmp_path, monkeypatch):
        def fail(file):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(PrivateInferenceError, match="No space left"):
            parties.Store(tmp_path, SERVER)
        assert not list(tmp_path.iterdir())

    def test_weights_that_are_multiplied_are_hashed_and_others_are_not(self, parties):
        config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
        first = parties.hash_weights(weights, config, PrivateSettings())
        for name, same in (("h.0.output.weight", False), ("head.weight", False), ("bounds.after", True)):
            changed = weights[name].copy()
            changed.flat[0] += 1
            changed_weights = weights | {name: changed}
            assert (parties.hash_weights(changed_weights, config, PrivateSettings()) == first) is same
        assert parties.name_store("store", first) != parties.name_store("store", "other")

    def test_files_that_are_not_the_stores_are_left_alone(self, parties, tmp_path):
        names = {"film.mp4.part", f"{'0' * 32}-1.part", f"{'0' * 32}.taken", "store-0"}
        for name in names:
            (tmp_path / name).write_text("0" * 32)
        (tmp_path / "folder.part").mkdir()
        tmp_path.with_name(f"{'0' * 32}.used-0").touch()
        parties.Store(tmp_path, SERVER)
        assert {path.name for path in tmp_path.iterdir()} == names | {"folder.part"}

    @pytest.mark.parametrize("mode", [0o777, 0o750, 0o701])
    def test_a_folder_that_others_can_use_is_refused(self, mode, parties, tmp_path):
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(mode)
        with pytest.raises(PrivateInferenceError, match=r"others can use it \(chmod 700 "):
            parties.Store(tmp_path / "open", SERVER)

    def test_a_folder_of_another_user_is_refused(self, parties, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(PrivateInferenceError, match="it is another user's"):
            parties.Store(tmp_path, SERVER)

    def test_names_are_drawn_by_both_and_never_paths(self, parties):
        name = parties.draw_name((b"a" * 32, b"b" * 32))
        assert parties.is_name(name)
        assert name not in (parties.draw_name((b"a" * 32, b"c" * 32)), parties.draw_name((b"c" * 32, b"b" * 32)))
        assert not any(parties.is_name(text) for text in ("../" + "0" * 29, "0" * 31, "0" * 32 + "\n", None, 5))

    def test_masks_depend_on_seed_and_name(self, parties):
        first = parties.draw_mask(b"s" * 32, "a", (3, 4))
        assert np.array_equal(first, parties.draw_mask(b"s" * 32, "a", (3, 4)))
        for seed, name in ((b"t" * 32, "a"), (b"s" * 32, "b")):
            assert not (first == parties.draw_mask(seed, name, (3, 4))).any()


@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFNi1)"])
@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_a_long_answer_is_measured_by_few_of_its_tokens(notation, new_tokens, parties):
    config, _ = prepared_weights(notation, n_layer=1)
    spans = parties.pass_spans(6, new_tokens, 1)
    products = Preparation(config, PrivateSettings(), spans).products
    expected = sum(product.nbytes for product in products.values()), len(products)
    assert parties.measure_half(config, PrivateSettings(), spans) == expected


class TestRoom:
    """What a server keeps for whom."""

    @pytest.fixture
    def serve(self, parties, tmp_path):
        from entropy_gpt.evaluation.private_inference.parties.limits import Limits
        from entropy_gpt.evaluation.private_inference.parties.server import Server
        from entropy_gpt.evaluation.private_inference.parties.terms import Offer

        config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
        offer, servers = Offer(config, weights, "SM+ScFuFFN", PrivateSettings(), ""), []

        def make(**options):
            options = {"limits": Limits(answers=8), "prepared": tmp_path, "report": lambda line: None, **options}
            servers.append(Server(offer, "127.0.0.1", 0, None, **options))
            return servers[-1]

        yield make
        for server in servers:
            server.close()

    @staticmethod
    def read(server, taken, client: str = "one", new_tokens: int = 1, **message):
        asked = {"length": 6, "new_tokens": new_tokens, "answers": 1, **message}
        return server._read_request(SimpleNamespace(peer=client), asked, taken)

    @pytest.fixture
    def kept(self, parties, half, serve, tmp_path):
        """A server with a half, as a function of the half's fields."""

        def make(name: str = "0" * 32, **fields):
            server = serve()
            fields = {**dict(zip(("terms", "weights"), server.halves.of, strict=True)), **fields}
            server.halves.store.put(*half(name, **fields))
            return server

        return make

    def test_what_is_being_made_has_its_room_already(self, serve, parties):
        config, settings = serve().offer.config, PrivateSettings()
        size, _ = parties.measure_half(config, settings, parties.pass_spans(6, 1, 1))
        server = serve(most_prepared_bytes=2 * size)
        with contextlib.ExitStack() as taken, contextlib.ExitStack() as other:
            request, use, _ = self.read(server, taken, prepares=True)
            assert request.prepares and use.positions == 0
            with pytest.raises(PrivateInferenceError, match=r"preparations of this client would take .*--prepared-mb"):
                self.read(server, other, prepares=True)
            self.read(server, other, "two", prepares=True)
            with pytest.raises(PrivateInferenceError, match=r"^preparations would take"):
                self.read(server, other, "three", prepares=True)
        self.read(server, taken, prepares=True)
        taken.close()

    def test_limits_come_before_anything_is_computed(self, serve, parties, monkeypatch):
        def measure(*arguments):
            raise AssertionError("too early")

        server = serve()
        monkeypatch.setattr(f"{Preparation.__init__.__module__}.Preparation", measure)
        with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="9 answers are asked for; 8"):
            self.read(server, taken, new_tokens=9, prepares=True)

    def test_what_does_not_fit_a_header_is_not_begun(self, serve, monkeypatch):
        monkeypatch.setattr("entropy_gpt.evaluation.private_inference.parties.halves.MOST_PRODUCTS", 3)
        with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="so long an answer can't be"):
            self.read(serve(), taken, prepares=True)

    def test_a_half_is_for_the_client_that_it_was_made_with(self, kept):
        server = kept()
        with contextlib.ExitStack() as taken:
            with pytest.raises(PrivateInferenceError, match="was made with another client"):
                self.read(server, taken, "two", preparation="0" * 32)
            request, *_ = self.read(server, taken, preparation="0" * 32)
            assert request.preparation.endswith(f"{'0' * 32}-0.taken")
        assert [path.name for path in server.halves.store.folder.iterdir()] == ["store-0"]

    def test_a_half_stays_where_its_use_cannot_be_noted(self, kept):
        server = kept()
        used = server.halves.store.used.path.rename(server.halves.store.used.path.with_suffix(".gone"))
        with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="so nothing is used"):
            self.read(server, taken, preparation="0" * 32)
        used.rename(server.halves.store.used.path)
        with contextlib.ExitStack() as taken:
            assert self.read(server, taken, preparation="0" * 32)[0].preparation

    def test_old_halves_that_have_come_back_keep_nobody_from_preparing(self, kept):
        server = kept(made=0.0)
        copy = server.halves.store.path("0" * 32).read_bytes()
        server.halves.store.spend(server.halves.store.take("0" * 32))
        server.halves.store.path("0" * 32).write_bytes(copy)
        with contextlib.ExitStack() as taken:
            assert self.read(server, taken, prepares=True)[0].prepares
        assert not list(server.halves.store.folder.glob("*.half"))

    def test_a_client_that_asks_twice_is_refused(self, kept):
        """Though its own copy and the server's have both come back."""
        server = kept()
        copy = server.halves.store.path("0" * 32).read_bytes()
        with contextlib.ExitStack() as taken:
            self.read(server, taken, preparation="0" * 32)
        server.halves.store.path("0" * 32).write_bytes(copy)
        with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="was used before"):
            self.read(server, taken, preparation="0" * 32)

    @pytest.mark.parametrize("fields", [{"terms": "others"}, {"weights": "others"}])
    def test_a_server_of_other_weights_refuses_what_is_not_its_own(self, fields, kept):
        server = kept(**fields)
        with (
            contextlib.ExitStack() as taken,
            pytest.raises(PrivateInferenceError, match="made with another model, other settings or another version"),
        ):
            self.read(server, taken, preparation="0" * 32)
        assert not list(server.halves.store.headers())

    @pytest.mark.parametrize("fields", [{"terms": "others"}, {"weights": "others"}, {"made": 0.0}, {"format": 1}])
    def test_what_nobody_can_use_is_deleted_at_the_start(self, fields, kept, serve):
        store = kept(**fields).halves.store
        kept("1" * 32)
        serve()
        assert [header.name for header in store.headers()] == ["1" * 32]

    def test_a_header_that_could_not_be_read_again_is_not_written(self, parties, half, tmp_path, monkeypatch):
        store = parties.Store(tmp_path, SERVER)
        monkeypatch.setattr(f"{parties.__name__}.MOST_HEADER_BYTES", 100)
        with pytest.raises(PrivateInferenceError, match="can't be written"):
            store.put(*half())
        assert [path.name for path in tmp_path.iterdir()] == ["store-0"]


def run_on_the_engine(notation: str, protocol: str, log=None):
    """
    A prompt and a token after it in one phase, of the same forms, and in two, all parties in one process: logits of
    both, whether they were out of range, costs of the first phase and of the first pass after it, and their programs.
    """
    from entropy_gpt.evaluation.private_inference.parties.engine import compile_steps
    from entropy_gpt.evaluation.private_inference.parties.local import run_parties
    from entropy_gpt.evaluation.private_inference.parties.participant import (
        Participant,
        compile_preparation,
        compile_prepared_pass,
    )

    config, weights = prepared_weights(notation, n_layer=2)
    private, spans = PrivateSettings(protocol), SPANS[:2]
    tokens = np.random.default_rng(0).integers(2, 101, LENGTH + 1)
    preparation = Preparation(config, private, [Span(0, LENGTH + 3), Span(LENGTH + 3, 1)])
    before = compile_preparation(config, private, preparation)
    after = [compile_prepared_pass(private, preparation, *numbered) for numbered in enumerate(spans)]
    one = [
        compile_steps(
            build_steps(config, private, span, prepared=True), program_variables(config, private, span), private
        )
        for span in spans
    ]

    def take_part(link):
        party = Participant(link, config, private, weights, log if link.rank == SERVER else None)
        party.set_up()
        costs, seed, shares, second = [], bytes([link.rank]) * 32, [], []
        halves = party.prepare(before, preparation, seed, costs.append)
        party.load(preparation, seed, halves)
        # One phase last, since it uses up triples, which are predicted to be there.
        for program, span in zip((*after, *one), 2 * spans, strict=True):
            inputs = client_inputs(config, private, span, tokens[span.start : span.end], weights)
            second.append(party.infer(program, span, inputs if party.is_client else {}))
            shares += [party.party.share(LOGITS), party.party.share(OUT_OF_RANGE)]
        party.forget(preparation)
        return party, shares, costs, second[0]

    parties = run_parties(private, take_part)
    party, _, costs, second = parties[SERVER]
    shares = zip(*(shares for _, shares, _, _ in parties), strict=True)
    found = [party.party.reconstruct(list(parts)) for parts in shares]
    return found[0:4:2], found[4::2], found[1::2], (costs, second), (before, after[0])


@pytest.mark.slow
@pytest.mark.parametrize("notation", ["SM+ScFuFFN", "SM(t)+LN+G"])
def test_the_engine_without_a_protocol_gives_the_same_numbers(notation):
    pytest.importorskip("spu")
    two, one, out_of_range, *_ = run_on_the_engine(notation, "ref2k")
    for first, second in zip(two, one, strict=True):
        assert np.array_equal(first, second)
    assert not any(out_of_range)


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("notation", ["SM+ScFuFFN", "SM+LN+G", "EReg(SM(t)+ScFuFFNi1)"])
def test_two_parties_send_what_was_predicted_and_answer_alike(notation):
    pytest.importorskip("spu")
    from entropy_gpt.evaluation.private_inference.parties.engine import EngineLog

    two, one, out_of_range, costs, programs = run_on_the_engine(notation, "cheetah", EngineLog())
    for first, second in zip(two, one, strict=True):
        assert np.abs(first - second).max() < 0.02
    assert not any(out_of_range)
    for measured, program in zip(costs, programs, strict=True):
        predicted = sum(step.total_bytes for step in program)
        assert sum(step.total_bytes for step in measured) == pytest.approx(predicted, rel=0.1)
