"""What people do on the playground and see there, for tests in a browser."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from tests.server.browser import Browser
from tests.server.running import Running

TEXT, IMAGES, SCORE = "#panel-text", "#panel-images", "#panel-score"


def opened(browser: Browser, server: Running) -> Browser:
    browser.open("about:blank")
    browser.open(f"{server.url}/")
    browser.wait("document.querySelectorAll('[role=tab]').length > 0")
    return browser


def field(panel: str, param: str, kind: str = "input[type=number]") -> str:
    return f"{panel} [data-param='{param}'] {kind}"


def choose(browser: Browser, selector: str, value: str) -> None:
    browser.js(
        "((box) => { box.value = arguments[1]; box.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.querySelector(arguments[0]))",
        selector,
        value,
    )


def run(browser: Browser, panel: str) -> None:
    browser.click(f"{panel} form button[type=submit]")
    done(browser, panel)


def done(browser: Browser, panel: str) -> None:
    browser.wait(f"document.querySelector('{panel} .line').textContent === 'Done.'")


def texts(browser: Browser) -> list[str]:
    shown: list[str] = browser.js(
        "[...document.querySelectorAll('#panel-text .written')].map((each) => each.textContent)"
    )
    return shown


def pictures(browser: Browser) -> list[Any]:
    addresses = browser.js("[...document.querySelectorAll('.picture.done img')].map((image) => image.src)")
    return [pixels(address.split(",", 1)[1]) for address in addresses]


def pixels(b64: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))
