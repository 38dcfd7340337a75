"""Chromium, driven through its WebDriver over plain HTTP on the loopback interface. Nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "no browser: needs chromium and chromedriver (apt-get install chromium chromium-driver)"
INSTALLED = CHROMIUM is not None and DRIVER is not None
TAB, ENTER, ESCAPE, SPACE = "\ue004", "\ue007", "\ue00c", " "
SHIFT, CONTROL, LEFT, RIGHT = "\ue008", "\ue009", "\ue012", "\ue014"

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of references to elements, fixed by the standard
_SWITCHES = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-dev-shm-usage",
    "hide-scrollbars",
)


class BrowserError(RuntimeError):
    """The driver refused a command."""


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, profile: Path) -> None:
        options = {
            "binary": CHROMIUM,
            "args": [*(f"--{switch}" for switch in _SWITCHES), f"--user-data-dir={profile}"],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        self._client = client
        self._path = ""
        self._path = f"/session/{self._post('/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def close(self) -> None:
        self._client.delete(self._path)

    def open(self, url: str) -> None:
        self._post("/url", url=url)

    def js(self, code: str, *arguments: object) -> Any:
        """The value of a JavaScript expression; its arguments are `arguments[0]` and so on."""
        return self._post("/execute/sync", script=f"return ({code})", args=list(arguments))

    def awaited(self, code: str) -> Any:
        """The value that a promise, given as an expression, comes to."""
        script = f"const done = arguments[0]; ({code}).then(done, (error) => done(String(error)))"
        return self._post("/execute/async", script=script, args=[])

    def wait(self, code: str, timeout_s: float = 60.0) -> Any:
        """Wait until an expression is true, and return its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.js(code)):
            assert time.monotonic() < deadline, f"waited too long for {code}"
            time.sleep(0.02)
        return value

    def find(self, selector: str) -> dict[str, str]:
        found: dict[str, str] = self._post("/element", using="css selector", value=selector)
        return found

    def click(self, selector: str) -> None:
        self._post(f"/element/{self.find(selector)[_ELEMENT]}/click")

    def fill(self, selector: str, text: str) -> None:
        """Replace the text of a control as a person does, key by key."""
        path = f"/element/{self.find(selector)[_ELEMENT]}"
        self._post(f"{path}/clear")
        self._post(f"{path}/value", text=text)

    def upload(self, selector: str, path: Path) -> None:
        self._post(f"/element/{self.find(selector)[_ELEMENT]}/value", text=str(path))

    def press(self, *keys: str) -> None:
        """Press keys together, as in ctrl + enter, wherever the focus is."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._post("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def drag(self, selector: str, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Draw a line with the mouse; points are pixels of the screen from the middle of an element."""
        origin = self.find(selector)
        points: list[dict[str, Any]] = [
            {"type": "pointerMove", "origin": origin, "x": x, "y": y, "duration": 30} for x, y in (start, end)
        ]
        down, up = {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}
        mouse = {"type": "pointer", "id": "mouse", "actions": [points[0], down, points[1], up]}
        self._post("/actions", actions=[mouse])

    def resize(self, width: int, height: int = 900) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str) -> None:
        """Say that the person likes "light" or "dark"."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self) -> bytes:
        """PNG of what the window shows."""
        return base64.b64decode(self.devtools("Page.captureScreenshot")["data"])

    def devtools(self, command: str, **parameters: object) -> Any:
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def complaints(self) -> list[str]:
        """What the browser's console has said since it was asked last; what fails by intent is left out."""
        lines: list[dict[str, Any]] = self._post("/se/log", type="browser")
        refused = re.compile(r"the server responded with a status of 4(01|22|29)|503|ERR_CONNECTION_REFUSED")
        return [line["message"] for line in lines if not refused.search(line["message"])]

    def _post(self, path: str, **body: object) -> Any:
        value = self._client.post(f"{self._path}{path}", json=body).json()["value"]
        if isinstance(value, dict) and "error" in value and "stacktrace" in value:
            raise BrowserError(value["message"])
        return value


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it."""
    assert DRIVER is not None, MISSING
    command = [DRIVER, "--port=0", "--log-level=SEVERE"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.$", line)))
            # `localhost` of the environment's proxies is of no interest here
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                browser = Browser(client, profile)
                try:
                    yield browser
                finally:
                    browser.close()
        finally:
            driver.terminate()
