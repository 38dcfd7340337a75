"""Bad values are refused with 422 by the name of their field and its limit, and never repeated."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from prime_core.tokenizer import Tokenizer
from server.http.checking import checked_request
from server.http.errors import ApiError
from server.schemas.base import STREAM_RULE, Limits
from server.schemas.completions import completion_request
from server.schemas.text import text_request
from tests.server.running import CONTEXT, Running, assert_error, serving

CANARY = "canary7461"
LIMITS = Limits(
    context=64, vocab_size=257, max_n=16, max_steps=64, max_work=2**24, max_body_bytes=2**20, max_chars=64
)
NOT_INTEGERS = [True, False, "7", 1.0, 1.5, [1], {}, "NaN"]

BAD: list[tuple[str, Any]] = [
    *[("n", value) for value in [0, -1, 17, 2**31, 10**18, 2**70, None, *NOT_INTEGERS]],
    *[("steps", value) for value in [0, -1, 4097, 2**31, 10**18, "all", None, *NOT_INTEGERS]],
    *[("max_tokens", value) for value in [0, -1, CONTEXT + 1, 2**31, 10**18, *NOT_INTEGERS]],
    *[("top_k", value) for value in [-1, 258, 2**31, 10**18, None, *NOT_INTEGERS]],
    *[("seed", value) for value in [-1, 2**64, 2**70, *NOT_INTEGERS]],
    *[("temperature", value) for value in [-0.1, 100.1, 10**18, True, "1", None, [], {}]],
    *[("top_p", value) for value in [0, 0.0, -0.5, 1.01, 2, True, "1", None]],
    *[("prompt", value) for value in [1, True, {}, ["a"], [1.0], [True], [-1], [257], [1] * (CONTEXT + 1)]],
    *[("suffix", value) for value in [1, [1], {}, False]],
    *[("template", value) for value in ["text", [], [1], [None], [{"gap": 0}], [{"gap": CONTEXT + 1}]]],
    *[("template", value) for value in [[{"gap": True}], [{"gap": 3, CANARY: 1}], [{}], [[]], {"gap": 3}]],
    ("template", [{"gap": 1}] * 1025),
    *[("stop", value) for value in ["", "a" * 257, None, [1], [""], ["a" * 257], ["a"] * 9, [None], {}]],
    *[("stream", value) for value in [1, 0, "false", None]],
    *[("model", value) for value in [1, True, ["tiny"], {}]],
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value(server: Running, field: str, value: Any) -> None:
    message = assert_error(server.post(**{field: value}), 422, "invalid_value", field)
    assert message.startswith(f"{field} must be ")
    assert CANARY not in message


def test_limits_stand_in_the_messages(server: Running) -> None:
    expected = {
        "n": (17, "n must be an integer from 1 to 16"),
        "steps": (10**6, 'steps must be an integer from 1 to 4096, or "exact"'),
        "top_k": (10**6, "top_k must be an integer from 0 (off) to 257"),
        "seed": (-1, "seed must be an integer from 0 to 2^64 - 1, or null for one that the server draws"),
        "stream": (1, f"stream must be {STREAM_RULE}"),
    }
    for field, (value, message) in expected.items():
        assert assert_error(server.post(**{field: value}), 422, "invalid_value", field) == message


@pytest.mark.parametrize(
    "number",
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0.0", "-0", "1" + "0" * 5000, "1." + "0" * 5000],
)
@pytest.mark.parametrize("field", ["n", "temperature", "top_p", "seed", "max_tokens"])
def test_numbers_that_json_cannot_mean(server: Running, field: str, number: str) -> None:
    response = server.client.post(
        "/generate", content=f'{{"{field}": {number}}}', headers={"content-type": "application/json"}
    )
    message = assert_error(response, 422, "invalid_value", field)
    assert "minus zero" in message and "1000 digits" in message  # the rule of the field would not explain it


@pytest.mark.parametrize("field", ["prompt", "suffix", "stop", "template"])
def test_lone_surrogates(server: Running, field: str) -> None:
    text = (
        json.dumps({field: "a\ud800b"})
        if field not in {"stop", "template"}
        else json.dumps({field: ["\udfff"]})
    )
    response = server.client.post("/generate", content=text, headers={"content-type": "application/json"})
    assert_error(response, 422, "invalid_value", field)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "a" * CONTEXT}, "prompt", str(CONTEXT)),
        ({"prompt": "a" * 60, "max_tokens": 10}, "max_tokens", "4"),
        ({"prompt": "a" * 40, "suffix": "b" * 30}, "suffix", "23"),
        ({"template": ["a", {"gap": 3}], "prompt": "b"}, "prompt", "template"),
        ({"template": ["a", {"gap": 3}], "max_tokens": 4}, "max_tokens", "template"),
        ({"template": ["a"]}, "template", "gap"),
        ({"template": [{"gap": 40}, "x", {"gap": 40}]}, "template", str(CONTEXT)),
        ({"suffix": "a", "stop": ["b"]}, "stop", "suffix"),
    ],
)
def test_layouts_that_do_not_fit(server: Running, body: dict[str, Any], param: str, words: str) -> None:
    assert words in assert_error(server.post(**body), 422, "invalid_value", param)


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: 1 / 0)
    long = "a" * (CONTEXT + 1)  # tokens of one byte each
    half = "a" * (CONTEXT // 2 + 1)
    for body in [{"prompt": long}, {"suffix": long}, {"template": [half, {"gap": 1}, half]}]:
        param = next(iter(body))
        message = assert_error(server.post(**body), 422, "invalid_value", param)
        assert f"{param} has {2 * len(half) if param == 'template' else len(long)} characters" in message
    assert server.engine.held_rows == 0


def test_unknown_keys_are_refused_without_naming_them(server: Running) -> None:
    for body in [{CANARY: 1}, {"n": 1, CANARY * 10000: 1}, {"n": 1, "max_token": 3}, {"": 1}]:
        message = assert_error(server.post(**body), 422, "unknown_key")
        assert f"key number {len(body)} " in message
        assert CANARY not in message
    assert "did you mean max_tokens?" in server.post(max_token=3).json()["error"]["message"]


def test_parts_of_many_keys_cost_no_time_of_the_event_loop(server: Running) -> None:
    described = 0

    class Counting(text_request(LIMITS)):  # type: ignore[misc]
        @classmethod
        def model_validate(cls, *arguments: Any, **options: Any) -> Any:
            nonlocal described
            described += 1
            return super().model_validate(*arguments, **options)

    many = {f"k{index}": 1 for index in range(50_000)}
    bad: list[tuple[str, list[Any]]] = [
        ("template", parts)
        for parts in [[many], [{"gap": 1, **many}], ["a", {"gap": 1}, {}], [{"gap": 1}, {"gaps": 1}]]
    ]
    for field, parts in [*bad, ("stop", ["a", 1])]:
        with pytest.raises(ApiError, match=rf"^{field} must be ") as caught:
            checked_request(Counting, {field: parts})
        assert (caught.value.status, caught.value.param) == (422, field)
    assert described == 0  # pydantic would describe each key
    assert checked_request(Counting, {"template": ["a", {"gap": 1}]}).template is not None
    assert described == 1
    assert_error(server.post(template=["a", many]), 422, "invalid_value", "template")


def test_defaults_stay_within_the_limits() -> None:
    limits = dataclasses.replace(LIMITS, context=8, max_steps=10)
    assert checked_request(text_request(limits), {}).steps == 10
    completion = checked_request(completion_request(limits), {})
    assert (completion.steps, completion.max_tokens) == (10, 8)


def test_big_bad_strings_are_not_repeated(server: Running) -> None:
    response = server.post(n=CANARY * 50000)
    assert CANARY not in response.text
    assert_error(response, 422, "invalid_value", "n")


def test_work_of_a_request_is_capped(server: Running) -> None:
    with serving(server.settings.model[0], max_work=2000, max_steps=100) as small:
        assert small.post(n=2, max_tokens=10, steps=100).status_code == 200  # 2 * 10 * at most 20 sub-tokens
        for body in [
            {"n": 2, "max_tokens": 40, "steps": 26},
            {"n": 4, "max_tokens": 16, "steps": "exact"},
            {"n": 1, "template": ["x" * 60, {"gap": 2}, "y"], "steps": 32, "prompt": None} | {"n": 9},
        ]:
            assert "2000" in assert_error(small.post(**body), 422, "invalid_value", "steps")
        assert small.post(n=2, max_tokens=40, steps=25).status_code == 200
        assert small.metric("prime_denoiser_calls_total") > 0


def test_refusals_are_counted_and_cost_no_call(server: Running) -> None:
    before = server.metric("prime_rejected_total", reason="invalid")
    unknown = server.metric("prime_rejected_total", reason="invalid", model="")
    calls = server.metric("prime_denoiser_calls_total")
    for _ in range(3):
        server.post(n=0)
    server.post(prompt="a" * 1000)
    server.post(model="other")
    assert server.metric("prime_rejected_total", reason="invalid", model="") == unknown + 1
    assert server.metric("prime_rejected_total", reason="invalid") == before + 4
    assert server.metric("prime_denoiser_calls_total") == calls
    assert server.engine.held_rows == 0
