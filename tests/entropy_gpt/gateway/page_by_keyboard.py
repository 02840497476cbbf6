"""The gateway's page in a browser, asked by keyboard alone."""

import json
import time

from tests.browser import Browser

from .conftest import SECONDS


KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}
CONTROL = 2


def press(browser: Browser, name: str, modifiers: int = 0):
    """A key, with the modifiers of the DevTools protocol."""
    pressed = {"key": name, "windowsVirtualKeyCode": KEYS[name], "modifiers": modifiers}
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, **pressed)


def write(browser: Browser, text: str):
    """Takes the place of what the focused field holds."""
    browser.evaluate("document.activeElement.select()")
    browser.call("Input.insertText", text=text)


def ask(browser: Browser, prompt: str, new_tokens: int):
    """From the prompt's field, which has the focus at first, to the answer."""
    browser.evaluate("document.getElementById('prompt').focus()")
    write(browser, prompt)
    press(browser, "Tab")
    write(browser, str(new_tokens))
    press(browser, "Enter", CONTROL)


def shown(browser: Browser, name: str) -> str:
    """The text of an element."""
    return browser.evaluate(f"document.getElementById('{name}').innerText")


def eventually(browser: Browser, expression: str):
    """What an expression of JavaScript gives as soon as it gives something."""
    end = time.monotonic() + SECONDS
    while not (found := browser.evaluate(expression)) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def wait_for(browser: Browser, *states: str) -> str:
    """Until the page says something that begins with one of these."""
    begins = " || ".join(f"said.startsWith({json.dumps(state)})" for state in states)
    return eventually(browser, f"(said => ({begins}) && said)(document.getElementById('state').innerText)")
