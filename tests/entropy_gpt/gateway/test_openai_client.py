"""OpenAI's client and others, over a server and a gateway that are processes of their own."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from .conftest import SECONDS


pytest.importorskip("spu")
pytestmark = [pytest.mark.slow, pytest.mark.private]

COMMAND = Path(sys.executable).with_name("entropy-gpt")
PROMPT = "def main("
GENEROUS = ("--max-positions", "9999", "--max-requests", "9999")


@contextlib.contextmanager
def run(*arguments) -> Iterator[tuple[subprocess.Popen, str]]:
    """A command that listens, and its address."""
    command = [COMMAND, "private", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline().strip()
        assert line.startswith("listening on "), line
        try:
            yield process, line.removeprefix("listening on ").removeprefix("http://")
        finally:
            process.kill()


@contextlib.contextmanager
def serve(model: Path, listen: str = "127.0.0.1:0") -> Iterator[tuple[subprocess.Popen, str]]:
    with run("serve", model, "--listen", listen, *GENEROUS) as running:
        yield running


@contextlib.contextmanager
def gateway(model: Path, server: str, *options) -> Iterator[tuple[subprocess.Popen, openai.OpenAI]]:
    with run("gateway", "--connect", server, "--tokenizer", model, "--port", 0, *options) as (process, address):
        yield process, openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=SECONDS)


@pytest.fixture(scope="module")
def client(model) -> Iterator[openai.OpenAI]:
    with serve(model) as (_, server), gateway(model, server) as (_, client):
        yield client


def test_the_models_are_listed(client):
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("private").id) == ("private", "private")


def test_a_completion_is_the_most_likely_one(client, clear):
    answer = client.completions.create(model="private", prompt=PROMPT, max_tokens=3, temperature=0, n=2)
    tokens, _ = clear(PROMPT, 3)
    assert [choice.text for choice in answer.choices] == [clear.words.decode(tokens[-3:])] * 2
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage.prompt_tokens == len(tokens) - 3
    assert answer.private["total"]["bytes"] > 0
    assert answer.private["server_saw"]["new_tokens"] == [3]


def test_probabilities_are_those_in_the_clear(client, clear):
    fields = {"temperature": 0, "max_tokens": 2, "echo": True, "logprobs": 2}
    (choice,) = client.completions.create(model="private", prompt=PROMPT, **fields).choices
    tokens, expected = clear(PROMPT, 2)
    assert choice.text == clear.words.decode(tokens)
    assert choice.logprobs.token_logprobs[0] is None
    wanted = [expected[place, token].item() for place, token in enumerate(tokens[1:])]
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=0.05)
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
    assert best == pytest.approx(expected[:-1].max(-1).values.tolist(), abs=0.05)


def test_a_stream_is_the_same_text(client, clear):
    tokens, _ = clear(PROMPT, 3)
    text = clear.words.decode(tokens[-3:])
    options = {"include_usage": True}
    stream = client.completions.create(
        model="private", prompt=PROMPT, max_tokens=3, temperature=0, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 3


def test_an_answer_ends_before_its_stop(client, clear):
    tokens, _ = clear(PROMPT, 3)
    text = clear.words.decode(tokens[-3:])
    (choice,) = client.completions.create(
        model="private", prompt=PROMPT, max_tokens=3, temperature=0, stop=[text[2], "never"]
    ).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(text[2])], "stop")


def test_drawn_answers_are_the_same_with_the_same_seed(client):
    fields = {"model": "private", "prompt": [PROMPT, "import "], "max_tokens": 4, "n": 2, "temperature": 1.5}
    first, second = (client.completions.create(seed=5, **fields) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert len({choice.text for choice in first.choices}) > 1


def test_mistakes_are_those_of_the_protocol(client):
    with pytest.raises(openai.NotFoundError, match="only 'private'"):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="32 positions") as caught:
        client.completions.create(model="private", prompt=PROMPT * 50)
    assert caught.value.code == "context_length_exceeded"


def test_the_connection_is_made_anew_and_a_stream_says_that_its_server_is_gone(model, clear):
    with serve(model) as (process, server), gateway(model, server) as (_, client):
        fields = {"model": "private", "prompt": PROMPT, "temperature": 0}
        stream = client.completions.create(max_tokens=20, stream=True, **fields)
        next(iter(stream))
        process.kill()
        with pytest.raises(openai.APIError, match="the private server gave no answer"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="no server at"):
            client.completions.create(max_tokens=1, **fields)
        with serve(model, server):
            answer = client.completions.create(max_tokens=1, **fields)
        tokens, _ = clear(PROMPT, 1)
        assert answer.choices[0].text == clear.words.decode(tokens[-1:])


def test_a_full_line_is_refused_and_who_leaves_is_forgotten(model, clear):
    with serve(model) as (_, server), gateway(model, server, "--max-waiting", 1) as (process, client):
        address = str(client.base_url).removesuffix("/v1/")

        def health() -> dict:
            with urllib.request.urlopen(f"{address}/health") as answer:
                return json.load(answer)

        def ask(**fields):
            return client.completions.create(model="private", prompt=PROMPT, temperature=0, **fields)

        long = ask(max_tokens=25, stream=True)
        next(iter(long))
        found = []
        waiting = threading.Thread(target=lambda: found.append(ask(max_tokens=1)))
        waiting.start()
        while not health()["waiting"]:
            time.sleep(0.05)
        with pytest.raises(openai.RateLimitError, match="1 requests are waiting already"):
            ask(max_tokens=1)
        long.close()
        waiting.join(SECONDS)
        tokens, _ = clear(PROMPT, 1)
        assert found[0].choices[0].text == clear.words.decode(tokens[-1:])
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 128 + signal.SIGTERM
