"""POST /v1/completions: OpenAI's shapes around the same samples as POST /generate."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from kernels.noise import row_seed
from server.http.checking import checked_request
from server.http.errors import ApiError
from server.schemas.base import Limits
from server.schemas.completions import completion_request
from tests.server.running import (
    CONTEXT,
    Gate,
    Running,
    assert_error,
    serving,
    wait_until,
    write_without_tokenizer,
)

BODY: dict[str, Any] = {"prompt": "ab", "max_tokens": 12, "steps": 24, "seed": 5}


def complete(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/v1/completions", json=body)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["text"] for choice in choices]


def gaps(server: Running, **body: object) -> list[str]:
    return [output["gaps"][0] for output in server.post(**body).json()["outputs"]]


def chunks_of(server: Running, **body: object) -> list[dict[str, Any]]:
    """The chunks of a stream, which must be plain data frames alone and end with [DONE]."""
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    *frames, last = [line.removeprefix("data: ") for line in lines]
    assert last == "[DONE]"
    return [json.loads(frame) for frame in frames]


def test_shape_and_samples(server: Running) -> None:
    before = int(time.time())
    response = complete(server, **BODY, n=3, model="tiny")
    own = server.post(**BODY, n=3).json()
    body = response.json()
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}
    assert body["id"] == "cmpl-" + response.headers["x-request-id"].removeprefix("req-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert before <= body["created"] <= time.time()
    assert body["choices"] == [
        {"index": index, "text": out["gaps"][0], "logprobs": None, "finish_reason": out["finish_reason"]}
        for index, out in enumerate(own["outputs"])
    ]
    assert body["usage"] == {name: own["usage"][name] for name in body["usage"]}
    assert body["usage"].keys() == {"prompt_tokens", "completion_tokens", "total_tokens"}
    assert response.headers["x-seed"] == "5"
    assert response.headers["x-nfe"] == str(own["usage"]["denoiser_calls"])


def test_an_unset_seed_is_drawn_and_told(server: Running) -> None:
    unset = {**BODY, "seed": None, "prompt": ["ab", "ab"]}
    first, second = complete(server, **unset), complete(server, **unset)
    assert first.headers["x-seed"] != second.headers["x-seed"]
    assert texts(complete(server, **{**unset, "seed": int(first.headers["x-seed"])})) == texts(first)


def test_prompts_come_first_in_the_order_of_choices(server: Running) -> None:
    prompts = ["ab", "ab", "xyz"]
    response = complete(server, **{**BODY, "prompt": prompts}, n=2)
    expected = [
        text
        for number, prompt in enumerate(prompts)
        for text in gaps(server, **{**BODY, "prompt": prompt, "seed": row_seed(5, 2 * number)}, n=2)
    ]
    assert texts(response) == expected
    assert len(set(expected)) == 6  # equal prompts are sampled anew
    assert response.json()["usage"]["prompt_tokens"] == 7
    tokens = [list(prompt.encode()) for prompt in prompts]
    assert texts(complete(server, **{**BODY, "prompt": tokens}, n=2)) == expected
    assert texts(complete(server, **{**BODY, "prompt": tokens[0]}, n=2)) == expected[:2]


def test_null_stands_for_the_default(server: Running) -> None:
    names = [
        "prompt",
        "suffix",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "stream",
        "echo",
        "best_of",
    ]
    names += [
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "logprobs",
        "user",
        "stream_options",
        "model",
    ]
    plain = texts(complete(server, seed=1))
    assert texts(complete(server, seed=1, **dict.fromkeys(names))) == plain
    assert plain == gaps(server, seed=1, max_tokens=16)


@pytest.mark.parametrize("prompt", ["h\u00e9", list(b"h\xc3\xa9"), ""])
def test_echo_puts_the_prompt_before_the_text(server: Running, prompt: Any) -> None:
    body = {**BODY, "prompt": prompt}
    before = prompt if isinstance(prompt, str) else "h\u00e9"
    assert texts(complete(server, **body, echo=True)) == [
        before + text for text in texts(complete(server, **body))
    ]
    assert texts(complete(server, **body, suffix="z", echo=True)) == [
        before + text for text in gaps(server, **body, suffix="z")
    ]


def test_stop_is_a_text_or_a_list(server: Running) -> None:
    (text,) = texts(complete(server, **BODY))
    stop = text[4]
    response = complete(server, **BODY, stop=stop)
    assert texts(response) == [text[: text.index(stop)]]
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert texts(complete(server, **BODY, stop=["\u2014", stop])) == texts(response)


VARIANTS: list[dict[str, Any]] = [
    {"n": 3},
    {"prompt": ["ab", "c"], "n": 2, "echo": True},
    {"suffix": "z", "echo": True, "steps": "exact"},
    {"prompt": list(b"h\xc3\xa9"), "echo": True},
    {"stop": [">", "MI", "I7"], "n": 4, "max_tokens": 40, "temperature": 0.7},
    {"max_tokens": 1, "steps": 1},
    {"n": 8, "max_tokens": 50, "steps": 50, "temperature": 0.5},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_tells_the_same_text(server: Running, variant: dict[str, Any]) -> None:
    body = {**BODY, **variant}
    plain = complete(server, **body).json()
    chunks = chunks_of(server, **body)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    told = ["" for _ in plain["choices"]]
    finished: dict[int, str] = {}
    for chunk in chunks:
        assert chunk.keys() == {"id", "object", "created", "model", "choices"}
        (choice,) = chunk["choices"]
        assert choice["index"] not in finished
        told[choice["index"]] += choice["text"]
        if choice["finish_reason"] is None:
            assert choice["text"]
        else:
            finished[choice["index"]] = choice["finish_reason"]
    assert told == [choice["text"] for choice in plain["choices"]]
    assert finished == {choice["index"]: choice["finish_reason"] for choice in plain["choices"]}


def test_usage_is_the_last_chunk_if_it_is_asked_for(server: Running) -> None:
    options = {"include_usage": True, "include_obfuscation": False}
    *chunks, last = chunks_of(server, **BODY, n=2, stream_options=options)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == complete(server, **BODY, n=2).json()["usage"]


def test_text_is_sent_while_the_rest_is_sampled(model_path: Path) -> None:
    with serving(model_path) as server:
        body = {"max_tokens": 20, "steps": "exact", "seed": 3, "temperature": 0, "stream": True}
        calls = int(complete(server, **{**body, "stream": False}).headers["x-nfe"])
        server.denoiser.lengths.clear()
        gate = Gate()
        server.denoiser.hook = lambda lengths: (
            gate(lengths) if len(server.denoiser.lengths) == calls else None
        )
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["x-nfe"] == str(calls)
            first = json.loads(next(response.iter_lines()).removeprefix("data: "))
            assert not gate.opened.is_set()
            gate.opened.set()
        assert first["choices"][0]["text"]
        wait_until(lambda: server.engine.held_rows == 0)


def test_a_failure_on_the_way_ends_the_stream(model_path: Path) -> None:
    with serving(model_path) as server:
        server.denoiser.broken_length = 11
        body = {"max_tokens": 11, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[0] == "event: error"
        assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "non_finite"
        assert_error(complete(server, max_tokens=11), 500, "non_finite")
        wait_until(lambda: server.engine.held_rows == 0)


def test_all_prompts_are_admitted_as_one(model_path: Path) -> None:
    with serving(model_path, max_n=8, max_batch_rows=8, max_queue_rows=8) as server:
        gate = Gate()
        server.denoiser.hook = gate
        body = {**BODY, "prompt": ["a", "b", "c"], "n": 2, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            assert gate.entered.wait(60)
            assert server.engine.held_rows == 6
            with httpx.Client(base_url=server.url, timeout=60) as other:
                refused = other.post("/v1/completions", json={**body, "n": 1})
            assert_error(refused, 429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert server.engine.held_rows == 6
            gate.opened.set()
            response.read()
        wait_until(lambda: server.engine.held_rows == 0)


def test_limits_hold_for_all_prompts_together(model_path: Path, server: Running) -> None:
    message = assert_error(complete(server, prompt=["a"] * 9, n=2), 422, "invalid_value", "n")
    assert "at most 16" in message
    assert "18" in message
    message = assert_error(complete(server, prompt=["a", "b" * 60]), 422, "invalid_value", "max_tokens")
    assert message.startswith("prompt number 2: max_tokens must be at most 4")
    message = assert_error(complete(server, prompt=["b" * 65, "a"]), 422, "invalid_value", "prompt")
    assert message.startswith("prompt number 1: prompt has 65 characters")
    message = assert_error(
        complete(server, prompt=["a", "b"], suffix="z", stop="c"), 422, "invalid_value", "stop"
    )
    assert message.startswith("prompt number 1: stop needs an open end")
    with serving(model_path, max_work=11 * 10 * 3) as small:
        body = {"max_tokens": 10, "steps": 10}
        assert len(texts(complete(small, **body, prompt=["a"] * 3))) == 3
        message = assert_error(complete(small, **body, prompt=["a"] * 4), 422, "invalid_value", "steps")
        assert "summed over the 4 prompts" in message
        assert_error(complete(small, **body, prompt="a", n=4), 422, "invalid_value", "steps")


BAD: list[tuple[str, Any]] = [
    *[
        ("prompt", value)
        for value in [1, True, {}, [], [[]], [True], [1.0], ["a", 1], [1, "a"], [[1], "a"], [["a"]]]
    ],
    *[
        ("prompt", value)
        for value in [[257], [-1], [1] * (CONTEXT + 1), ["a"] * 17, [[1], [257]], [{}], [[1.0]]]
    ],
    *[("stop", value) for value in ["", 1, [""], [1], ["a"] * 9, "a" * 257, {}]],
    *[("best_of", value) for value in [0, 2, 1.0, True, "1"]],
    *[(name, value) for name in ["frequency_penalty", "presence_penalty"] for value in [0.1, -1, True, "0"]],
    *[("logit_bias", value) for value in [{"50": 1}, [], 0]],
    *[("logprobs", value) for value in [0, 1, 5, True, False]],
    *[("user", value) for value in ["", "me", 1]],
    *[("echo", value) for value in [0, 1, "true"]],
    *[("stream", value) for value in [0, 1, "true"]],
    *[
        ("stream_options", value)
        for value in [{"include_usage": 1}, {"include_obfuscation": True}, {"a": 1}, [], True]
    ],
    *[("max_tokens", value) for value in [0, -1, CONTEXT + 1, 1.0, "7"]],
    *[("seed", value) for value in [-1, -(2**63), 2**64, 1.0]],
    *[("n", value) for value in [0, 17, 1.0, True]],
    *[("temperature", value) for value in [-0.1, 101, "1"]],
    *[("top_p", value) for value in [0, 1.1]],
    ("suffix", ["a"]),
    ("model", 1),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_what_cannot_be_honoured_is_refused_by_name(server: Running, field: str, value: Any) -> None:
    body = {"stream": True, field: value}
    message = assert_error(complete(server, **body), 422, "invalid_value", field)
    assert message.startswith(f"{field} must be ")


def test_lists_of_several_kinds_and_objects_of_many_keys_are_not_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = Limits(context=64, vocab_size=257, max_n=4, max_steps=8, max_work=2**24, max_body_bytes=2**20)
    request_type = completion_request(limits)
    monkeypatch.setattr(request_type, "model_validate", lambda *_: pytest.fail("it was described"))
    bad: list[tuple[str, Any]] = [("prompt", ["a", 1]), ("prompt", [[1], ["a"]]), ("stop", ["a", 1])]
    for field, value in [*bad, ("logit_bias", {"50": 1}), ("stream_options", {"a": 1})]:
        with pytest.raises(ApiError, match=rf"^{field} must be "):
            checked_request(request_type, {field: value})


def test_values_that_ask_for_nothing_are_taken(server: Running) -> None:
    off = {
        "best_of": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "stop": [],
        "suffix": None,
    }
    assert texts(complete(server, **BODY, **off)) == texts(complete(server, **BODY))


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"suffix": "z", "stop": "a"}, "invalid_value", "stop"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"promt": "a"}, "unknown_key", None),
        ({"template": ["a", {"gap": 1}]}, "unknown_key", None),
        ({"messages": None}, "unknown_key", None),
    ],
)
def test_fields_that_contradict_or_do_not_exist(
    server: Running, body: dict[str, Any], code: str, param: str | None
) -> None:
    assert_error(complete(server, **body), 422, code, param)


def test_models(both: Running) -> None:
    message = assert_error(complete(both, model="tiny-images"), 422, "wrong_route", "model")
    assert "POST /v1/images/generations" in message
    assert_error(complete(both, model="../tiny"), 404, "model_not_found", "model")


def test_a_model_without_a_tokenizer_has_no_text(model_path: Path, tmp_path: Path) -> None:
    with serving(write_without_tokenizer(model_path, tmp_path)) as server:
        assert server.post(max_tokens=3).status_code == 200
        message = assert_error(complete(server, prompt=[1, 2]), 422, "wrong_route", "model")
        assert "POST /generate" in message


def test_it_is_described(server: Running) -> None:
    operation = server.client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert {"type": "null"} in schema["properties"]["n"]["anyOf"]
    assert schema["properties"]["max_tokens"]["default"] == 16
    assert "left" in schema["properties"]["logprobs"]["description"]
    assert schema["properties"]["top_p"]["description"].endswith(", or null for the default")
    assert operation["responses"]["200"]["headers"].keys() == {"X-Seed", "X-NFE", "X-Request-Id"}
    assert "Completion" in str(operation["responses"]["200"]["content"]["application/json"])
