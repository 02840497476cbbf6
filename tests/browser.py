"""A browser without a window, for tests of pages: what it shows, and what it complains of."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


def find_browser() -> str:
    """The command of a browser; the test is skipped on a machine without one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser is installed to look at pages with: none of {', '.join(NAMES)}")
    return found


class Browser:
    """
    A browser that shows one page, spoken to by the DevTools protocol over a pipe.

    Args:
        command (`str`): The browser.
        profile (`Path`): An empty folder for what it keeps.
    """

    def __init__(self, command: str, profile: Path):
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        # A browser reads commands from its descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", command, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(their_input, their_output),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._rest = b""
        self._count = 0
        self._session = None
        self.events: list[dict] = []
        (page,) = (each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime", "Audits"):
            self.call(f"{domain}.enable")

    def open(self, url: str, width: int, height: int = 900, dark: bool = False):
        """Shows a page in a window of this size, in pixels, and waits until all of it is there."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str):
        """What an expression of JavaScript gives on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def requests(self) -> list[str]:
        """The addresses that the page asked for, without those that hold their data themselves."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self) -> list[dict]:
        """What went to the console or is an issue: errors, warnings, violations of the page's own policy."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded")
        return [event for event in self.events if event["method"] in kinds]

    def screenshot(self, path: Path):
        """Writes a PNG of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def print(self, path: Path):
        """Writes a PDF of the page as it is printed."""
        answer = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        """Ends the browser."""
        os.close(self._input)
        os.close(self._output)
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters) -> dict:
        """A method of the DevTools protocol, such as a key that is pressed, and what it answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._input, data) :]
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            part = os.read(self._output, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
