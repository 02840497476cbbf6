"""`PrivateClient`: several prompts over one connection, which is made anew when it breaks."""

import functools
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.generation import BaseStreamer
from typer.testing import CliRunner

from entropy_gpt.commands.main import app
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import (
    NO_HALF,
    TURN_OVER,
    Channel,
    ClosedError,
    RefusalError,
)
from entropy_gpt.evaluation.private_inference.parties.client import Client
from entropy_gpt.evaluation.private_inference.parties.drafts import DRAFT_TOKENS, Drafts
from entropy_gpt.evaluation.private_inference.parties.question import Question
from entropy_gpt.evaluation.private_inference.parties.session import Events
from entropy_gpt.evaluation.private_inference.parties.store import Store
from entropy_gpt.evaluation.private_inference.parties.terms import Terms
from entropy_gpt.evaluation.private_inference.program.program import ProgramConfig
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.programs.quickstart.page import CARDS
from entropy_gpt.workflows.private_answer import PrivateAnswer
from entropy_gpt.workflows.private_client import PrivateClient
from modeling_entropy_gpt import EntropyGPTConfig
from tests.entropy_gpt.gateway.conftest import serving

from .test_private import PROMPT, SIZES, save_model


pytest.importorskip("spu")


class Notes(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.given, self.ended = [], 0

    def put(self, value: torch.Tensor):
        self.given.append(value)

    def end(self):
        self.ended += 1


@pytest.fixture(scope="module")
def model(tmp_path_factory, text) -> Path:
    source = "\n".join(path.read_text() for path in text.iterdir())
    return save_model(tmp_path_factory.mktemp("model"), source)


@pytest.fixture(scope="module")
def address(model) -> Iterator[str]:
    with serving(model) as server:
        yield f"127.0.0.1:{server.address[1]}"


def test_what_can_not_be_asked_is_refused_and_its_streamer_ends(model, address):
    with PrivateClient(address, tokenizer=model) as client:
        long, types = ("x " * 99, "n_positions=32"), "a prompt is one text, or a list of tokens"
        wrong_types = [(prompt, types) for prompt in (5, None, ["a", "b"], [1.5])]
        for prompt, said in (("", "the prompt is empty"), ([10**6], "token 1000000"), long, *wrong_types):
            with pytest.raises(UserError, match=said):
                client.generate(prompt)
        with pytest.raises(UserError, match="--temperature -1"):
            client.generate(PROMPT, temperature=-1)
        for wrong in ({"max_new_tokens": 99}, {"max_new_tokens": 0}, {"top_p": 2}, {"prompt": ""}):
            notes = Notes()
            with pytest.raises(UserError):
                client.generate(**{"prompt": PROMPT, "streamer": notes, **wrong})
            assert notes.ended == 1  # somebody may wait for it, as a TextIteratorStreamer's reader does


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1"])
def test_a_server_that_is_not_there_is_named_as_it_was_given(address):
    with pytest.raises(UserError, match=rf"^no server at {re.escape(address)}: "):
        PrivateClient(address)


def test_a_client_without_a_tokenizer_takes_tokens_alone(address):
    with PrivateClient(address) as client, pytest.raises(UserError, match="no tokenizer: give the prompt as tokens"):
        client.generate(PROMPT)


CONVERTED = CARDS / "models" / "converted"


@pytest.mark.parametrize("as_given", [str, Path])
def test_preparations_are_in_a_folder_of_any_kind_of_name(address, tmp_path, as_given):
    with PrivateClient(address, prepared=as_given(tmp_path / "halves")):
        assert (tmp_path / "halves" / "store-1").exists()


TERMS = Terms(ProgramConfig.of(EntropyGPTConfig(**SIZES)), "SM", PrivateSettings(answer="token"), "", "store")


class Connection:
    """A connection that says it has accepted, or fails before or after."""

    terms = TERMS

    def __init__(self, error: Exception | None = None, accepted: bool = False):
        self.error, self.accepted, self.asked = error, accepted, 0

    def ask(self, question, note, **options) -> str:
        return self.prepare(len(question.prompt), question.new_tokens, question.answers, note)

    def prepare(self, length, new_tokens, answers, note) -> str:
        self.asked += 1
        if self.accepted or self.error is None:
            note({"event": "accepted"})
        if self.error is not None:
            raise self.error
        return "answer"

    def close(self):
        pass


@pytest.mark.parametrize(
    ("error", "accepted", "again"),
    [
        (RefusalError("the turn is over", TURN_OVER), False, True),
        (RefusalError("its other half is lost", NO_HALF), False, True),
        (ClosedError("the peer is gone"), False, True),
        (RefusalError("this client has 0 of 3 requests a day left"), False, False),
        (PrivateInferenceError("the link is broken"), True, False),
        (RefusalError("the turn is over", TURN_OVER), True, False),
    ],
)
@pytest.mark.parametrize("action", ["ask", "prepare"])
def test_what_is_asked_again_and_what_is_not(error, accepted, again, action):
    client = PrivateClient.__new__(PrivateClient)
    old, new, heard = Connection(error, accepted), Connection(), []
    client.terms = TERMS
    client._connection, client._connect, client._lock = old, lambda: new, threading.Lock()
    client.tokenizer, client._draft, client._require_prepared = None, None, False

    def act():
        if action == "ask":
            return client.ask(Question([1, 2]), heard.append)
        return client.prepare(2, on_event=heard.append)

    if again:
        assert act() == "answer"
        assert heard == [{"event": "accepted"}]
    else:
        with pytest.raises(type(error), match=str(error)):
            act()
    assert (old.asked, new.asked) == (1, int(again))


def test_each_preparation_that_has_lost_its_other_half_is_passed_over():
    client = PrivateClient.__new__(PrivateClient)
    lost = [Connection(RefusalError("its other half is lost", NO_HALF)) for _ in range(3)]
    connections = iter([*lost, Connection()])
    client._connection, client._lock, client.tokenizer, client._draft = None, threading.Lock(), None, None
    client._connect = lambda: next(connections)
    client._require_prepared, client.terms = False, TERMS
    assert client.ask(Question([1, 2])) == "answer"
    assert [connection.asked for connection in lost] == [1, 1, 1]


@pytest.mark.parametrize(
    ("heard", "kept"),
    [
        (ClosedError("the peer is gone"), True),
        (RefusalError("the turn is over", TURN_OVER), True),
        (RefusalError("the server is about to end"), True),
        (RefusalError("its other half is lost", NO_HALF), False),
        ({"event": "peer's accepted"}, False),
    ],
)
def test_a_half_is_used_up_once_its_prompt_is_accepted(tmp_path, heard, kept):
    client = Client.__new__(Client)
    client.store, client._tables, name = Store(tmp_path, 1), {}, "0" * 32
    client.store.path(name).write_bytes(b"half")
    taken = []

    def answer(request, on_event, draft, take_another):
        taken.append(Path(request.preparation).read_bytes())
        raise PrivateInferenceError("the link is broken")

    client._session = SimpleNamespace(events=Events(), answer=answer, close=lambda: None)
    client._session.events.put(heard)
    client._tunnel, client.terms = None, TERMS
    client.channel = Channel.__new__(Channel)
    client.channel.send, client.channel.close = lambda message: None, lambda: None
    with pytest.raises(PrivateInferenceError):
        client.ask(Question([1, 2]), preparation=name)
    assert [path.name for path in tmp_path.glob("0*")] == ([f"{name}-1.half"] if kept else [])
    assert taken == ([b"half"] if isinstance(heard, dict) else [])


@pytest.mark.parametrize("given", [{"top_k": 4}, {"top_p": 0.5}, {"seed": 0}])
def test_how_to_draw_is_refused_where_nothing_is_drawn(given):
    client, (name,) = PrivateClient.__new__(PrivateClient), given
    with pytest.raises(UserError, match=rf"--{name.replace('_', '-')} is for tokens that are drawn: give a --temp"):
        client.generate([1, 2], **given)


def test_a_client_without_a_folder_prepares_nothing():
    client = Client.__new__(Client)
    client.store, client.close = None, lambda: None
    with pytest.raises(UserError, match="a preparation needs a folder"):
        client.prepare(8)


def client_with_folder(folder: Path) -> tuple[Client, list[dict]]:
    """A client that keeps preparations, without a server; and what it would send besides a question."""
    client, sent = Client.__new__(Client), []
    client.store, client.terms, client.close = Store(folder, 1), TERMS, lambda: None
    client._request = lambda asked, also, on_event, **own: sent.append(also)
    return client, sent


@pytest.mark.parametrize("required", [False, True])
def test_without_a_preparation_it_says_so_or_fails(tmp_path, required):
    (client, sent), heard = client_with_folder(tmp_path), []
    if required:
        with pytest.raises(UserError, match="no preparation fits 2 tokens and 1 new ones of this server"):
            client.ask(Question([1, 2]), heard.append, require_prepared=True)
    else:
        client.ask(Question([1, 2]), heard.append)
    assert (heard, sent) == (([], []) if required else ([{"event": "unprepared"}], [{}]))


@pytest.mark.parametrize("required", [False, True])
def test_drafts_take_no_preparation_and_it_says_so_or_fails(tmp_path, required):
    (client, sent), heard = client_with_folder(tmp_path), []
    drafter = SimpleNamespace(begin=lambda prompt, sampling, vocab_size: lambda known, count: [0] * count)
    question = Question([1, 2], 3, drafts=Drafts(drafter, 2))
    if required:
        with pytest.raises(UserError, match="--require-prepared is not possible with --draft"):
            client.ask(question, heard.append, require_prepared=True)
    else:
        client.ask(question, heard.append)
    assert (heard, sent) == (([], []) if required else ([{"event": "one phase"}], [{}]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draft_tokens": 3}, "are for drafts: give a model with --draft"),
        ({"draft_keep": "prompt"}, "are for drafts: give a model with --draft"),
        ({"draft_keep": "all"}, "--draft-keep all"),
        ({"draft_tokens": 0}, "--draft-tokens 0"),
        (
            {"draft": CONVERTED, "draft_keep": "prompt", "draft_tokens": 3},
            "--draft-tokens is for --draft-keep accepted",
        ),
        ({"draft": CONVERTED, "prepared": "halves", "require_prepared": True}, "not possible with --draft"),
        ({"draft": "no/such/folder"}, "no/such/folder"),
        ({"draft": CONVERTED}, "the draft model's tokenizer is not the server's"),
    ],
)
def test_drafts_that_can_not_be_verified_are_refused_before_a_prompt(address, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        PrivateClient(address, **options)


@pytest.mark.parametrize(
    ("words", "tokens", "keep"),
    [(["--draft-tokens", "3"], 3, "accepted"), (["--draft-keep", "prompt"], DRAFT_TOKENS, "prompt")],
)
def test_the_command_asks_with_the_drafts_it_is_told(words, tokens, keep, model, address, monkeypatch):
    asked = []

    def generate(client: PrivateClient, prompt: str, **_):
        asked.append((prompt, client._draft.drafts))
        raise UserError("this is not computed")

    monkeypatch.setattr(PrivateClient, "generate", generate)
    words = ["private", "ask", PROMPT, "--connect", address, "--tokenizer", str(model), "--draft", str(model), *words]
    assert str(CliRunner().invoke(app, words).exception) == "this is not computed"
    ((prompt, drafts),) = asked
    assert (prompt, drafts.tokens, drafts.keep) == (PROMPT, tokens, keep)


@pytest.fixture(scope="module")
def connected(model) -> Iterator[Callable[..., PrivateClient]]:
    """Makes clients of a server whose protocol has no keys to make."""
    with serving(model, protocol="semi2k") as server:
        address = f"127.0.0.1:{server.address[1]}"
        yield functools.partial(PrivateClient, address, tokenizer=model, protocol="semi2k")


@pytest.mark.slow
@pytest.mark.private
@pytest.mark.parametrize("keep", ["accepted", "prompt"])
def test_a_model_that_drafts_for_itself_is_always_right(model, connected, keep):
    drawn = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1}
    with connected() as client:
        plain = [client.generate(PROMPT, **options).text for options in ({"max_new_tokens": 6}, drawn)]
    with connected(draft=model, draft_keep=keep) as client:
        drafted = [client.generate(PROMPT, **options) for options in ({"max_new_tokens": 6}, drawn)]
        assert client.generate(PROMPT).tokens == drafted[0].tokens[:1]
    assert [answer.text for answer in drafted] == plain
    assert [answer.verified for answer in drafted] == [[(5, 5)]] * 2


@pytest.mark.slow
@pytest.mark.private
def test_prompts_share_a_connection_until_it_breaks(connected):
    notes = Notes()
    with connected() as client:
        first = client.generate(PROMPT, max_new_tokens=2, streamer=notes)
        kept = client._connection
        again = client.generate(client.tokenizer(PROMPT)["input_ids"], max_new_tokens=2)
        assert client._connection is kept
        assert again.tokens == first.tokens
        assert again.text == first.text == client.tokenizer.decode(first.tokens)
        kept.channel.connection.close()  # as a network breaks
        assert client.generate(PROMPT, max_new_tokens=2).tokens == first.tokens
        assert client._connection is not kept
        client.close()
        assert (
            client.generate(PROMPT, temperature=1.0, seed=1).tokens
            == client.generate(PROMPT, temperature=1.0, seed=1).tokens
        )
    prompt, *tokens = notes.given
    assert prompt.tolist() == [client.tokenizer(PROMPT)["input_ids"]]
    assert [token.tolist() for token in tokens] == [[token] for token in first.tokens]
    assert notes.ended == 1


@pytest.mark.parametrize("version", [4, 5])
def test_an_answer_of_an_older_version_is_read(version, tmp_path):
    from .test_private import InferenceCost, PrivateSettings

    cost = InferenceCost("SM", 1, 1, 1, 1, 1, 1, PrivateSettings(), "", [], [], 0.0, {}, None, "")
    PrivateAnswer("text", None, 0.0, cost).save(tmp_path / "answer.json")
    content = (tmp_path / "answer.json").read_text()
    (tmp_path / "answer.json").write_text(content.replace('"schema_version": 6', f'"schema_version": {version}'))
    assert PrivateAnswer.load(tmp_path / "answer.json").tokens == []
