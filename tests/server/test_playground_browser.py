"""The playground in a real browser: what a person does with mouse and keys, and what they then see."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.types import ASGIApp, Receive, Scope, Send

from server.engine import Engine
from server.errors import ApiError
from server.main import http_config
from server.settings import Settings
from tests.server import running as running_module
from tests.server.browser import (
    CONTROL,
    ENTER,
    ESCAPE,
    INSTALLED,
    LEFT,
    MISSING,
    RIGHT,
    SPACE,
    TAB,
    Browser,
    browsing,
)
from tests.server.image_model import LABELS, SIDE
from tests.server.running import Gate, Running, serving, wait_until

pytestmark = pytest.mark.skipif(not INSTALLED, reason=MISSING)

TEXT, IMAGES = "#panel-text", "#panel-images"
BIG_SEED = 2**64 - 1
COUNTS = (
    "['masked', 'partly', 'known'].map((name) => document.querySelectorAll(`#panel-text .${name}`).length)"
)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1400)
        yield browser


@pytest.fixture
def page(window: Browser, both: Running) -> Browser:
    """The playground, just loaded."""
    return opened(window, both)


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


def test_tokens_get_sharper_until_the_text_is_what_the_server_gives(page: Browser, both: Running) -> None:
    page.fill(field(TEXT, "prompt", "textarea"), "ab")
    page.fill(field(TEXT, "suffix", "textarea"), "yz")
    page.fill(field(TEXT, "max_tokens"), "24")
    page.fill(field(TEXT, "steps"), "40")
    page.fill(field(TEXT, "seed", "input"), str(BIG_SEED))
    both.denoiser_of("tiny").hook = lambda lengths: time.sleep(0.04)
    try:
        page.click(f"{TEXT} form button[type=submit]")
        seen, blurs, bars = [], set(), []
        while not page.js(f"document.querySelector('{TEXT} .done') !== null"):
            seen.append(page.js(COUNTS))
            bars.append(page.js(f"document.querySelector('{TEXT} progress').value"))
            blurs |= set(
                page.js(
                    "[...document.querySelectorAll('.masked, .partly')].map((each) => getComputedStyle(each).filter)"
                )
            )
    finally:
        both.denoiser_of("tiny").hook = None
    seen = [counts for counts in seen if sum(counts) == 24]
    assert any(masked and partly and known for masked, partly, known in seen)
    assert [known for _, _, known in seen] == sorted(known for _, _, known in seen)
    assert len(blurs) == 2  # two digits a token: none of them known, or one
    assert bars == sorted(bars) and any(0 < bar < 1 for bar in bars)

    body: dict[str, Any] = {"prompt": "ab", "suffix": "yz", "max_tokens": 24, "steps": 40, "temperature": 0.7}
    (output,) = both.post(model="tiny", seed=BIG_SEED, **body).json()["outputs"]
    assert texts(page) == [output["text"]]
    assert page.js("document.querySelector('#panel-text .output .link').textContent") == str(BIG_SEED)
    fixed = page.js("[...document.querySelectorAll('.fixed')].map((each) => each.textContent)")
    assert fixed == ["ab", "yz"]
    colours = page.js(
        "['.fixed', '.known'].map((each) => getComputedStyle(document.querySelector(each)).color)"
    )
    assert colours[0] != colours[1]
    facts = page.js("[...document.querySelectorAll('#panel-text .facts dd')].map((each) => each.textContent)")
    assert facts[:2] == [str(output["nfe"]), str(output["steps_skipped"])]
    assert page.complaints() == []


def test_gaps_are_made_of_selected_text(page: Browser, both: Running) -> None:
    page.click(f"{TEXT} .segments label:last-child")
    area = field(TEXT, "template", "textarea")
    page.fill(area, "one two three.")
    page.js(f'document.querySelector("{area}").setSelectionRange(4, 7)')
    page.click(f"{TEXT} form > button")
    assert page.js(f'document.querySelector("{area}").value') == "one [[1]] three."
    page.fill(area, "one [[5]] three[[2]].")
    page.fill(field(TEXT, "n"), "2")
    page.fill(field(TEXT, "seed", "input"), "7")
    page.click(field(TEXT, "steps", "input[type=checkbox]"))
    run(page, TEXT)
    template = ["one ", {"gap": 5}, " three", {"gap": 2}, "."]
    answer = both.post(template=template, n=2, seed=7, steps="exact", temperature=0.7).json()
    assert texts(page) == [output["text"] for output in answer["outputs"]]
    page.fill(area, "nothing to fill")
    page.click(f"{TEXT} form button[type=submit]")
    assert "no gap" in page.js(f'document.querySelector("{field(TEXT, "template", ".problem")}").textContent')


def test_keys_alone_are_enough(page: Browser) -> None:
    page.press(TAB)
    assert page.js("document.activeElement.className") == "skip"
    page.press(ENTER)
    assert page.js("document.activeElement.id") == "main"
    reached: list[str] = []
    for _ in range(40):
        page.press(TAB)
        reached.append(page.js("document.activeElement.closest('[data-param]')?.dataset.param ?? ''"))
        outline = page.js("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.js("document.activeElement.type") == "radio"
        if page.js("document.activeElement.type") == "submit":
            break
    assert {"prompt", "suffix", "max_tokens", "steps", "temperature", "n", "seed"} <= set(reached)
    page.press(ENTER)
    done(page, TEXT)
    page.js("document.querySelector('#panel-text textarea').focus()")
    page.press(CONTROL, ENTER)
    page.wait(f"document.querySelector('{TEXT} .line').textContent !== 'Done.'")
    done(page, TEXT)
    page.js("document.querySelector('#tab-text').focus()")
    page.press(RIGHT)
    assert page.js("document.activeElement.id") == "tab-images"
    assert page.js("[...document.querySelectorAll('[role=tabpanel]')].map((each) => each.hidden)") == [
        True,
        False,
    ]
    page.press(LEFT)
    unnamed = page.js(
        "[...document.querySelectorAll('input, select, textarea')].filter((each) => "
        "!each.labels?.length && !each.ariaLabel).length"
    )
    assert unnamed == 0


def test_stopping_frees_the_rows(page: Browser, both: Running) -> None:
    gate = Gate()
    both.denoiser_of("tiny").hook = gate
    try:
        page.click(f"{TEXT} form button[type=submit]")
        assert gate.entered.wait(30)
        page.press(ESCAPE)
        page.wait(f"document.querySelector('{TEXT} .line').textContent === 'Stopped.'")
    finally:
        gate.opened.set()
        both.denoiser_of("tiny").hook = None
    wait_until(lambda: both.engine.held_rows == 0)
    assert page.js(f"document.querySelector('{TEXT} .fault').hidden")


def test_what_the_server_refuses_is_shown_at_its_control(page: Browser) -> None:
    page.fill(field(TEXT, "prompt", "textarea"), "a" * 60)
    page.click(f"{TEXT} form button[type=submit]")
    message = page.wait("document.querySelector('#panel-text .fault:not([hidden])')?.textContent")
    assert "context" in message
    wrong = page.js("[...document.querySelectorAll('.wrong')].map((each) => each.dataset.param)")
    assert wrong == ["max_tokens"]
    assert page.js("document.activeElement.getAttribute('aria-invalid')") == "true"
    page.fill(field(TEXT, "max_tokens"), "65")
    page.click(f"{TEXT} form button[type=submit]")
    problem = page.js(f'document.querySelector("{field(TEXT, "max_tokens", ".problem")}").textContent')
    assert problem == "Must be a whole number from 1 to 64."
    page.fill(field(TEXT, "max_tokens"), "4")
    page.fill(field(TEXT, "seed", "input"), str(2**64))
    page.click(f"{TEXT} form button[type=submit]")
    assert page.js("document.activeElement.closest('[data-param]').dataset.param") == "seed"


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well_in_both_lights_and_on_any_screen(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    run(page, TEXT)
    page.fill(field(TEXT, "n"), "999")  # so that a fault is on show as well
    page.click(f"{TEXT} form button[type=submit]")
    for tab in ["text", "images"]:
        page.click(f"#tab-{tab}")
        page.click(f"#panel-{tab} summary")
        assert page.js(f"({CONTRAST})()") == []
        for width in [400, 1400]:
            page.resize(width)
            assert page.js("document.documentElement.scrollWidth") == width
            cut = page.js(
                "[...document.querySelectorAll('main *, header *')].filter((each) => "
                "each.getClientRects().length && !each.closest('.unseen') && "
                "(each.getBoundingClientRect().right > innerWidth + 1)).length"
            )
            assert cut == 0
    brightness = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).mean()
    assert (brightness > 128) == (scheme == "light")
    for _ in range({"light": 2, "dark": 1}[scheme]):  # from auto to the other one
        page.click("#theme")
    other = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L")).mean()
    assert (other > 128) != (scheme == "light")
    page.js("localStorage.clear()")
    page.prefer("light")


# The texts on show whose contrast with what is behind them is under 4.5; those of disabled controls may be.
CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const over = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const bad = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.getClientRects().length || node.closest('.unseen, .skip, :disabled')) continue;
    const behind = [];
    for (let each = node; each; each = each.parentElement) behind.unshift(getComputedStyle(each).backgroundColor);
    const [a, b] = [over(behind), over([...behind, getComputedStyle(node).color])].map(light).sort((p, q) => q - p);
    if ((a + 0.05) / (b + 0.05) < 4.5) bad.push(`${node.className}: ${node.textContent.slice(0, 40)}`);
  }
  return bad;
}"""


def test_everything_comes_from_the_server_and_seeds_keep_their_digits(page: Browser, both: Running) -> None:
    loaded = page.js("performance.getEntriesByType('resource').map((each) => each.name)")
    assert loaded and all(name.startswith(both.url) for name in loaded)
    text = page.awaited(
        f"import('/playground/json.js').then((json) => json.requestText({{n: 1, seed: '{BIG_SEED}'}}))"
    )
    assert text == f'{{"n":1,"seed":{BIG_SEED}}}'
    parsed = page.awaited(
        "import('/playground/json.js').then((json) => "
        'json.parseAnswer(\'{"seed":18446744073709551615,"text":"a \\\\"seed\\\\":12"}\'))'
    )
    assert parsed == {"seed": str(BIG_SEED), "text": 'a "seed":12'}


def test_every_token_is_shown_at_its_place(page: Browser) -> None:
    frame = {
        "gaps": [[1, 3], [4, 5]],
        "positions": [2, 4],
        "digits": [[16, None], [3, 4]],
        "pieces": [None, "X"],
        "revealed": [0.5, 1],
        "step": 0,
        "nfe": 1,
    }
    shown = page.awaited(
        "import('/playground/text_output.js').then(({ TextOutput }) => { "
        "const output = new TextOutput(0, 1, ['a', null, 'b', null], {base: 17, target_length: 2}, () => {}); "
        f"output.frame({json.dumps(frame)}); "
        "const spans = [...output.text.querySelectorAll('.fixed, .token')]; "
        "return spans.map((each) => [each.className, each.textContent]); })"
    )
    assert shown == [
        ["fixed", "a"],
        ["token masked", "··"],
        ["token partly", "g·"],
        ["fixed", "b"],
        ["token known", "X"],
    ]


def test_a_full_queue_counts_down_and_a_server_that_ends_says_so(window: Browser, model_path: Path) -> None:
    with serving(model_path, max_batch_rows=1, max_queue_rows=1, max_n=1) as server:
        page = opened(window, server)
        gate = Gate()
        server.denoiser.hook = gate
        other = threading.Thread(target=lambda: server.post(max_tokens=4))
        other.start()
        assert gate.entered.wait(30)
        page.click(f"{TEXT} form button[type=submit]")
        text = page.wait("document.querySelector('.fault:not([hidden]) .countdown')?.textContent")
        assert "try again in" in text
        assert page.js(f"document.querySelector('{TEXT} form button[type=submit]').disabled")
        gate.opened.set()
        server.denoiser.hook = None
        other.join(30)
        page.wait(f"!document.querySelector('{TEXT} form button[type=submit]').disabled")
        run(page, TEXT)
        server.engine.drain()
        page.click(f"{TEXT} form button[type=submit]")
        fault = page.wait("document.querySelector('.fault:not([hidden])')?.textContent")
        assert "shutting down" in fault
    page.click(f"{TEXT} form button[type=submit]")
    page.wait("document.querySelector('.fault:not([hidden])')?.textContent.includes('lost')")
    assert page.complaints() == []


class Guard:
    """Asks for a key before everything but the page itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] != "http" or scope["path"].startswith(("/playground/", "/ready"))
        if allowed or scope["path"] == "/" or (b"authorization", b"Bearer sesame") in scope["headers"]:
            await self.app(scope, receive, send)
        else:
            await ApiError(401, "invalid_api_key", "give a key").response()(scope, receive, send)


def test_a_key_is_asked_for_and_kept_for_this_tab_only(
    window: Browser, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(engine: Engine, settings: Settings) -> uvicorn.Config:
        config = http_config(engine, settings)
        config.app = Guard(config.app)  # type: ignore[arg-type]
        return config

    monkeypatch.setattr(running_module, "http_config", guarded)
    with serving(model_path) as server:
        window.open(f"{server.url}/")
        for key in ["wrong", "sesame"]:
            fault = "document.getElementById('key-problem').hidden"
            window.wait(
                f"document.getElementById('key-dialog').open && {fault} === {json.dumps(key == 'wrong')}"
            )
            window.fill("#key", key)
            window.press(ENTER)
        window.wait("document.querySelectorAll('[role=tab]').length > 0")
        run(window, TEXT)
        assert window.js("sessionStorage.getItem('prime-key')") == "sesame"
        assert window.js("document.cookie + JSON.stringify(localStorage)") == "{}"
        window.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
        window.click(f"{TEXT} .buttons .quiet")
        copied = window.wait("window.copied")
        assert "$API_KEY" in copied and "sesame" not in copied
        window.js("sessionStorage.clear()")
