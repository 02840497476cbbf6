"""
What the parts of a private inference send, measured: operations alone, between two threads, and a fit of their prices.

python -m entropy_gpt.evaluation.private_inference.costs.price_fitting  measures (two minutes) into prices.json
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from entropy_gpt.evaluation.origin import collect_origin
from entropy_gpt.evaluation.private_inference.parties.engine import (
    CompiledStep,
    EngineLog,
    Party,
    compile_steps,
    engine_versions,
)
from entropy_gpt.evaluation.private_inference.parties.local import run_parties
from entropy_gpt.evaluation.private_inference.program.arithmetic import Arithmetic
from entropy_gpt.evaluation.private_inference.program.cost import MEGA, StepCost
from entropy_gpt.evaluation.private_inference.program.counting import CountingArithmetic, Shape, Stock, make_shape
from entropy_gpt.evaluation.private_inference.program.prices import PRICES, Prices, Sample, price_of
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.steps import Step


# Messages of a step in which oblivious transfers are made in stock, which none of the others comes near.
STOCKING_MESSAGES = 1000
# A case of the fit: a name, a function of an arithmetic and of tensors, and the tensors' shapes and owners.
Case = tuple[str, Callable, list[tuple[tuple[int, ...], int | None]]]


def fit(samples: list[Sample]) -> dict[str, float]:
    """
    The prices that explain measured bytes with the least squares of relative errors.

    Raises:
        `ValueError`: If the samples leave a price open.
    """
    parts = sorted({part for sample in samples for part in sample.counts})
    weights = np.array([1 / sample.measured_bytes for sample in samples])
    counts = np.array([[sample.counts.get(part, 0) for part in parts] for sample in samples]) * weights[:, None]
    scales = np.abs(counts).max(axis=0)
    solution, _, rank, _ = np.linalg.lstsq(counts / scales, np.ones(len(samples)), rcond=None)
    if rank < len(parts):
        raise ValueError(f"{len(samples)} samples do not separate {len(parts)} prices: measure more shapes.")
    return dict(zip(parts, (solution / scales).tolist(), strict=True))


def fitting_cases() -> list[Case]:
    """Operations alone, at shapes of which each price shows somewhere."""
    return [
        *(
            _product_case(*sizes, None, SERVER)
            for sizes in ((32, 192, 192), (48, 768, 96), (1, 768, 768), (5, 100, 3))
        ),
        *(_product_case(*sizes, CLIENT, SERVER) for sizes in ((16, 101, 48), (24, 1024, 192))),
        *(_product_case(*sizes, None, None) for sizes in ((12, 12, 12), (32, 64, 32), (64, 64, 64), (1, 64, 64))),
        *(_case(lambda ops, a, b: ops.multiply(a, b), n, None, None) for n in (100, 1000, 4000, 8192, 16384, 65536)),
        *(_case(lambda ops, a, b: ops.multiply(a, b), n, None, SERVER) for n in (100, 8192, 30000)),
        *(_case(lambda ops, a: ops.square(a), n, None) for n in (100, 8192, 30000)),
        *(_case(lambda ops, a: ops.scale(a, 0.3), n, None) for n in (1000, 20000, 60000)),
        *(_case(lambda ops, a: ops.reveal(a), n, None) for n in (1000, 20000)),
        *(_case(lambda ops, a: ops.positive_part(a), n, None) for n in (1000, 20000, 60000)),
        *(_case(lambda ops, a, b: ops.is_less(a, b), n, None, None) for n in (1000, 20000, 60000)),
        *(_case(lambda ops, a, b: ops.keep(a, ops.is_less(a, b)), n, None, None) for n in (1000, 20000)),
        *(
            _case(lambda ops, a, b, c: ops.both(ops.is_less(a, b), ops.is_less(b, c)), n, None, None, None)
            for n in (1000, 20000)
        ),
        *(_case(lambda ops, a: ops.reciprocal(a), n, None) for n in (32, 1000, 4000)),
        *(_case(lambda ops, a: ops.reciprocal_root(a), n, None) for n in (32, 1000, 4000)),
        *(_case(lambda ops, a: ops.tanh(a), n, None) for n in (1000, 20000)),
        *(_case(lambda ops, a: ops.erf(a), n, None) for n in (1000, 20000)),
        *(_case(lambda ops, a: ops.index_of_largest(a), n, None) for n in (500, 2000)),
        *(_case(lambda ops, a: ops.any_negative(a), n, None) for n in (1000, 20000)),
    ]


def _product_case(rows: int, inner: int, columns: int, left: int | None, right: int | None) -> Case:
    name = f"product {rows}x{inner}x{columns}, owners {left} and {right}"
    return name, lambda ops, a, b: ops.matmul(a, b), [((rows, inner), left), ((inner, columns), right)]


def _case(function: Callable, numbers: int, *owners: int | None) -> Case:
    shape = (1, numbers)
    code = function.__code__
    return f"{code.co_names[0]} of {numbers}, owners {owners}", function, [(shape, owner) for owner in owners]


def measure_samples(cases: list[Case], settings: PrivateSettings, log: EngineLog) -> list[Sample]:
    """Runs cases between two threads, each twice in one connection: what the second time takes is no set-up."""
    stock = Stock()
    stock.triples = 0
    programs = [case_program(case, settings) for case in cases]
    costs = _run_pair(programs, settings, log)
    samples = []
    for (name, function, tensors), repeated in zip(cases, costs, strict=True):
        for _ in repeated:
            arithmetic = CountingArithmetic(settings, stock)
            function(arithmetic, *(make_shape(shape, owner) for shape, owner in tensors))
        cost = repeated[-1]
        if max(cost.sent_messages, cost.received_messages) < STOCKING_MESSAGES:
            samples.append(Sample(name, dict(arithmetic.counts), cost.total_bytes))
    return samples


def case_program(case: Case, settings: PrivateSettings) -> tuple[dict[str, Shape], list[CompiledStep]]:
    """The variables that the parties set, and the compiled steps: shares are sums of one of each party."""
    name, function, tensors = case
    variables, steps = {}, []
    for index, (shape, owner) in enumerate(tensors):
        tensor = f"{name} {index}"
        if owner is not None:
            variables[tensor] = make_shape(shape, owner)
            continue
        parts = (f"{tensor} of the server", f"{tensor} of the client")
        variables |= {parts[rank]: make_shape(shape, rank) for rank in (SERVER, CLIENT)}
        steps.append(Step("share", None, _add, parts, (tensor,)))
    inputs = tuple(f"{name} {index}" for index in range(len(tensors)))
    steps.append(Step(name, None, function, inputs, ("result",)))
    return variables, compile_steps(steps, variables, settings)


def _add(ops: Arithmetic, left, right):
    return left + right


def set_case(party: Party, variables: dict[str, Shape]):
    """Sets the variables of a case, to numbers of no account."""
    for name, shape in variables.items():
        if shape.owner == party.link.rank:
            party.set_own(name, np.full(shape.shape, 0.6, np.float32))
        else:
            party.set_foreign(name, shape.shape, shape.owner)


def _run_pair(
    programs: list[tuple[dict[str, Shape], list[CompiledStep]]], settings: PrivateSettings, log: EngineLog
) -> list[list[StepCost]]:
    """What the last step of each program took, the first and the second time, by the server's count."""

    def take_part(link) -> list[list[StepCost]]:
        party = Party(link, settings, log if link.rank == SERVER else None)
        taken = []
        for variables, steps in programs:
            set_case(party, variables)
            taken.append([[party.run(step) for step in steps][-1] for _ in range(2)])
        return taken

    return run_parties(settings, take_part)[SERVER]


def measure_prices(log: EngineLog) -> Prices:
    """Measures all cases and fits the prices."""
    settings = PrivateSettings()
    samples = measure_samples(fitting_cases(), settings, log)
    found = fit(samples)
    for sample in samples:
        sample.fitted_bytes = price_of(sample.counts, found)
    return Prices(found, samples, settings, **collect_origin(torch.device("cpu"), engine_versions()))


def main():
    parser = argparse.ArgumentParser(
        description=f"Measures what the parts of a private inference send, and replaces {PRICES.name} (two minutes)."
    )
    parser.parse_args()
    prices = measure_prices(EngineLog())
    prices.save(PRICES)
    for sample in prices.samples:
        error = sample.fitted_bytes / sample.measured_bytes - 1
        print(f"{sample.name:60} {sample.measured_bytes / MEGA:10.3f} MB {error:+8.2%}")
    for part, price in prices.bytes.items():
        print(f"{part:40} {price:14,.2f} bytes")


if __name__ == "__main__":
    main()
