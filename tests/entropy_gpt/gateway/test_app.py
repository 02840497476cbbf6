"""The gateway with a client that answers from a list, without engines, sockets or a server."""

import asyncio
import json
import threading
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from entropy_gpt.evaluation.errors import PrivateInferenceError
from entropy_gpt.evaluation.private_inference.parties.channel import NoServerError
from entropy_gpt.evaluation.private_inference.parties.job import write_array
from entropy_gpt.gateway import app as app_module
from entropy_gpt.gateway import line as line_module
from entropy_gpt.gateway.app import make_app
from entropy_gpt.gateway.costs import Meter
from entropy_gpt.gateway.errors import ProtocolError
from entropy_gpt.gateway.line import Job, Line
from tests.entropy_gpt.gateway.test_text import WORDS


SECRET = "def secret("
COST = {"operation": "matmul", "layer": 0, "sent_bytes": 1, "received_bytes": 1, "round_trips": 1.0, "seconds": 0.1}


class Client:
    """A client whose model continues with the same token, and who runs something before each answer."""

    tokenizer = WORDS
    terms = SimpleNamespace(
        config=SimpleNamespace(n_positions=32, vocab_size=len(WORDS)),
        settings=SimpleNamespace(answer="logits", protocol="cheetah"),
        notation="SM",
    )

    def __init__(self, token: int = 5, before: Callable[[Callable], None] = lambda on_event: None):
        self.token, self.before, self.asked, self.closed = token, before, [], 0

    def ask(self, question, on_event):
        self.asked.append(question.prompt)
        self.before(on_event)
        logits = np.zeros((question.answers, len(WORDS)), np.float32)
        logits[:, self.token] = 9
        for _ in range(question.new_tokens):
            on_event({"event": "pass", "bytes": [2]})
            on_event({"event": "step", "cost": COST})
            on_event({"event": "token", "token": self.token, "logits": write_array(logits)})

    def close(self):
        self.closed += 1


def call(app, path: str, body: bytes | dict | None = None, leaves: bool = False, **headers: str) -> tuple[int, bytes]:
    """One request to an application; who leaves is gone once the body is read."""
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    given = {"host": "127.0.0.1", "content-type": "application/json"} | headers
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET" if body is None else "POST",
        "scheme": "http",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
    }
    messages, sent = [{"type": "http.request", "body": content or b""}], []

    async def receive():
        if messages:
            return messages.pop()
        if not leaves:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 30))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


def complete(app, **fields) -> tuple[int, dict]:
    leaves = fields.pop("leaves", False)
    asked = {"model": "private", "prompt": SECRET, "max_tokens": 1, "temperature": 0, **fields}
    status, body = call(app, "/v1/completions", asked, leaves)
    return status, json.loads(body) if body else {}


def metric(app, name: str) -> float:
    lines = call(app, "/metrics")[1].decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"entropy_gpt_gateway_{name} ")).split()[-1])


def test_a_continuation_that_ends_the_text_has_all_its_probabilities():
    """As lm-eval asks: the likelihoods are those of all tokens but the last."""
    prompt = WORDS(SECRET)["input_ids"]
    for token in (WORDS.eos_token_id, 5):
        _, reply = complete(make_app(Client(token)), prompt=prompt, echo=True, logprobs=1)
        assert len(reply["choices"][0]["logprobs"]["token_logprobs"]) == len(prompt) + 1


def test_who_leaves_is_forgotten_however_quickly_steps_come(monkeypatch):
    monkeypatch.setattr(app_module, "PRESENCE_SECONDS", 0.05)
    ended = threading.Event()

    def step(on_event):
        try:
            while True:
                on_event({"event": "step", "cost": COST})
                ended.wait(0.001)
        finally:
            ended.set()

    app = make_app(Client(before=step))
    assert complete(app, leaves=True)[0] == 499
    assert ended.wait(10)


def fail(error: Exception) -> Callable:
    def before(*arguments):
        raise error

    return before


def test_a_fault_is_logged_without_the_prompt(capfd, monkeypatch):
    monkeypatch.setattr(app_module, "read_prompts", fail(RuntimeError(SECRET)))
    status, reply = complete(make_app(Client()))
    assert (status, reply["error"]["code"]) == (500, "gateway_failed")
    monkeypatch.undo()
    assert complete(make_app(Client(before=fail(RuntimeError(SECRET)))))[0] == 500
    status, _ = call(make_app(Client(), twin=fail(RuntimeError(SECRET))), "/entropies", {"text": SECRET})
    assert status == 500
    said = "".join(capfd.readouterr())
    assert said.count("a request failed: RuntimeError") == 3
    assert SECRET not in said


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"model": "private", "prompt": "\\ud800"}'),
        ("/v1/completions", b'{"model": "private", "prompt": "a", "\\ud800": 1}'),
        ("/entropies", b'{"text": "\\ud800"}'),
    ],
)
def test_half_of_a_pair_of_surrogates_is_no_text(path, body):
    status, reply = call(make_app(Client(), twin=lambda text: {}), path, body)
    assert (status, json.loads(reply)["error"]["code"]) == (400, "invalid_text")


@pytest.mark.parametrize(
    ("headers", "code"), [({"host": "["}, "wrong_host"), ({"origin": "http://["}, "wrong_origin")]
)
def test_what_is_no_address_is_refused(headers, code):
    status, reply = call(make_app(Client()), "/v1/models", **headers)
    assert (status, json.loads(reply)["error"]["code"]) == (403, code)


def test_without_a_line_one_request_is_answered():
    app = make_app(Client(), longest_line=0)
    assert [complete(app)[0] for _ in range(2)] == [200, 200]


def test_too_many_prompts_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr("entropy_gpt.gateway.requests.tokenize", fail(AssertionError("read")))
    status, reply = complete(make_app(Client()), prompt=["a"] * 129)
    assert (status, reply["error"]["param"]) == (400, "n")


def test_one_text_at_a_time_is_measured_in_the_twin():
    active, most = 0, 0

    def twin(text):
        nonlocal active, most
        active += 1
        most = max(most, active)
        threading.Event().wait(0.02)
        active -= 1
        return {}

    gateway = app_module.Gateway(Client(), SimpleNamespace(length=0), "private", twin)
    request = SimpleNamespace(body=lambda: asyncio.sleep(0, b'{"text": "a"}'))

    async def several():
        await asyncio.gather(*(gateway.entropies(request) for _ in range(5)))

    asyncio.run(several())
    assert most == 1


def test_what_never_happened_is_not_counted():
    app = make_app(Client(before=fail(NoServerError("no server"))))
    assert complete(app, max_tokens=3)[0] == 503
    assert (metric(app, "prompt_tokens_total"), metric(app, "new_tokens_total")) == (0, 0)
    app = make_app(Client())
    reply = complete(app, max_tokens=3)[1]
    length = len(WORDS(SECRET)["input_ids"])
    assert (metric(app, "prompt_tokens_total"), metric(app, "new_tokens_total")) == (length, 3)
    assert reply["private"]["server_saw"]["prompt_tokens"] == [length]


def test_a_prompt_that_is_repeated_was_seen_once():
    meter = Meter()
    meter.begin(4, 2, 1)
    for event in ("pass", "pass", "token", "pass"):
        meter.note({"event": event, "bytes": []})
    assert (meter.seen.prompt_tokens, meter.seen.new_tokens, meter.new_tokens) == ([4], [2], 1)


class TestLine:
    @pytest.fixture
    def busy(self):
        """A line whose one request goes on until it is let go."""
        release, begun = threading.Event(), threading.Event()
        line = Line(Client(), 1, 60)

        def work(client, job):
            begun.set()
            release.wait(10)

        line.join(Job(work, lambda item: None))
        assert begun.wait(10)
        yield line
        release.set()
        line.close()

    def test_who_has_left_takes_no_place(self, busy):
        gone, said = Job(fail(AssertionError()), lambda item: said.append(item)), []
        busy.join(gone)
        with pytest.raises(ProtocolError, match="1 requests are waiting already"):
            busy.join(Job(lambda *arguments: None, lambda item: None))
        gone.cancelled.set()
        assert busy.length == 0
        busy.join(Job(lambda *arguments: None, lambda item: None))
        assert (busy.length, said[-1]) == (1, None)

    def test_who_has_waited_for_too_long_is_refused_with_its_place(self, busy):
        busy.seconds, said, refused = 0.05, [], threading.Event()
        before = threading.active_count()
        busy.join(Job(fail(AssertionError()), lambda item: (said.append(item), refused.set() if len(said) > 1 else 0)))
        assert refused.wait(10)
        waiting, error = said
        assert str(waiting) == "requests before this one: 1; it is given up in 0 s"
        assert (error.status, error.code, busy.length) == (429, "busy", 0)
        assert "no turn came in 0.05 s" in str(error)
        assert "requests before this one: 1." in str(error)
        assert threading.active_count() <= before + 1  # the alarm is about to end

    def test_a_request_that_has_its_turn_is_not_given_up(self):
        line, done, said = Line(Client(), 1, 0.2), threading.Event(), []
        line.join(Job(lambda *arguments: threading.Event().wait(0.5), lambda item: (said.append(item), done.set())))
        assert done.wait(10)
        assert said == [None]
        line.close()

    def test_a_connection_that_can_not_be_closed_does_not_end_the_line(self, monkeypatch, capsys):
        monkeypatch.setattr(line_module, "IDLE_SECONDS", 0.01)
        client, closing = Client(), threading.Event()

        def close():
            closing.set()
            raise PrivateInferenceError(SECRET)

        client.close = close
        line, done = Line(client, 1, 60), threading.Event()
        assert closing.wait(10)
        line.join(Job(lambda *arguments: done.set(), lambda item: None))
        assert done.wait(10)
        line.close()
        assert SECRET not in capsys.readouterr().err

    def test_a_request_may_join_while_a_connection_is_closed(self, monkeypatch):
        monkeypatch.setattr(line_module, "IDLE_SECONDS", 0.01)
        client, closing, release, joined = Client(), threading.Event(), threading.Event(), threading.Event()
        client.close = lambda: (closing.set(), release.wait(10))
        line = Line(client, 1, 60)
        assert closing.wait(10)
        job = Job(lambda *arguments: None, lambda item: None)
        threading.Thread(target=lambda: (line.join(job), joined.set()), daemon=True).start()
        assert joined.wait(5)
        release.set()
        line.close()
