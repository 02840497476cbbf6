"""Preparations between two processes: made, used once, and refused where they do not fit."""

import contextlib
import copy
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from entropy_gpt.evaluation.errors import PrivateInferenceError
from tests.architectures import make_model

from .serving import QUICK, engines_here


pytest.importorskip("spu")

from entropy_gpt.evaluation.private_inference.parties import party_process
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.job import Job, Request
from entropy_gpt.evaluation.private_inference.parties.limits import UNLIMITED
from entropy_gpt.evaluation.private_inference.parties.local import run_parties
from entropy_gpt.evaluation.private_inference.parties.participant import Participant
from entropy_gpt.evaluation.private_inference.parties.party_process import PartyProcess
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.store import Store
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.program import LOGITS, ProgramConfig, bounds_name
from entropy_gpt.evaluation.private_inference.program.settings import CLIENT, SERVER, PrivateSettings
from entropy_gpt.evaluation.private_inference.program.weights import prepare_weights


pytestmark = [pytest.mark.private, pytest.mark.slow]
PROMPT = [2, 3, 5, 7, 11]
SECONDS = 600


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model("SM+ScFuFFN", n_layer=1)


def make_offer(model, protocol: str = QUICK) -> Offer:
    return Offer(*prepare_weights(model), "SM+ScFuFFN", PrivateSettings(protocol), "")


@contextlib.contextmanager
def served(model, folder: Path | None, said: list[str], **options) -> Iterator[tuple[str, int]]:
    offer = model if isinstance(model, Offer) else make_offer(model)
    server = Server(offer, "127.0.0.1", 0, None, SECONDS, UNLIMITED, said.append, prepared=folder, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.address
    finally:
        server.close()


def connect(address: tuple[str, int], folder: Path | None, protocol: str = QUICK) -> contextlib.closing:
    return contextlib.closing(Client(*address, None, SECONDS, protocol, prepared=folder))


def halves(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.half"))


def test_an_answer_of_two_phases(model, tmp_path):
    """Made for more than is asked, in another connection, and used up; what is left is computed in one phase."""
    said: list[str] = []
    ours, theirs = tmp_path / "client", tmp_path / "server"
    with served(make_offer(model, "cheetah"), theirs, said) as address:
        with connect(address, ours, "cheetah") as client:
            made = client.prepare(8, 2)
            assert client.find_preparation(len(PROMPT)) == made.prepared
            assert client.find_preparation(9) is None
        assert halves(ours) == [f"{made.prepared}-1.half"]
        assert halves(theirs) == [f"{made.prepared}-0.half"]
        # Of the folder and its list: this side does not notice.
        backup = shutil.copytree(ours, tmp_path / "backup" / "client")
        shutil.copy(client.store.used.path, backup.parent)
        with connect(address, ours, "cheetah") as client:
            outcome = client.ask(Question(PROMPT, 2), preparation=client.find_preparation(len(PROMPT), 2))
            assert not halves(ours) and not halves(theirs)
            assert client.find_preparation(len(PROMPT)) is None
            one_phase = client.ask(Question(PROMPT))
        with (
            connect(address, backup, "cheetah") as client,
            pytest.raises(PrivateInferenceError, match="it was used"),
        ):
            client.ask(Question(PROMPT, 2), preparation=client.find_preparation(len(PROMPT), 2))
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + outcome.tokens])).logits[0, len(PROMPT) - 1 : -1].numpy()
    assert np.abs(np.concatenate(outcome.logits) - logits).max() < 0.1
    assert outcome.before == made.steps
    assert sum(step.total_bytes for step in outcome.steps) < sum(step.total_bytes for step in one_phase.steps)
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
        for wait in (0.3, 1, 3):
            client = Client(*address, None, SECONDS, QUICK, prepared=tmp_path / "client")
            before = engines_here()
            thread = threading.Thread(target=_try, args=(client,))
            thread.start()
            time.sleep(wait)
            for process in engines_here():
                if process not in before:
                    process.kill()
            thread.join()
            client.close()
        with connect(address, tmp_path / "client") as client:
            for header in client.store.headers():
                assert header.shares
            client.prepare(len(PROMPT))
            assert client.ask(Question(PROMPT), preparation=client.find_preparation(len(PROMPT))).tokens


def used_names(store: Store) -> list[str]:
    return [name for name in store.used.path.read_text().split("\n") if name]


def test_each_repeat_takes_another_preparation(model, tmp_path):
    """With bounds that no number keeps: three are used up, each once, and a fourth one stays."""
    offer = make_offer(model)
    name = bounds_name(LOGITS)
    offer.weights[name] = np.full_like(offer.weights[name], 1e-4)
    with served(offer, tmp_path / "server", []) as address:
        with connect(address, tmp_path / "client") as client:
            made = [client.prepare(len(PROMPT)).prepared for _ in range(4)]
            with pytest.raises(PrivateInferenceError, match="out of range 3 times"):
                client.ask(Question(PROMPT))
        stores = [client.store, Store(tmp_path / "server", SERVER)]
    assert used_names(stores[0]) == used_names(stores[1])
    assert len({*used_names(stores[0])}) == 3
    assert [header.name for store in stores for header in store.headers()] == 2 * [*{*made} - {*used_names(stores[0])}]


class Doubtful(PartyProcess):
    """Has one token computed anew, though its numbers were in range."""

    doubted = None

    def _was_out_of_range(self, index: int) -> bool:
        found = super()._was_out_of_range(index)
        if index != self.doubted:
            return found
        self.doubted = None
        return True


@pytest.mark.parametrize("preparations", [1, 2])
@pytest.mark.parametrize("doubted", [0, 1])
def test_an_answer_that_begins_anew_is_right(preparations, doubted, model, tmp_path, monkeypatch):
    """With another preparation, or in one phase where there is none, for all that is left."""
    monkeypatch.setattr(party_process, "EngineLog", lambda: None)
    config, weights = prepare_weights(model)
    settings = PrivateSettings(QUICK)

    def take_part(link) -> tuple[list[int], list[str], list[str]]:
        store, of_client, said = Store(tmp_path / str(link.rank), link.rank), link.rank == CLIENT, []
        job = Job(link.rank, ProgramConfig.of(config), settings, SECONDS, str(store.folder))
        process = Doubtful(job, lambda event: said.append(event["event"]))
        process.link, process._weights_hash, process.tables = link, "", {}
        process.participant = Participant(link, config, settings, None if of_client else weights)
        process.participant.set_up()
        names: list[str] = []

        def take() -> str | None:
            if not names:
                return None
            taken = store.take(names.pop())
            store.spend(taken)
            return str(taken)

        for _ in range(preparations):
            process.prepare(Request(8, 3, 1, prepares=True))
            process.answer(lambda: json.dumps(take()))
        names += sorted(header.name for header in store.headers())
        process.doubted = doubted
        process.prepare(Request(len(PROMPT), 3, 1, prompt=PROMPT if of_client else None, preparation=take()))
        process.answer(lambda: json.dumps(take()))
        return process.chosen, used_names(store), said

    (_, *of_server), (tokens, used, said) = run_parties(settings, take_part)
    expected = torch.tensor([PROMPT])
    with torch.no_grad():
        for _ in range(3):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    assert tokens == expected[0, len(PROMPT) :].tolist()
    assert len({*used}) == len(used) == preparations
    assert of_server[0] == used
    assert said.count("another") == 1
    assert said.count("prepared before") == preparations


def _try(client: Client):
    with contextlib.suppress(PrivateInferenceError):
        client.prepare(len(PROMPT))
