"""The gateway's page in a browser: without network, by keyboard, in the dark and on a narrow screen."""

from collections.abc import Iterator

import pytest
import torch

from entropy_gpt.conversion.gpt2_checkpoint import load_language_model
from entropy_gpt.terminal.private_gateway import load_twin
from entropy_gpt.training.tokenizer import load_tokenizer
from tests.browser import Browser, find_browser

from .conftest import Running, gateway, serving
from .page_by_keyboard import CONTROL, ask, eventually, press, shown, wait_for


pytest.importorskip("spu")
pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef-secret"
PROMPT = "def <b>main</b>("


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    browser = Browser(find_browser(), tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def with_twin(model) -> Iterator[Running]:
    with serving(model) as server, gateway(model, server, twin=load_twin(str(model))) as running:
        yield running


@pytest.mark.private
def test_an_answer_comes_by_keyboard_alone(browser, with_twin, model):
    browser.open(f"http://127.0.0.1:{with_twin.port}/", 1000)
    assert browser.evaluate("document.activeElement.id") == "prompt"
    ask(browser, PROMPT, 2)
    assert wait_for(browser, "Done.", "There is no answer.") == "Done.", shown(browser, "error")
    words, loaded = load_tokenizer(str(model)), load_language_model(model).eval()
    tokens = words(PROMPT)["input_ids"]
    length = len(tokens)
    with torch.no_grad():
        for _ in range(2):
            tokens.append(int(loaded(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert browser.evaluate("document.getElementById('answer').textContent") == PROMPT + words.decode(tokens[length:])
    assert [line.split("\t")[0] for line in shown(browser, "phases").splitlines()] == ["set-up", "prompt", "token 2"]
    assert float(shown(browser, "sum-bytes")) > 20
    assert f"a prompt of {length} tokens" in shown(browser, "seen")
    assert browser.evaluate("document.querySelectorAll('.curve').length") == 3
    assert eventually(browser, "document.querySelectorAll('#heads rect').length") == 2
    assert not browser.complaints()
    assert {url.split("/")[2] for url in browser.requests()} == {f"127.0.0.1:{with_twin.port}"}
    ask(browser, PROMPT, 15)
    assert wait_for(browser, "prompt", "token")
    press(browser, "Escape")
    assert wait_for(browser, "Stopped. The server saw that, too.")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1000])
def test_it_fits_the_screen_and_every_field_has_a_name(browser, with_twin, width, dark):
    browser.open(f"http://127.0.0.1:{with_twin.port}/", width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    fields = "[...document.querySelectorAll('textarea, input:not(#key)')]"
    assert browser.evaluate(f"{fields}.every(field => field.labels.length)")
    assert not browser.complaints()


def test_many_steps_are_drawn_seldom_and_with_few_points(browser, with_twin):
    browser.open(f"http://127.0.0.1:{with_twin.port}/", 1000)
    assert eventually(browser, "model !== null && model.id") == "private"
    cost = "{bytes: 1, round_trips: 1, seconds: 1}"
    step = f"{{phase: 'prompt', layer: 0, operation: 'matmul', this_phase: {cost}, total: {cost}}}"
    browser.evaluate(f"request = {{new_tokens: 1}}; for (let i = 0; i < 5000; i++) {{ note({step}); drawSoon(); }}")
    assert browser.evaluate("points.length") <= 1000
    assert browser.evaluate("points[points.length - 1].x") == 5000
    browser.evaluate("draw()")
    assert "whether numbers were out of range: not known yet" in shown(browser, "seen")
    browser.evaluate("report({server_saw: {prompt_tokens: [1], out_of_range: 0}, total: total}); draw()")
    assert "they were not" in shown(browser, "seen")


def test_errors_are_shown_as_text(browser, with_twin):
    browser.open(f"http://127.0.0.1:{with_twin.port}/", 1000)
    ask(browser, "<img src=x> " * 50, 1)
    assert wait_for(browser, "There is no answer.") == "There is no answer."
    assert "this model has 32 positions" in shown(browser, "error")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0


def test_a_token_is_asked_for(browser, with_twin, model):
    with gateway(model, with_twin.server, token=TOKEN) as guarded:
        browser.open(f"http://127.0.0.1:{guarded.port}/", 1000)
        assert eventually(browser, "!document.getElementById('key-label').hidden")
        assert eventually(browser, "document.getElementById('error').innerText")
        assert "the token is missing or wrong" in shown(browser, "error")
        browser.call("Input.insertText", text=TOKEN)
        press(browser, "Enter", CONTROL)
        assert wait_for(browser, "Both sides compile the program.", "set-up", "prompt", "Done.")
