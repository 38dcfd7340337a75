"""The playground's pictures in a real browser: drawing them, and painting over parts of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.server.browser import LEFT, SPACE, Browser
from tests.server.image_model import LABELS, SIDE
from tests.server.playground_page import IMAGES, choose, done, field, pictures, pixels, run
from tests.server.running import Running


def test_pictures_are_those_of_the_server_and_can_be_painted_on(page: Browser, both: Running) -> None:
    page.click("#tab-images")
    choose(page, field(IMAGES, "label", "select"), "1")
    page.fill(field(IMAGES, "n"), "2")
    page.fill(field(IMAGES, "steps"), "12")
    page.fill(field(IMAGES, "seed", "input"), "5")
    run(page, IMAGES)
    body: dict[str, Any] = {"label": 1, "steps": 12, "temperature": 0.9}
    answer = both.client.post("/images", json={**body, "n": 2, "seed": 5}).json()
    shown = pictures(page)
    assert all(np.array_equal(a, pixels(b["b64_json"])) for a, b in zip(shown, answer["images"], strict=True))
    assert page.js("getComputedStyle(document.querySelector('.picture img')).imageRendering") == "pixelated"
    assert page.js("document.querySelector('.picture .name').textContent") == LABELS[1]
    assert page.js("document.querySelector('.picture a').download").endswith(".png")

    page.fill(field(IMAGES, "seed", "input"), "6")
    page.click(".picture .frame")
    page.wait("document.querySelector('canvas.paper').width === 8")
    page.js("document.querySelector('.tools input[type=range]').value = 1")
    side = page.js("document.querySelector('canvas.paper').clientWidth") / SIDE
    page.drag("canvas.paper", (int(-3.5 * side), int(0.5 * side)), (int(2.5 * side), int(0.5 * side)))
    page.click(".editor .primary")
    page.wait("document.querySelectorAll('.picture.done').length === 0")
    done(page, IMAGES)
    painted = np.zeros((SIDE, SIDE), bool)
    painted[4, 0:7] = True
    for again in pictures(page):
        assert np.array_equal(again[~painted], shown[0][~painted])
    assert any(not np.array_equal(again[painted], shown[0][painted]) for again in pictures(page))

    choose(page, ".editor select", "1")
    page.click(".tools button")  # paint all
    page.click(".editor .primary")
    page.wait("document.querySelectorAll('.picture.done').length === 0")
    done(page, IMAGES)
    for again in pictures(page):
        assert np.array_equal(again // 4, shown[0] // 4)
        assert not np.array_equal(again, shown[0])
    assert page.complaints() == []


def test_a_file_can_be_painted_on_with_keys(page: Browser, tmp_path: Path) -> None:
    page.click("#tab-images")
    mine = (np.arange(SIDE * SIDE) % 16).reshape(SIDE, SIDE).astype(np.uint8)
    Image.fromarray(mine).save(tmp_path / "mine.png")
    Image.fromarray(mine[:4]).save(tmp_path / "small.png")
    page.upload("#upload", tmp_path / "small.png")
    assert "8 × 4" in page.wait("document.querySelector('.editor > .problem:not([hidden])')?.textContent")
    page.upload("#upload", tmp_path / "mine.png")
    page.wait("document.activeElement.matches('canvas.paper')")
    assert page.js("document.querySelector('.editor .primary').disabled")
    for key in [LEFT, SPACE]:
        page.press(key)
    assert "painted" in page.js("document.getElementById('announcer').textContent")
    choose(page, field(IMAGES, "n"), "4")
    page.click(".editor .primary")
    done(page, IMAGES)
    far = np.ones((SIDE, SIDE), bool)
    far[3:6, 2:5] = False  # the cursor starts in the middle, (4, 4); the brush is 3 pixels wide
    assert len(pictures(page)) == 4
    for picture in pictures(page):
        assert np.array_equal(picture[far], mine[far])


def test_a_preset_decides_what_is_not_touched(page: Browser) -> None:
    page.click("#tab-images")
    page.click(f"{IMAGES} summary")
    choose(page, field(IMAGES, "preset", "select"), "cifar10-l2-512")
    fields = "JSON.parse(arguments[0].match(/-d '(.*)'/s)[1])"
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")

    def request() -> dict[str, Any]:
        page.click(f"{IMAGES} .buttons .quiet")
        page.wait("window.copied !== undefined")
        sent: dict[str, Any] = page.js(fields, page.js("window.copied"))
        return sent

    assert not request().keys() & {"steps", "temperature", "corrector"}
    page.fill(field(IMAGES, "steps"), "9")
    assert request()["steps"] == 9
    assert "temperature" not in request()
