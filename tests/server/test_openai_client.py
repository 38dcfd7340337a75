"""The official client against a running server: whatever it parses, raises and tries again."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.running import Gate, Running, assert_error, serving, wait_until

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "ab",
    "max_tokens": 12,
    "seed": 5,
    "extra_body": {"steps": 24},
}


def connect(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


@pytest.fixture(scope="module")
def client(both: Running) -> Iterator[openai.OpenAI]:
    with connect(both) as client:
        yield client


def own_texts(server: Running, **body: object) -> list[str]:
    fields = {"prompt": "ab", "max_tokens": 12, "seed": 5, "steps": 24, **body}
    return [output["gaps"][0] for output in server.post(**fields).json()["outputs"]]


def test_completions(both: Running, client: openai.OpenAI) -> None:
    answer = client.completions.create(**BODY, n=2, top_p=0.9)
    assert [choice.text for choice in answer.choices] == own_texts(both, n=2, top_p=0.9)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.choices[0].logprobs is None
    assert answer.choices[0].finish_reason in {"stop", "length"}
    raw = client.completions.with_raw_response.create(**BODY)
    assert raw.headers["x-seed"] == "5"
    assert answer.model_extra == {}


def test_streamed_completions(both: Running, client: openai.OpenAI) -> None:
    told = {0: "", 1: ""}
    reasons = {}
    usage = None
    for chunk in client.completions.create(**BODY, n=2, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            told[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert list(told.values()) == own_texts(both, n=2)
    assert set(reasons.values()) <= {"stop", "length"}
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_the_async_client(both: Running) -> None:
    async def ask() -> tuple[list[str], str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{both.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(
                *(client.completions.create(**{**BODY, "prompt": prompt}) for prompt in ["ab", "cd"])
            )
            stream = await client.completions.create(**BODY, stream=True)
            told = [chunk.choices[0].text async for chunk in stream]
            models = [model.id async for model in client.models.list()]
            return [answer.choices[0].text for answer in answers], "".join(told), models

    texts, told, models = asyncio.run(ask())
    assert texts == own_texts(both) + own_texts(both, prompt="cd")
    assert told == texts[0]
    assert models == ["tiny", "tiny-images"]


def test_images(both: Running, client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny-images", "prompt": "cat", "extra_body": {"seed": 1, "steps": 8}}
    answer = client.images.generate(**body, n=2, size="auto", response_format="b64_json")
    own = both.client.post("/images", json={"label": 0, "n": 2, "seed": 1, "steps": 8}).json()["images"]
    assert answer.data is not None
    assert [image.b64_json for image in answer.data] == [image["b64_json"] for image in own]
    assert answer.usage is not None
    assert answer.usage.output_tokens == 128
    *partial, last = client.images.generate(**body, stream=True, partial_images=2)
    assert {event.type for event in partial} <= {"image_generation.partial_image"}
    assert last.type == "image_generation.completed"
    assert last.b64_json == own[0]["b64_json"]


def test_models(both: Running, client: openai.OpenAI) -> None:
    models = client.models.list()
    assert models.object == "list"
    assert [model.id for model in models] == ["tiny", "tiny-images"]
    model = client.models.retrieve("tiny-images")
    assert (model.id, model.object, model.owned_by) == ("tiny-images", "model", "mdm-prime")
    assert model.created == models.data[0].created
    for name in ["other", "\u00e9", "x" * 300]:
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
    for path in ["a/b", "%2e%2e/tiny", "..%2ftiny", "a%00b", "tiny/", ""]:
        message = assert_error(both.client.get(f"/v1/models/{path}"), 404, "model_not_found", "model")
        assert message == "there is no such model; loaded: tiny, tiny-images"
    assert_error(both.client.post("/v1/models"), 405, "method_not_allowed")


def test_errors_become_the_exceptions_of_the_client(both: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="logprobs must be null") as invalid:
        client.completions.create(**BODY, logprobs=3)
    assert (invalid.value.code, invalid.value.param) == ("invalid_value", "logprobs")
    assert invalid.value.type == "invalid_request_error"
    assert str(invalid.value.request_id).startswith("req-")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(**{**BODY, "model": "gpt-3.5-turbo-instruct"})
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="tiny", messages=[])
    with pytest.raises(openai.UnprocessableEntityError, match="prompt must be the label"):
        client.images.generate(prompt="a red bicycle")
    with pytest.raises(openai.APIStatusError) as compressed:
        client.completions.create(**BODY, extra_headers={"Content-Encoding": "gzip"})
    assert (compressed.value.status_code, compressed.value.code) == (415, "unsupported_encoding")


def test_what_is_no_request_is_a_bad_request(both: Running) -> None:
    def spoil(request: Any) -> None:
        request.headers["Transfer-Encoding"] = "chunked"  # beside the length that the client sends

    with (
        openai.DefaultHttpxClient(event_hooks={"request": [spoil]}) as spoiling,
        connect(both, http_client=spoiling) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        client.completions.create(**BODY)
    assert caught.value.code == "ambiguous_length"


def test_failures_become_the_exceptions_of_the_client(model_path: Path) -> None:
    with serving(model_path) as server, connect(server) as client:
        server.denoiser.broken_length = 14
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**BODY)
        stream = client.completions.create(**BODY, stream=True)
        with pytest.raises(openai.APIError, match="no finite probabilities"):
            list(stream)


def test_a_stream_that_breaks_off_says_why(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The event comes before the connection ends, and the client reads no further."""

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    with serving(model_path) as server, connect(server) as client:
        monkeypatch.setattr("server.text.completion_stream.completion_of", fail)
        stream = client.completions.create(**BODY, stream=True)
        with pytest.raises(openai.APIError, match="the server failed on this request") as caught:
            list(stream)
        assert (type(caught.value), caught.value.code) == (openai.APIError, "internal_error")


def test_a_full_queue_is_tried_again_when_the_server_says(model_path: Path) -> None:
    with serving(model_path, max_n=1, max_batch_rows=1, max_queue_rows=1) as server:
        gate = Gate()
        server.denoiser.hook = gate
        with connect(server) as client, ThreadPoolExecutor(2) as threads:
            try:
                first = threads.submit(client.completions.create, **BODY)
                assert gate.entered.wait(60)
                with pytest.raises(openai.RateLimitError) as full:
                    client.completions.create(**BODY)
                assert full.value.code == "queue_full"
                assert int(full.value.response.headers["retry-after"]) >= 1
                again = threads.submit(client.with_options(max_retries=5).completions.create, **BODY)
                wait_until(lambda: server.metric("prime_rejected_total", reason="queue_full") >= 2)
            finally:
                gate.opened.set()
            assert again.result(60).choices[0].text == first.result(60).choices[0].text


def test_a_stream_that_is_closed_frees_its_rows(model_path: Path) -> None:
    with serving(model_path) as server, connect(server) as client:
        gate = Gate()
        server.denoiser.hook = gate
        with client.completions.create(**BODY, stream=True):
            assert gate.entered.wait(60)
        wait_until(lambda: server.metric("prime_request_failure_total", reason="cancelled") == 1)
        gate.opened.set()
        wait_until(lambda: server.engine.held_rows == 0)
