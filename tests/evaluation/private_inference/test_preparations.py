"""Preparations between two processes: made, used once, and refused where they do not fit."""

import contextlib
import copy
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from entropy_gpt.evaluation.errors import PrivateInferenceError
from tests.architectures import make_model


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights


pytestmark = [pytest.mark.private, pytest.mark.slow]
PROMPT = [2, 3, 5, 7, 11]
SECONDS = 600


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model("SM+ScFuFFN", n_layer=1)


@contextlib.contextmanager
def served(model, folder: Path | None, said: list[str], **options) -> Iterator[tuple[str, int]]:
    offer = Offer(*prepare_weights(model), "SM+ScFuFFN", PrivateSettings(), "")
    server = Server(offer, "127.0.0.1", 0, None, SECONDS, UNLIMITED, said.append, prepared=folder, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.address
    finally:
        server.close()


def connect(address: tuple[str, int], folder: Path | None) -> contextlib.closing:
    return contextlib.closing(Client(*address, None, SECONDS, prepared=folder))


def halves(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.half"))


def test_an_answer_of_two_phases(model, tmp_path):
    """Made for more than is asked, in another connection, and used up; what is left is computed in one phase."""
    said: list[str] = []
    ours, theirs = tmp_path / "client", tmp_path / "server"
    with served(model, theirs, said) as address:
        with connect(address, ours) as client:
            made = client.prepare(8, 2)
            assert client.find_preparation(len(PROMPT)) == made.prepared
            assert client.find_preparation(9) is None
        assert halves(ours) == [f"{made.prepared}-1.half"]
        assert halves(theirs) == [f"{made.prepared}-0.half"]
        # Of the folder and its list: this side does not notice.
        backup = shutil.copytree(ours, tmp_path / "backup" / "client")
        shutil.copy(client.store.used, backup.parent)
        with connect(address, ours) as client:
            outcome = client.ask(Question(PROMPT, 2), preparation=client.find_preparation(len(PROMPT), 2))
            assert not halves(ours) and not halves(theirs)
            assert client.find_preparation(len(PROMPT)) is None
            one_phase = client.ask(Question(PROMPT))
        with (
            connect(address, backup) as client,
            pytest.raises(PrivateInferenceError, match="it was used"),
        ):
            client.ask(Question(PROMPT, 2), preparation=client.find_preparation(len(PROMPT), 2))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + outcome.tokens])).logits[0, len(PROMPT) - 1 : -1].numpy()
    assert np.abs(np.concatenate(outcome.logits) - logits).max() < 0.1
    assert outcome.before == made.steps
    assert sum(step.total_bytes for step in outcome.steps) < sum(step.total_bytes for step in one_phase.steps) / 3
    assert any("prepares 2 tokens after 8" in line for line in said)
    assert any("(prepared)" in line for line in said)


def test_a_server_of_other_weights_has_deleted_what_is_not_its_own(model, tmp_path):
    """One number of one weight differs; all that a client learns of the model is the same."""
    with served(model, tmp_path / "server", []) as address, connect(address, tmp_path / "client") as client:
        made = client.prepare(len(PROMPT))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(weight for name, weight in other.named_parameters() if "attn" in name and weight.ndim == 2)[0, 0] += 0.1
    with served(other, tmp_path / "server", []) as address, connect(address, tmp_path / "client") as client:
        assert client.find_preparation(len(PROMPT)) is None
        with pytest.raises(PrivateInferenceError, match="this preparation is not here"):
            client.ask(Question(PROMPT), preparation=made.prepared)
    assert not halves(tmp_path / "server") and not halves(tmp_path / "client")


def test_a_server_says_what_it_does_not_keep(model, tmp_path):
    with served(model, None, []) as address:
        for ask in (lambda client: client.prepare(4), lambda client: client.ask(Question([2]), preparation="0" * 32)):
            with connect(address, tmp_path / "client") as client:
                client.store.path("0" * 32).write_bytes(b"")
                with pytest.raises(PrivateInferenceError, match=r"kept here \(serve --prepared\)"):
                    ask(client)
    with (
        served(model, tmp_path / "server", [], most_prepared_bytes=1000) as address,
        connect(address, tmp_path / "client") as client,
        pytest.raises(PrivateInferenceError, match=r"is the most \(--prepared-mb\)"),
    ):
        client.prepare(4)


def test_a_client_that_is_killed_leaves_whole_halves_or_none(model, tmp_path):
    said: list[str] = []
    with served(model, tmp_path / "server", said) as address:
        for wait in (1, 8, 15):
            client = Client(*address, None, SECONDS, prepared=tmp_path / "client")
            before = {process.pid for process in psutil.Process().children()}
            thread = threading.Thread(target=_try, args=(client,))
            thread.start()
            time.sleep(wait)
            for process in psutil.Process().children():
                if process.pid not in before:
                    process.kill()
            thread.join()
            client.close()
        with connect(address, tmp_path / "client") as client:
            for header in client.store.headers():
                assert header.shares
            client.prepare(len(PROMPT))
            assert client.ask(Question(PROMPT), preparation=client.find_preparation(len(PROMPT))).tokens


def _try(client: Client):
    with contextlib.suppress(PrivateInferenceError):
        client.prepare(len(PROMPT))
