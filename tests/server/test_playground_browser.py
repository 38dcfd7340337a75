"""The playground in a real browser: what a person does with mouse and keys to get a text, and what they then see."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.server.browser import CONTROL, ENTER, ESCAPE, LEFT, RIGHT, TAB, Browser
from tests.server.playground_page import SCORE, TEXT, done, field, run, texts
from tests.server.running import Gate, Running, wait_until

BIG_SEED = 2**64 - 1
COUNTS = (
    "['masked', 'partly', 'known'].map((name) => document.querySelectorAll(`#panel-text .${name}`).length)"
)


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
        True,
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
        "const output = new TextOutput(0, 1, ['a', null, 'b', null], {base: 17, target_length: 2}, {}); "
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well_in_both_lights_and_on_any_screen(page: Browser, scheme: str) -> None:
    page.prefer(scheme)
    page.fill(
        field(TEXT, "seed", "input"), "7"
    )  # others may give a text that has more tokens when it is read
    run(page, TEXT)
    page.click(f"{TEXT} .output .quiet")
    done(page, SCORE)
    page.click("#tab-text")
    page.fill(field(TEXT, "n"), "999")  # so that a fault is on show as well
    page.click(f"{TEXT} form button[type=submit]")
    page.click(f"{TEXT} summary")
    page.js("document.querySelector('#panel-images details').open = true")
    for tab in ["text", "images", "score"]:
        page.click(f"#tab-{tab}")
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
