"""A private server with a tiny model, and a gateway before it, both in this process; engines have their own."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import uvicorn

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights
from entropy_gpt.gateway.app import make_app
from entropy_gpt.terminal.private_gateway import open_port
from entropy_gpt.training.model_tokenizer import hash_vocabulary
from entropy_gpt.training.tokenizer import load_tokenizer
from entropy_gpt.workflows.private_client import PrivateClient
from tests.entropy_gpt.test_private import save_model


# After which something hangs; a machine may be busy with other work.
SECONDS = 1800


@dataclass
class Reply:
    """An answer of HTTP."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json["error"]


@dataclass
class Running:
    """A gateway that listens on the loopback."""

    port: int
    client: PrivateClient
    server: Server

    def ask(self, method: str, path: str, body: bytes | dict | None = None, **headers: str) -> Reply:
        """One request, as a client of HTTP sends it; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        if body is not None:
            sent = {"content-type": "application/json"} | sent
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def complete(self, **fields) -> Reply:
        return self.ask(
            "POST", "/v1/completions", {"model": "private", "prompt": "def main(", "max_tokens": 1, **fields}
        )


@pytest.fixture(scope="module")
def model(tmp_path_factory, text) -> Path:
    source = "\n".join(path.read_text() for path in text.iterdir())
    return save_model(tmp_path_factory.mktemp("model"), source)


@pytest.fixture(scope="module")
def clear(model):
    """The most likely continuation, and the log-probabilities of all tokens after it, of the model in the clear."""
    loaded, words = load_language_model(model).eval(), load_tokenizer(str(model))

    def compute(prompt: str, new_tokens: int) -> tuple[list[int], torch.Tensor]:
        tokens = words(prompt)["input_ids"]
        with torch.no_grad():
            for _ in range(new_tokens):
                tokens.append(int(loaded(torch.tensor([tokens])).logits[0, -1].argmax()))
            return tokens, loaded(torch.tensor([tokens])).logits[0].log_softmax(-1)

    compute.words = words
    return compute


@contextlib.contextmanager
def serving(model: Path, **settings) -> Iterator[Server]:
    loaded, words = load_language_model(model), load_tokenizer(str(model))
    vocabulary = hash_vocabulary(words, loaded.config.vocab_size)
    offer = Offer(*prepare_weights(loaded), loaded.config.notation, PrivateSettings(**settings), vocabulary)
    server = Server(offer, "127.0.0.1", 0, None, SECONDS, UNLIMITED, lambda line: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.closing(server):
        yield server


@contextlib.contextmanager
def gateway(model: Path, server: Server, **options) -> Iterator[Running]:
    protocol = server.offer.settings.protocol
    client = PrivateClient(f"127.0.0.1:{server.address[1]}", tokenizer=model, timeout=SECONDS, protocol=protocol)
    with open_port("127.0.0.1", 0) as listener:
        settings = uvicorn.Config(make_app(client, **options), log_level="warning", timeout_graceful_shutdown=1)
        runner = uvicorn.Server(settings)
        thread = threading.Thread(target=runner.run, args=([listener],), daemon=True)
        thread.start()
        while not runner.started:
            time.sleep(0.01)
        yield Running(listener.getsockname()[1], client, server)
        runner.should_exit = True
        thread.join(SECONDS)


@pytest.fixture(scope="module")
def running(model) -> Iterator[Running]:
    pytest.importorskip("spu")
    with serving(model, protocol="semi2k") as server, gateway(model, server) as running:
        yield running
