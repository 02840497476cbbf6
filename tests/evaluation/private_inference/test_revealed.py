"""What the parties see of two phases: nothing of the prompt or the weights, as long as masks serve once."""

import math
from collections import Counter

import numpy as np
import pytest

from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation

from .phases import LENGTH, SPANS, draw_masks, encode, prepared_weights


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
