"""Answers in one phase and in two, on numbers of fixed point, for tests."""

import numpy as np
import torch

from entropy_gpt.evaluation.private_inference.program.fixed_point import FixedPointArithmetic
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, build_steps
from entropy_gpt.evaluation.private_inference.program.steps import Span, run_steps
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation
from entropy_gpt.evaluation.private_inference.program.variables import client_inputs
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from tests.architectures import make_model


LENGTH = 9
# The prompt, and two tokens after it.
SPANS = [Span(0, LENGTH), Span(LENGTH, 1), Span(LENGTH + 1, 1)]


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
