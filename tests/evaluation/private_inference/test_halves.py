"""What a server keeps for whom."""

import contextlib
from types import SimpleNamespace

import pytest


pytest.importorskip("spu")

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.limits import Limits
from entropy_gpt.evaluation.private_inference.parties.preparations import measure_half, pass_spans
from entropy_gpt.evaluation.private_inference.parties.server import Server
from entropy_gpt.evaluation.private_inference.parties.terms import Offer
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.evaluation.private_inference.program.two_phases import Preparation

from .example_half import make_half
from .phases import prepared_weights


@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFNi1)"])
@pytest.mark.parametrize("new_tokens", [1, 2, 7])
def test_a_long_answer_is_measured_by_few_of_its_tokens(notation, new_tokens):
    config, _ = prepared_weights(notation, n_layer=1)
    spans = pass_spans(6, new_tokens, 1)
    products = Preparation(config, PrivateSettings(), spans).products
    expected = sum(product.nbytes for product in products.values()), len(products)
    assert measure_half(config, PrivateSettings(), spans) == expected


@pytest.fixture
def serve(tmp_path):
    config, weights = prepared_weights("SM+ScFuFFN", n_layer=1)
    offer, servers = Offer(config, weights, "SM+ScFuFFN", PrivateSettings(), ""), []

    def make(**options):
        options = {"limits": Limits(answers=8), "prepared": tmp_path, "report": lambda line: None, **options}
        servers.append(Server(offer, "127.0.0.1", 0, None, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def read(server, taken, client: str = "one", new_tokens: int = 1, **message):
    asked = {"length": 6, "new_tokens": new_tokens, "answers": 1, **message}
    return server._read_request(SimpleNamespace(peer=client), asked, taken)


@pytest.fixture
def kept(serve, tmp_path):
    """A server with a half, as a function of the half's fields."""

    def make(name: str = "0" * 32, **fields):
        server = serve()
        fields = {**dict(zip(("terms", "weights"), server.halves.of, strict=True)), **fields}
        server.halves.store.put(*make_half(name, **fields))
        return server

    return make


def test_what_is_being_made_has_its_room_already(serve):
    config, settings = serve().offer.config, PrivateSettings()
    size, _ = measure_half(config, settings, pass_spans(6, 1, 1))
    server = serve(most_prepared_bytes=2 * size)
    with contextlib.ExitStack() as taken, contextlib.ExitStack() as other:
        request, use, _ = read(server, taken, prepares=True)
        assert request.prepares and use.positions == 0
        with pytest.raises(PrivateInferenceError, match=r"preparations of this client would take .*--prepared-mb"):
            read(server, other, prepares=True)
        read(server, other, "two", prepares=True)
        with pytest.raises(PrivateInferenceError, match=r"^preparations would take"):
            read(server, other, "three", prepares=True)
    read(server, taken, prepares=True)
    taken.close()


def test_limits_come_before_anything_is_computed(serve, monkeypatch):
    def measure(*arguments):
        raise AssertionError("too early")

    server = serve()
    monkeypatch.setattr(f"{Preparation.__init__.__module__}.Preparation", measure)
    with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="9 answers are asked for; 8"):
        read(server, taken, new_tokens=9, prepares=True)


def test_what_does_not_fit_a_header_is_not_begun(serve, monkeypatch):
    monkeypatch.setattr("entropy_gpt.evaluation.private_inference.parties.halves.MOST_PRODUCTS", 3)
    with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="so long an answer can't be"):
        read(serve(), taken, prepares=True)


def test_a_half_is_for_the_client_that_it_was_made_with(kept):
    server = kept()
    with contextlib.ExitStack() as taken:
        with pytest.raises(PrivateInferenceError, match="was made with another client"):
            read(server, taken, "two", preparation="0" * 32)
        request, *_ = read(server, taken, preparation="0" * 32)
        assert request.preparation.endswith(f"{'0' * 32}-0.taken")
    assert [path.name for path in server.halves.store.folder.iterdir()] == ["store-0"]


def test_a_half_stays_where_its_use_cannot_be_noted(kept):
    server = kept()
    used = server.halves.store.used.path.rename(server.halves.store.used.path.with_suffix(".gone"))
    with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="so nothing is used"):
        read(server, taken, preparation="0" * 32)
    used.rename(server.halves.store.used.path)
    with contextlib.ExitStack() as taken:
        assert read(server, taken, preparation="0" * 32)[0].preparation


def test_old_halves_that_have_come_back_keep_nobody_from_preparing(kept):
    server = kept(made=0.0)
    copy = server.halves.store.path("0" * 32).read_bytes()
    server.halves.store.spend(server.halves.store.take("0" * 32))
    server.halves.store.path("0" * 32).write_bytes(copy)
    with contextlib.ExitStack() as taken:
        assert read(server, taken, prepares=True)[0].prepares
    assert not list(server.halves.store.folder.glob("*.half"))


def test_a_client_that_asks_twice_is_refused(kept):
    """Though its own copy and the server's have both come back."""
    server = kept()
    copy = server.halves.store.path("0" * 32).read_bytes()
    with contextlib.ExitStack() as taken:
        read(server, taken, preparation="0" * 32)
    server.halves.store.path("0" * 32).write_bytes(copy)
    with contextlib.ExitStack() as taken, pytest.raises(PrivateInferenceError, match="was used before"):
        read(server, taken, preparation="0" * 32)


@pytest.mark.parametrize("fields", [{"terms": "others"}, {"weights": "others"}])
def test_a_server_of_other_weights_refuses_what_is_not_its_own(fields, kept):
    server = kept(**fields)
    with (
        contextlib.ExitStack() as taken,
        pytest.raises(PrivateInferenceError, match="made with another model, other settings or another version"),
    ):
        read(server, taken, preparation="0" * 32)
    assert not list(server.halves.store.headers())


@pytest.mark.parametrize("fields", [{"terms": "others"}, {"weights": "others"}, {"made": 0.0}, {"format": 1}])
def test_what_nobody_can_use_is_deleted_at_the_start(fields, kept, serve):
    store = kept(**fields).halves.store
    kept("1" * 32)
    serve()
    assert [header.name for header in store.headers()] == ["1" * 32]
