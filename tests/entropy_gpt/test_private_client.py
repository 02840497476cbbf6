"""`PrivateClient`: several prompts over one connection, which is made anew when it breaks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.generation import BaseStreamer

from entropy_gpt.conversion.errors import UserError
from entropy_gpt.workflows.private_client import PrivateAnswer, PrivateClient
from tests.entropy_gpt.gateway.conftest import serving

from .test_private import PROMPT, save_model


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
        for prompt, said in (("", "the prompt is empty"), ([10**6], "token 1000000"), ("x " * 99, "n_positions=32")):
            with pytest.raises(UserError, match=said):
                client.generate(prompt)
        with pytest.raises(UserError, match="--temperature -1"):
            client.generate(PROMPT, temperature=-1)
        notes = Notes()
        with pytest.raises(UserError, match="n_positions=32"):
            client.generate(PROMPT, max_new_tokens=99, streamer=notes)
        assert notes.ended == 1


def test_a_client_without_a_tokenizer_takes_tokens_alone(address):
    with PrivateClient(address) as client, pytest.raises(UserError, match="no tokenizer: give the prompt as tokens"):
        client.generate(PROMPT)


@pytest.mark.slow
@pytest.mark.private
def test_prompts_share_a_connection_until_it_breaks(model, address):
    notes = Notes()
    with PrivateClient(address, tokenizer=model) as client:
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


def test_an_answer_of_an_older_version_is_read(tmp_path):
    from .test_private import InferenceCost, PrivateSettings

    cost = InferenceCost("SM", 1, 1, 1, 1, 1, 1, PrivateSettings(), "", [], [], 0.0, {}, None, "")
    PrivateAnswer("text", None, 0.0, cost).save(tmp_path / "answer.json")
    content = (tmp_path / "answer.json").read_text()
    (tmp_path / "answer.json").write_text(content.replace('"schema_version": 5', '"schema_version": 4'))
    assert PrivateAnswer.load(tmp_path / "answer.json").tokens == []
