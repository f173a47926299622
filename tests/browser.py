"""A headless Chromium, driven over a pipe by its own protocol: forty lines, where a driver would bring 130 MB and a browser."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
_FLAGS = [
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip


class Browser:
    """One page. `events` are what the browser said unasked: (method, parameters)."""

    def __init__(self, reading: Any, writing: Any) -> None:
        self._reading, self._writing, self._number = reading, writing, 0
        self._session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while True:
            found = self._receive()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def open(self, path: Path) -> None:
        """A file, until it is loaded."""
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def js(self, expression: str) -> Any:
        """The value of an expression, waited for where it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key of the keyboard, as `event.key` and `event.code` name it."""
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13, "Escape": 27}
        typed = {"text": "\r"} if key == "Enter" else {}  # without it a button is not pressed
        for kind, more in (("keyDown", typed), ("keyUp", {})):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **more)
        self.js("new Promise(requestAnimationFrame)")

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """What the window shows, as .png or .jpg."""
        self.js("Promise.all([...document.images].filter((image) => image.src).map((image) => image.decode()))")
        kind = "png" if path.suffix == ".png" else "jpeg"
        path.write_bytes(b64decode(self.call("Page.captureScreenshot", format=kind)["data"]))

    def complaints(self) -> list[Any]:
        """Errors and warnings of the console, exceptions, what the policy refused, and requests but for the page's own data."""
        own = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded")
        found = [event for event in self.events if event[0] in own]
        asked = [said["request"]["url"] for method, said in self.events if method == "Network.requestWillBeSent"]
        return found + [url for url in asked[1:] if not url.startswith("data:")]  # the first is the page

    def _receive(self) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\0"):
            byte = self._reading.read(1)
            assert byte, "the browser has ended"
            data += byte
        found: dict[str, Any] = json.loads(data[:-1])
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in a folder."""
    assert CHROMIUM is not None
    (theirs, ours), (here, there) = os.pipe(), os.pipe()  # what we write, what we read
    # It reads commands from file 3 and writes answers to file 4, which only a shell can lay there without racing.
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{there}', "-", CHROMIUM, *_FLAGS, f"--user-data-dir={folder}"]
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(shell, pass_fds=[theirs, there], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    os.close(theirs)
    os.close(there)
    with os.fdopen(ours, "wb") as writing, os.fdopen(here, "rb") as reading:
        found = Browser(reading, writing)
        try:
            yield found
        finally:
            found._session = None
            found.call("Browser.close")
            process.wait(30)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A window of 1200 x 900 in the light."""
    with browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        found.resize(1200, 900)
        yield found


# How docs/explore.jpg was made, of four photos of each class:
#   datalth-mine --data stamps/val --val-share 0 --views 4 --tokens 68 --method cls-attention --weights clip_b16.safetensors
#     --selector vit_base_patch16_clip_quickgelu_224 --out clip
#   datalth-mine --data clip --images link --tokens 68 --method cls-attention --weights dinov2_s14.safetensors
#     --selector vit_small_patch14_dinov2 --out dino
#   datalth-shards explore clip dino -o explore.html
#   python tests/browser.py explore.html docs/explore.jpg 1440 1000
if __name__ == "__main__":  # python tests/browser.py PAGE.html PICTURE.png|jpg WIDTH HEIGHT
    with tempfile.TemporaryDirectory() as place, browser(Path(place) / "profile") as window:
        window.resize(int(sys.argv[3]), int(sys.argv[4]))
        window.open(Path(sys.argv[1]).absolute())
        window.screenshot(Path(sys.argv[2]))
