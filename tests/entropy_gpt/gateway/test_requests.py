"""Requests that a gateway refuses, over real sockets: each with an error of the protocol, after which it goes on."""

import gzip
import json
import socket
from types import SimpleNamespace

import pytest
from typer.main import get_command

from entropy_gpt.commands.main import app
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.evaluation.private_inference.program.settings import PrivateSettings
from entropy_gpt.gateway.errors import ProtocolError
from entropy_gpt.gateway.guard import MAX_BODY_BYTES
from entropy_gpt.gateway.requests import CompletionRequest, read_prompts
from entropy_gpt.terminal.private_gateway import open_port, read_token, run
from tests.pages import ROOT

from .conftest import gateway, serving


TOKEN = "0123456789abcdef-secret"


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "gpt-4"}, 404, "model", "there is no model 'gpt-4' here, only 'private'"),
        ({"model": None}, 400, "model", "model: input should be a valid string"),
        ({"prompt": ""}, 400, "prompt", "the prompt is empty"),
        ({"prompt": []}, 400, "prompt", "the prompt is empty"),
        ({"prompt": ["a", ""]}, 400, "prompt", "the prompt is empty"),
        ({"prompt": {"a": 1}}, 400, "prompt", "prompt is not a text, a list of texts"),
        ({"prompt": [1, "a"]}, 400, "prompt", "prompt is not a text, a list of texts"),
        ({"prompt": [-1]}, 400, "prompt", "prompt is not a text, a list of texts"),
        ({"prompt": [10**6]}, 400, "prompt", "token 1000000 is not one of the model's"),
        ({"prompt": "x " * 100}, 400, "prompt", "this model has 32 positions"),
        ({"max_tokens": 1000}, 400, "max_tokens", "this model has 32 positions"),
        ({"max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "max_tokens: input should be a valid integer"),
        ({"max_tokens": "3"}, 400, "max_tokens", "max_tokens: input should be a valid integer"),
        ({"temperature": -0.1}, 400, "temperature", "greater than or equal to 0"),
        ({"top_p": 1.1}, 400, "top_p", "less than or equal to 1"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 100, "prompt": ["a", "b"]}, 400, "n", "200 answers are asked for at once: 128 is the most"),
        ({"logprobs": 6}, 400, "logprobs", "less than or equal to 5"),
        ({"stop": ["a", ""]}, 400, "stop", "stop is not a text or a list of texts"),
        ({"stop": list("abcde")}, 400, "stop", "stop has 5 texts: 4 is the most"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream=true"),
        (
            {"stream": True, "stream_options": {"other": 1}},
            400,
            "stream_options.other",
            "is no field that is supported",
        ),
        (
            {"frequency_penalty": 0.5},
            400,
            "frequency_penalty",
            "is not supported by a private model",
        ),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias is not supported"),
        ({"best_of": 3}, 400, "best_of", "best_of is not supported"),
        ({"suffix": "end"}, 400, "suffix", "suffix is not supported"),
        ({"n": 200}, 400, "n", "n: input should be less than or equal to 128"),
        ({"stop": list(map(str, range(100)))}, 400, "stop", "stop has 100 texts: 4 is the most"),
        ({"prompt": [[1], "a"]}, 400, "prompt", "prompt is not a text, a list of texts"),
        ({"prompt": [[]]}, 400, "prompt", "the prompt is empty"),
        ({"model": "org/private"}, 404, "model", "there is no model 'org/private' here"),
        ({"tools": []}, 400, "tools", "tools is no field that is supported here"),
        ({"messages": []}, 400, "messages", "messages is no field that is supported here"),
        ({"max_token": 3}, 400, "max_token", "max_token is no field that is supported here"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_field_that_is_wrong_is_named(running, fields, status, param, said):
    reply = running.complete(**fields)
    assert (reply.status, reply.error["param"], reply.error["type"]) == (status, param, "invalid_request_error")
    assert said in reply.error["message"]
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no JSON"),
        (b'{"model": "private", ', "no JSON"),
        (b'"text"', "no JSON object"),
        (b"\xff\xfe", "no JSON"),
        (b'{"model": "private", "prompt": "a", "temperature": NaN}', "NaN is no number"),
        (b"[" * 100_000, "no JSON"),
        (b'{"model": "private", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "no JSON: a number has 5000 digits"),
        (b'{"prompt": "a"}', "model is missing"),
        (b'{"model": "private"}', "prompt is missing"),
    ],
)
def test_a_body_that_is_no_request(running, body, said):
    reply = running.ask("POST", "/v1/completions", body)
    assert reply.status == 400
    assert said in reply.error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_path"),
        ("POST", "/v1/chat/completions", 404, "unknown_path"),
        ("POST", "/v1/completions/", 404, "unknown_path"),
        ("GET", "/docs", 404, "unknown_path"),
        ("GET", "/v1/completions", 405, "wrong_method"),
        ("GET", "/v1/models/gpt-4", 404, "model_not_found"),
        ("POST", "/entropies", 404, "no_twin"),
    ],
)
def test_a_path_that_is_none(running, method, path, status, code):
    reply = running.ask(method, path, {} if method == "POST" else None)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"), [("PUT", "/v1/completions", "POST"), ("DELETE", "/", "GET, HEAD")]
)
def test_a_method_that_is_none_is_answered_with_those_that_are(running, method, path, allowed):
    reply = running.ask(method, path)
    assert (reply.status, reply.error["code"], reply.headers["allow"]) == (405, "wrong_method", allowed)
    assert f"{method} is not possible here, but {allowed} is" in reply.error["message"]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_head_is_get_without_the_body(running, path):
    reply = running.ask("HEAD", path)
    assert (reply.status, reply.body) == (200, b"")
    assert int(reply.headers["content-length"]) == len(running.ask("GET", path).body)


def test_a_body_that_is_packed_is_refused_as_such(running):
    body = gzip.compress(b'{"model": "private", "prompt": "a"}')
    reply = running.ask("POST", "/v1/completions", body, content_encoding="gzip")
    assert (reply.status, reply.error["code"]) == (415, "wrong_encoding")
    assert "send the body as it is, not as gzip" in reply.error["message"]
    assert running.ask("POST", "/v1/completions", b"{}", content_encoding="identity").status == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(running, chunked):
    parts = [b" " * MAX_BODY_BYTES] * 10
    body = iter(parts) if chunked else b"".join(parts)
    reply = running.ask("POST", "/v1/completions", body)
    assert (reply.status, reply.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "https://example.org"}, 403, "wrong_origin"),
        ({"origin": "null"}, 403, "wrong_origin"),
        ({"origin": "http://127.0.0.1:1"}, 403, "wrong_origin"),
        ({"host": "example.org"}, 403, "wrong_host"),
        ({"host": "127.0.0.1.example.org:80"}, 403, "wrong_host"),
        ({"content_type": "text/plain"}, 415, "wrong_type"),
    ],
)
def test_a_page_of_another_site_gets_nothing(running, headers, status, code):
    for method, path in (("POST", "/v1/completions"), *([] if status == 415 else [("OPTIONS", "/v1/completions")])):
        reply = running.ask(method, path, b"{}", **headers)
        assert (reply.status, reply.error["code"]) == (status, code)
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_its_own_page_may_ask(running):
    own = {"origin": f"http://127.0.0.1:{running.port}"}
    assert running.ask("POST", "/v1/completions", b"{}", **own).status == 400
    page = running.ask("GET", "/", **own)
    assert page.status == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_what_is_there_without_a_question(running):
    assert running.ask("GET", "/health").json == {"status": "ok", "waiting": 0, "busy": False}
    (model,) = running.ask("GET", "/v1/models").json["data"]
    assert (model["id"], model["max_model_len"], model["answer"]) == ("private", 32, "logits")
    assert running.ask("GET", "/v1/models/private").json == model
    running.complete(max_tokens=-1)
    metrics = running.ask("GET", "/metrics").body.decode()
    assert 'entropy_gpt_gateway_requests_total{status="400"}' in metrics
    assert "entropy_gpt_gateway_waiting 0.0" in metrics


def test_nothing_is_computed_where_nothing_is_asked_for(running):
    reply = running.complete(max_tokens=0, echo=True, n=2, frequency_penalty=0)
    assert [choice["text"] for choice in reply.json["choices"]] == ["def main("] * 2
    assert reply.json["private"]["total"]["bytes"] == 0


def test_with_a_token_it_is_wanted_and_other_names_are_answered(model, running):
    with gateway(model, running.server, token=TOKEN) as guarded:
        right = {"authorization": f"Bearer {TOKEN}", "host": "example.org"}
        for wrong in ({}, {"authorization": "Bearer other"}, {"authorization": "Bearer \xe9"}):
            reply = guarded.ask("GET", "/v1/models", **wrong)
            assert reply.headers["www-authenticate"] == "Bearer"
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert guarded.ask("GET", "/metrics", **wrong).status == 401
        assert guarded.ask("GET", "/v1/models", **right).status == 200
        assert guarded.ask("GET", "/v1/models", authorization=f"bearer  {TOKEN}").status == 200  # as RFC 7235 has it
        assert guarded.ask("POST", "/v1/completions", b"{}", origin="https://other.org", **right).status == 403
        assert guarded.ask("GET", "/health").status == 200


def test_where_answers_are_tokens_there_are_no_logits(model):
    pytest.importorskip("spu")
    with serving(model, answer="token") as server, gateway(model, server) as running:
        for fields, param in (({"logprobs": 1}, "logprobs"), ({}, "temperature")):
            reply = running.complete(**fields)
            assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize("fields", [{"temperature": 0.5, "top_p": 0.9}, {"top_p": 0.9}])
def test_where_tokens_are_sampled_top_p_is_to_blame(fields):
    settings = PrivateSettings(answer="sampled")
    client = SimpleNamespace(
        terms=SimpleNamespace(config=SimpleNamespace(n_positions=9, vocab_size=9), settings=settings)
    )
    request = CompletionRequest(model="private", prompt=[1], max_tokens=1, **fields)
    with pytest.raises(ProtocolError, match=r"top_p=0\.9 is not possible") as refused:
        read_prompts(request, client)
    assert refused.value.param == "top_p"


@pytest.mark.parametrize("stream", [False, True])  # with a gateway each: a second request may wait for the first
def test_a_server_that_is_gone_is_named(model, stream):
    pytest.importorskip("spu")
    with serving(model) as server, gateway(model, server) as running:
        server.close()
        reply = running.complete(stream=stream)
        assert (reply.status, reply.error["code"]) == (503, "private_server_missing")
        assert "no server at 127.0.0.1" in reply.error["message"]
        assert running.ask("GET", "/health").status == 200


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"127.0.0.1:{port} can't be listened on: Address already in use\. Is anoth"
        ):
            open_port("127.0.0.1", port)


@pytest.mark.parametrize("host", ["[::1]", "::1"])
def test_an_address_of_ipv6_may_stand_in_brackets(host):
    command = get_command(app).commands["private"].commands["gateway"]
    words = ["--connect", f"{host}:9000", "--tokenizer", str(ROOT), "--host", host]
    assert command.make_context("gateway", words).params["host"] == "::1"


def test_a_host_that_is_none_of_this_machine():
    with pytest.raises(
        UserError, match=r"192.0.2.1:0 can't be listened on: .*Give an address of this machine.*--host"
    ):
        open_port("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("short", "openssl rand"), ("\xe9" * 40, "it is no ASCII"), ("a b" * 10, "openssl rand")],
)
def test_a_token_that_is_none(tmp_path, content, said):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=said):
        read_token(file)


def test_beyond_the_loopback_a_token_is_wanted():
    limits = {"longest_line": 1, "longest_wait": 1, "wait": 0}
    options = {"port": 0, "token_file": None, "name": "private", "twin": None, **limits}
    with pytest.raises(UserError, match=r"--host 0.0.0.0 is beyond this machine's loopback.*--token-file"):
        run(host="0.0.0.0", address="127.0.0.1:1", certificate=None, key=None, authority=None, **options)
