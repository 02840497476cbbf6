"""The gateway's page in a browser, asked by keyboard alone."""

import time

from tests.browser import Browser


# How long an answer may take, in seconds.
PATIENCE = 300
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


def wait_for(browser: Browser, *states: str) -> str:
    """Until the page says one of these."""
    end = time.monotonic() + PATIENCE
    while (state := shown(browser, "state")) not in states and time.monotonic() < end:
        time.sleep(0.1)
    return state


def after(browser: Browser, seconds: float, expression: str):
    """What an expression of JavaScript gives then."""
    return browser.evaluate(f"new Promise(done => setTimeout(() => done({expression}), {1000 * seconds}))")
