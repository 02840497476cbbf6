"""What each operation waits for, counted, held against the engine over a link that has nothing but a delay."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.costs.price_fitting import Case, case_program, set_case
from entropy_gpt.evaluation.private_inference.parties.engine import Party, make_link
from entropy_gpt.evaluation.private_inference.parties.session import free_port
from entropy_gpt.evaluation.private_inference.parties.slow_link import SlowLink
from entropy_gpt.evaluation.private_inference.program import nonlinear, program, reciprocals
from entropy_gpt.evaluation.private_inference.program.networks import LOOPBACK, Network
from entropy_gpt.evaluation.private_inference.program.settings import SERVER, PrivateSettings


pytestmark = [pytest.mark.private, pytest.mark.slow]
# On the far link, a round trip takes this long at most, and an operation's round trips together.
FAR_SECONDS, MOST_FAR_SECONDS = 0.1, 1.0
# The first run of an operation may pay for keys. Of the others, the fastest on each link counts: load only adds time.
NEAR_RUNS = 4
FAR_RUNS = 2
SECONDS = 60


def shared(name: str, function, *shapes: tuple[int, ...]) -> Case:
    return name, function, [(shape, None) for shape in shapes]


CASES = [
    ("product with weights", lambda ops, a, b: ops.matmul(a, b), [((16, 32), None), ((32, 16), SERVER)]),
    shared("products of shares", lambda ops, a, b: ops.matmul(a, b), (5, 16, 32), (5, 32, 16)),
    ("product of numbers with weights", lambda ops, a, b: ops.multiply(a, b), [((100,), None), ((100,), SERVER)]),
    shared("small product of numbers", lambda ops, a, b: ops.multiply(a, b), (100,), (100,)),
    shared("product of numbers", lambda ops, a, b: ops.multiply(a, b), (17000,), (17000,)),
    shared("scale", lambda ops, a: ops.scale(a, 0.3), (100,)),
    shared("square", lambda ops, a: ops.square(a), (8192,)),
    shared("positive part", lambda ops, a: ops.positive_part(a), (100,)),
    shared("largest", lambda ops, a: ops.largest(a), (1, 15)),
    shared("index of largest", lambda ops, a: ops.index_of_largest(a), (1, 3)),
    shared("any negative", lambda ops, a: ops.any_negative(a), (100,)),
    shared("reciprocal", lambda ops, a: ops.reciprocal(a), (20,)),
    shared("reciprocal root", lambda ops, a: ops.reciprocal_root(a), (20,)),
    shared("tanh", lambda ops, a: ops.tanh(a), (20,)),
    shared("erf", lambda ops, a: ops.erf(a), (20,)),
    shared("maximum", lambda ops, a: program.subtract_maximum(ops, a, 16, 16, (2, 2, 4)), (2, 136)),
    shared("all at once", lambda ops, a: program.subtract_maximum(ops, a, 1, 12, (12,)), (2, 12)),
    shared("exponential", nonlinear.exponentiate, (2, 50)),
    shared("steps", lambda ops, a: reciprocals.reciprocal_by_steps(ops, a, 16), (2, 16, 1)),
    shared(
        "division",
        lambda ops, a, sums: program.divide_and_merge(ops, a, sums, 16, reciprocals.reciprocal_by_chords),
        (2, 16, 8),
        (2, 16, 1),
    ),
]


def far_network(round_trips: float) -> Network:
    return Network("far", 1e12, min(FAR_SECONDS, MOST_FAR_SECONDS / round_trips))


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[float, float, float, float]]:
    """For each case: its counted round trips, its seconds on both links, and those of a far round trip."""
    settings, barrier = PrivateSettings(), threading.Barrier(2)
    programs = [case_program(case, settings) for case in CASES]
    ports = [free_port(), free_port()]
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(SlowLink(("127.0.0.1", port)))) for port in ports]

        def take_part(rank: int) -> list[list[float]]:
            link = make_link(rank, ports[rank], links[1 - rank].address[1], SECONDS)
            party = Party(link, settings)
            taken = [run_case(party, variables, steps) for variables, steps in programs]
            link.stop_link()
            return taken

        def run_case(party: Party, variables: dict, steps: list) -> list[float]:
            set_case(party, variables)
            for step in steps[:-1]:
                party.run(step)
            seconds = []
            for network in (LOOPBACK,) * (1 + NEAR_RUNS) + (far_network(steps[-1].round_trips),) * FAR_RUNS:
                barrier.wait(SECONDS)
                for link in links:
                    link.network = network
                barrier.wait(SECONDS)
                seconds.append(party.run(steps[-1]).seconds)
            return seconds

        with ThreadPoolExecutor(2) as pool:
            taken, _ = pool.map(take_part, range(2))
    return {
        case[0]: (
            steps[-1].round_trips,
            *(min(seconds[1 : 1 + NEAR_RUNS]), min(seconds[1 + NEAR_RUNS :])),
            far_network(steps[-1].round_trips).round_trip_seconds,
        )
        for case, (_, steps), seconds in zip(CASES, programs, taken, strict=True)
    }


@pytest.mark.parametrize("name", [name for name, *_ in CASES])
def test_an_operation_waits_as_often_as_was_counted(measured, name):
    counted, near, far, delay = measured[name]
    # The parties compute while messages travel, so the time on the far link lies between two bounds.
    shortest, longest = far - near, far
    assert shortest / delay <= 1.2 * counted + 0.3
    assert longest / delay >= 0.8 * counted - 0.3
