"""POST /v1/images/generations: OpenAI's shapes around the same pictures as POST /images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.image_model import LABELS, LENGTH, image_config, write_image_checkpoint
from tests.server.running import Running, assert_error, serving

BODY: dict[str, Any] = {"prompt": "dog", "seed": 3, "steps": 12}


@pytest.fixture(scope="module")
def images(images_path: Path) -> Iterator[Running]:
    with serving(images_path) as running:
        yield running


def generate(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/v1/images/generations", json=body)


def pictures(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [image["b64_json"] for image in response.json()["data"]]


def events_of(server: Running, **body: object) -> list[dict[str, Any]]:
    """The events of a stream, whose names must be their types; it must end with [DONE]."""
    with server.client.stream("POST", "/v1/images/generations", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["x-seed"] == str(body["seed"])
        assert int(response.headers["x-nfe"]) > 0
        *frames, last = response.read().decode().strip().split("\n\n")
    assert last == "data: [DONE]"
    events = []
    for frame in frames:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_shape_and_pictures(images: Running) -> None:
    before = int(time.time())
    response = generate(images, **BODY, n=2)
    own = images.client.post("/images", json={"label": 1, "seed": 3, "steps": 12, "n": 2}).json()
    body = response.json()
    assert before <= body.pop("created") <= time.time()
    none = {"text_tokens": 0, "image_tokens": 0}
    assert body == {
        "background": "opaque",
        "output_format": "png",
        "size": "8x8",
        "data": [{"b64_json": image["b64_json"], "revised_prompt": "dog"} for image in own["images"]],
        "usage": {
            "input_tokens": 0,
            "input_tokens_details": none,
            "output_tokens": 2 * LENGTH,
            "output_tokens_details": {**none, "image_tokens": 2 * LENGTH},
            "total_tokens": 2 * LENGTH,
        },
    }
    assert response.headers["x-seed"] == "3"
    assert response.headers["x-nfe"] == str(own["usage"]["denoiser_calls"])


def test_the_prompt_is_a_label(images: Running) -> None:
    dogs = pictures(generate(images, **BODY))
    assert pictures(generate(images, **{**BODY, "prompt": "1"})) == dogs
    assert pictures(generate(images, **{**BODY, "prompt": "0"})) != dogs
    assert pictures(generate(images, **{**BODY, "prompt": "T-shirt/top"}))
    drawn = generate(images, **{**BODY, "prompt": ""}, n=8)
    assert pictures(drawn) == [
        image["b64_json"]
        for image in images.client.post("/images", json={"seed": 3, "steps": 12, "n": 8}).json()["images"]
    ]
    assert {image["revised_prompt"] for image in drawn.json()["data"]} <= set(LABELS)


def test_a_model_without_labels_takes_no_prompt(tmp_path: Path) -> None:
    with serving(write_image_checkpoint(tmp_path, image_config(labels="none", num_labels=1))) as server:
        response = generate(server, prompt="", steps=4)
        assert response.json()["data"][0]["revised_prompt"] is None
        message = assert_error(generate(server, prompt="cat"), 422, "invalid_value", "prompt")
        assert message == 'prompt must be "": this model has no labels to choose from'


BAD: list[tuple[str, Any]] = [
    *[("prompt", value) for value in ["cow", "3", "-1", "Dogs", " dog", 1, ["dog"], None]],
    *[("size", value) for value in ["16x16", "8X8", "1024x1024", "", 8]],
    *[("n", value) for value in [0, 17, True]],
    *[("response_format", value) for value in ["url", "png", ""]],
    *[("output_format", value) for value in ["webp", "jpeg", "gif", "svg"]],
    *[("output_compression", value) for value in [0, 50, 101, True]],
    *[("quality", value) for value in ["low", "high", "hd"]],
    *[("background", value) for value in ["transparent", True]],
    *[("style", value) for value in ["vivid", "natural"]],
    *[("moderation", value) for value in ["low", "auto"]],
    *[("partial_images", value) for value in [-1, 4, 1.0]],
    *[("seed", value) for value in [-1, 2**64]],
    *[("stream", value) for value in [1, "true"]],
    ("complexity", "low"),
    ("frame_count", 2),
    ("frame_duration_ms", 200),
    ("svg", {"model": "a"}),
    ("safety_identifier", "a"),
    ("user", "a"),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_what_cannot_be_honoured_is_refused_by_name(images: Running, field: str, value: Any) -> None:
    message = assert_error(generate(images, **{**BODY, field: value}), 422, "invalid_value", field)
    assert message.startswith(f"{field} must be ")


def test_values_that_ask_for_nothing_are_taken(images: Running) -> None:
    named = {"size": "8x8", "quality": "standard", "background": "opaque", "output_compression": 100}
    formats = {"response_format": "b64_json", "output_format": "png"}
    nulls = dict.fromkeys(
        ["style", "moderation", "complexity", "frame_count", "svg", "user", "partial_images", "n"]
    )
    expected = pictures(generate(images, **BODY))
    assert pictures(generate(images, **BODY, **named, **formats, **nulls)) == expected
    assert pictures(generate(images, **BODY, size="auto", quality="auto", background="auto")) == expected


def test_fields_that_contradict_or_are_missing(images: Running) -> None:
    assert_error(generate(images, **BODY, partial_images=1), 422, "invalid_value", "partial_images")
    assert_error(generate(images, **BODY, stream=True, n=2), 422, "invalid_value", "n")
    assert_error(generate(images, steps=4), 422, "invalid_value", "prompt")
    assert_error(generate(images, **BODY, label=1), 422, "unknown_key")
    assert_error(generate(images, **BODY, model="tiny"), 404, "model_not_found", "model")


def test_pictures_that_png_does_not_hold(tmp_path: Path) -> None:
    with serving(write_image_checkpoint(tmp_path, image_config(channels=2))) as server:
        message = assert_error(generate(server, prompt=""), 422, "invalid_value", "model")
        assert "POST /images" in message


@pytest.mark.parametrize("num_partial", [0, 1, 3])
def test_a_stream_shows_pictures_on_the_way(images: Running, num_partial: int) -> None:
    images.denoiser.hook = lambda lengths: time.sleep(0.02)  # or several calls would come as one change
    try:
        *partial, last = events_of(images, **BODY, partial_images=num_partial)
    finally:
        images.denoiser.hook = None
    answer = generate(images, **BODY).json()
    assert last.pop("b64_json") == answer["data"][0]["b64_json"]
    assert last["usage"] == answer["usage"]
    common = {"background": "opaque", "output_format": "png", "quality": "auto", "size": "8x8"}
    assert last.items() >= {**common, "type": "image_generation.completed"}.items()
    assert [event["partial_image_index"] for event in partial] == list(range(num_partial))
    shown = {event["b64_json"] for event in partial}
    assert len(shown) == num_partial
    assert answer["data"][0]["b64_json"] not in shown
    for event in partial:
        assert event.items() >= {**common, "type": "image_generation.partial_image"}.items()
        assert event["created_at"] == last["created_at"]


def test_it_is_described(images: Running) -> None:
    operation = images.client.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert "T-shirt/top" in schema["properties"]["prompt"]["description"]
    assert "8x8" in str(schema["properties"]["size"])
    assert "Generation" in str(operation["responses"]["200"])
