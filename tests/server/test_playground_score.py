"""Scores on the playground in a real browser: what the API says, token by token, of a text or of two."""

from __future__ import annotations

import json
from typing import Any

from tests.server.browser import RIGHT, Browser
from tests.server.playground_page import SCORE, TEXT, done, field, run, texts
from tests.server.running import CONTEXT, Running

BIG_SEED = 2**64 - 1


def score(server: Running, **body: object) -> list[dict[str, Any]]:
    response = server.client.post("/score", json={"per_token": True, **body})
    found: list[dict[str, Any]] = response.json()["scores"]
    return found


def put(page: Browser, param: str, text: str) -> None:
    """Paste a text; typed, a tab would move the focus."""
    page.js(
        "(document.querySelector(arguments[0]).value = arguments[1])", field(SCORE, param, "textarea"), text
    )


def figures(found: dict[str, Any]) -> list[str]:
    """What the card of a score shows."""
    bound, coded = found["nelbo"], found["coded_loss"]
    return [
        f"{bound['nats']:.2f} nats± {bound['standard_error']:.2f} standard error",
        f"{bound['bits_per_byte']:.3f}",
        f"{bound['bits_per_token']:.3f}",
        f"{bound['ppl']:.2f}",
        f"{coded['nats']:.2f} nats± {coded['standard_error']:.2f} standard error",
    ]


def shown(page: Browser) -> list[list[str]]:
    """The figures on each card."""
    cards: list[list[str]] = page.js(
        "[...document.querySelectorAll('article.score')].map((card) => "
        "[...card.querySelectorAll('dd')].map((each) => each.textContent))"
    )
    return cards


def test_a_score_is_that_of_the_server_token_by_token(page: Browser, both: Running) -> None:
    text = "héy  you\n\tand\u00a0me"
    page.click("#tab-score")
    put(page, "text", text)
    page.fill(field(SCORE, "num_samples"), "6")
    page.fill(field(SCORE, "seed", "input"), str(BIG_SEED))
    run(page, SCORE)
    (expected,) = score(both, model="tiny", text=text, num_samples=6, seed=BIG_SEED)
    assert shown(page) == [figures(expected)]
    assert page.js("document.querySelector('.coded dt').textContent") == "Coded lossnot a bound"
    assert page.js("document.querySelector('.score .link').textContent") == str(BIG_SEED)
    costs = [f"{nats:.2f} nats" for nats in expected["per_token"]["nelbo"]]
    tokens = page.js(
        "[...document.querySelectorAll('.heat .cost')].map((each) => "
        "[each.textContent, each.title, each.getAttribute('aria-label').split(': ')[1]])"
    )
    assert tokens == [
        [piece, cost, cost] for piece, cost in zip(expected["per_token"]["pieces"], costs, strict=True)
    ]
    signs = page.js("[...document.querySelectorAll('.heat .sign')].map((each) => each.dataset.sign)")
    assert signs == ["▪", "·", "·", "↵", "→", "▪", "U+00A0"]

    page.js("document.querySelector('.heat .cost').focus()")
    page.press(RIGHT)
    coded = expected["per_token"]["coded_loss"][1]
    reading = f" token 2 of {len(costs)}: {costs[1]}, coded loss {coded:.2f}"
    assert page.js("document.querySelector('.reading').textContent") == reading
    assert page.js("document.querySelectorAll('.heat [tabindex=\"0\"]').length") == 1
    looks = page.js(
        "['backgroundColor', 'boxShadow'].map((name) => new Set([...document.querySelectorAll('.legend .cost')]"
        ".map((each) => getComputedStyle(each)[name])).size)"
    )
    assert looks == [5, 5]  # the bar under a token tells as much as its colour
    assert page.complaints() == []


def test_what_is_wrong_with_one_of_two_texts_is_said_there(page: Browser, both: Running) -> None:
    page.click("#tab-score")
    page.fill(field(SCORE, "text", "textarea"), "ab")
    put(page, "inputs", "é" * (CONTEXT // 2 + 1))  # two tokens each
    page.fill(field(SCORE, "num_samples"), "4")
    page.fill(field(SCORE, "seed", "input"), "3")
    page.click(f"{SCORE} form button[type=submit]")
    message = page.wait(f"document.querySelector('{SCORE} .fault:not([hidden])')?.textContent")
    assert (
        message
        == f"The second text has {CONTEXT + 2} tokens, but the context holds {CONTEXT}; cut it into parts."
    )
    assert page.js("document.activeElement.closest('.wrong').dataset.param") == "inputs"
    assert page.js(f"document.querySelector('{SCORE} progress').position") == 0
    put(page, "inputs", "a" * (CONTEXT + 1))
    page.click(f"{SCORE} form button[type=submit]")
    page.wait(
        f"document.querySelector('{SCORE} .fault:not([hidden])')?.textContent.includes('{CONTEXT + 1} characters')"
    )
    put(page, "inputs", "")
    put(page, "text", "a" * (CONTEXT + 1))
    page.click(f"{SCORE} form button[type=submit]")
    page.wait(
        f"document.querySelector('{SCORE} .fault:not([hidden])')?.textContent.startsWith('“Text to score” has')"
    )
    assert page.js("document.activeElement.closest('.wrong').dataset.param") == "text"
    put(page, "text", "ab")
    put(page, "inputs", "ba")
    run(page, SCORE)
    expected = score(both, inputs=["ab", "ba"], num_samples=4, seed=3)
    assert shown(page) == [figures(each) for each in expected]


def test_an_output_is_handed_over_to_be_scored(page: Browser, both: Running) -> None:
    put(page, "inputs", "of earlier")
    page.fill(field(TEXT, "max_tokens"), "6")
    page.fill(field(TEXT, "seed", "input"), "11")
    run(page, TEXT)
    (text,) = texts(page)
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.click(f"{TEXT} .output .quiet")
    done(page, SCORE)
    assert page.js("document.querySelector('#tab-score').getAttribute('aria-selected')") == "true"
    seed = page.js("document.querySelector('.score .link').textContent")
    assert shown(page) == [figures(each) for each in score(both, text=text, num_samples=64, seed=int(seed))]
    page.click(f"{SCORE} .buttons .quiet")
    body = json.loads(page.wait("window.copied").split("-d '")[1].removesuffix("'"))
    assert body == {"model": "tiny", "text": text, "num_samples": 64, "per_token": True}


def test_a_model_without_a_tokenizer_is_given_token_ids(page: Browser) -> None:
    info = {
        "limits": {"max_n": 1, "max_samples": 8},
        "models": [{"name": "ids", "kind": "text", "tokenizer": "none", "limits": {"vocab_size": 17}}],
    }
    requests, compared, fault = page.awaited(
        "import('/playground/score_tab.js').then(({ scoreTab }) => { "
        f"const tab = scoreTab.build({json.dumps(info)}); "
        "const ask = (text) => { tab.text.input.value = text; return tab.request(); }; "
        "const asked = ['', '3 16\\n4', 'three'].map(ask); "
        "return [asked, !tab.other.hidden, tab.text.fault.textContent]; })"
    )
    expected = {"model": "ids", "token_ids": [3, 16, 4], "num_samples": 8, "per_token": True}
    assert (requests, compared) == ([None, expected, None], False)  # max_n allows one input
    assert "token ids" in fault
    shown = page.awaited(
        "import('/playground/heat_map.js').then(({ HeatMap }) => [...new HeatMap("
        "{token_ids: [3, 16], pieces: null, nelbo: [1.5, 0], coded_loss: [1, 0]}, 17).map.querySelectorAll('.cost')]"
        ".map((each) => [each.textContent, each.title]))"
    )
    assert shown == [["3", "1.50 nats"], ["16", "0.00 nats"]]
