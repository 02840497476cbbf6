"""Projections to other networks, held against inferences over links with a rate and a delay."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.costs.measured_inference import Inference, make_config
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.slow_link import SlowLink
from entropy_gpt.evaluation.private_inference.program.cost import InferenceCost, project
from entropy_gpt.evaluation.private_inference.program.networks import LOOPBACK, WAN, Network, parse_network
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings

from .serving import PROMPT, SECONDS, Served, make_offer, run_here, serve_until_killed, serving


pytestmark = [pytest.mark.private, pytest.mark.slow]
SERVER_ADDRESS, CLIENT_ADDRESS = "192.0.2.1", "192.0.2.2"
DEVICE = "shaped"
# Of a projection: what is measured lies between.
LEAST, MOST = 0.7, 1.3


def measure(host: str, port: int, on_event: Callable[[dict], None] = lambda event: None) -> list[InferenceCost]:
    """Of the first token of an answer, and of the second."""
    client = Client(host, port, None, SECONDS)
    answer = client.ask(Question(PROMPT, 2), on_event)
    half = len(answer.steps) // 2
    tokens = (replace(answer, steps=steps) for steps in (answer.steps[:half], answer.steps[half:]))
    return [token.cost(client.terms, len(PROMPT), 1, f"TCP to {host}") for token in tokens]


def measure_and_save(host: str, port: int, folder: str):
    for index, cost in enumerate(measure(host, port)):
        cost.save(Path(folder) / f"{index}.json")


@pytest.fixture(scope="module", autouse=True)
def warm_engines():
    """None: a first inference compiles while it runs, so those that are compared with it have to do so too."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(*make_offer()) as served:
        yield served


@pytest.fixture(scope="module")
def loopback(served) -> list[InferenceCost]:
    return measure(*served.server.address)


def check_projection(loopback: InferenceCost, network: Network, measured: InferenceCost):
    projected = project(loopback, network)
    share = projected / measured.seconds
    print(f"\n{network.name}: {projected:.2f} s projected, {measured.seconds:.2f} s measured, {share:.2f} of it")
    fuller = max(sum(step.sent_bytes for step in measured.steps), sum(step.received_bytes for step in measured.steps))
    assert measured.seconds > fuller * 8 / network.bits_per_second
    assert LEAST * projected < measured.seconds < MOST * projected


def test_through_a_slow_link(served, loopback):
    networks = [parse_network(text) for text in ("10Mbps,1ms", "500Mbps,50ms")]
    waiting = iter([*networks, LOOPBACK])
    with contextlib.closing(SlowLink(served.server.address)) as link:

        def change_network(event: dict):
            if event["event"] in ("set-up", "token"):
                link.network = next(waiting)

        measured = measure(*link.address, on_event=change_network)
    for costs in zip(loopback, networks, measured, strict=True):
        check_projection(*costs)


def test_one_layer_over_a_slow_link():
    network = WAN  # where what computing takes, which depends on what else runs, is a small part
    config = make_config("SM+ScFuFFN", 8, n_layer=4, n_embd=48, n_head=4, vocab_size=64)
    inference = Inference("three blocks and the last", config, PrivateSettings(), 8)
    layer = 2
    fast, slow = inference.measure(), inference.measure_slowed(network, layer)
    steps, rest = (
        [[step for step in cost.steps if (step.layer == layer) == chosen] for cost in (fast, slow)]
        for chosen in (True, False)
    )
    projected = project(replace(fast, steps=steps[0], seconds=sum(step.seconds for step in steps[0])), network)
    assert LEAST * projected < sum(step.seconds for step in steps[1]) < MOST * projected
    assert sum(step.seconds for step in rest[1]) < projected
    assert slow.total_bytes == pytest.approx(fast.total_bytes, rel=0.01)


def configure(*command: str):
    """Runs a command on networks; where that is not permitted, there is nothing to test."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")


@contextlib.contextmanager
def joined_namespaces(network: Network) -> Iterator[tuple[str, str]]:
    """The server's and the client's network namespace, between which there is a network."""
    names = [f"entropy-gpt-{os.getpid()}-{side}" for side in ("server", "client")]
    delay = f"{network.round_trip_seconds / 2 * 1e6:.0f}us"
    shape = ("netem", "delay", delay, "rate", f"{network.bits_per_second:.0f}bit", "limit", "10000")
    try:
        for name in names:
            configure("ip", "netns", "add", name)
        pair = ("type", "veth", "peer", "name", DEVICE, "netns", names[1])
        configure("ip", "-n", names[0], "link", "add", DEVICE, *pair)
        for name, address in zip(names, (SERVER_ADDRESS, CLIENT_ADDRESS), strict=True):
            configure("ip", "-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                configure("ip", "-n", name, "link", "set", device, "up")
            configure("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *shape)
        yield tuple(names)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextlib.contextmanager
def running(function: Callable, *arguments, namespace: str) -> Iterator[subprocess.Popen]:
    """A function of a test in a process of its own, to which a namespace is all of the network."""
    with run_here(function, *arguments, before=("ip", "netns", "exec", namespace)) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not (shutil.which("ip") and shutil.which("tc")), reason="needs ip and tc, of iproute2")
def test_between_network_namespaces(loopback, tmp_path):
    network = parse_network("50Mbps,20ms")
    with (
        joined_namespaces(network) as (server_side, client_side),
        running(serve_until_killed, SERVER_ADDRESS, "cheetah", namespace=server_side) as server,
    ):
        arguments = SERVER_ADDRESS, int(server.stdout.readline()), str(tmp_path)
        with running(measure_and_save, *arguments, namespace=client_side) as client:
            assert client.wait(3 * SECONDS) == 0
    for index, cost in enumerate(loopback):
        check_projection(cost, network, InferenceCost.load(tmp_path / f"{index}.json"))
