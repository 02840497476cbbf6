"""Draws docs/gateway.png: the gateway's page after an answer of the trained model of model_cards."""

from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from entropy_gpt.terminal.private_gateway import load_twin
from tests.browser import Browser, find_browser
from tests.pages import ROOT

from .conftest import gateway, serving
from .page_by_keyboard import ask, eventually, shown, wait_for


MODEL = ROOT / "model_cards" / "models" / "converted"
PICTURE = ROOT / "docs" / "gateway.png"
WIDTH, COLOURS = 760, 48


def main():
    with (
        TemporaryDirectory() as profile,
        serving(MODEL) as server,
        gateway(MODEL, server, twin=load_twin(str(MODEL))) as running,
    ):
        browser = Browser(find_browser(), Path(profile))
        browser.open(f"http://127.0.0.1:{running.port}/", WIDTH)
        ask(browser, "    def __init__(", 4)
        if wait_for(browser, "Done.", "There is no answer.") != "Done.":
            raise SystemExit(shown(browser, "error"))
        eventually(browser, "document.querySelectorAll('#heads rect').length")
        browser.evaluate("document.activeElement.blur()")
        browser.screenshot(PICTURE)
        Image.open(PICTURE).convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
