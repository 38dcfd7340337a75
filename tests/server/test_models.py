"""Several models in one process: who answers, and that a fault of one is no fault of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import server.engine.engine as engine_module
from server.engine.warm_up import WARM_UP_TOKENS
from server.images.known import KnownShape
from server.model_sources import ModelSource
from server.routes.openapi import body_schema, query_schema
from server.schemas.base import Limits
from server.schemas.generations import generation_request
from server.schemas.image_query import QUERY_FIELDS, image_query
from server.schemas.images import image_request
from server.settings import Settings
from tests.server.image_model import LABELS, SIDE
from tests.server.image_model import NAME as IMAGES
from tests.server.running import CONTEXT, Gate, Running, assert_error, make_engine, serving, wait_until
from tests.server.running import NAME as TEXT

TEXT_BODY: dict[str, Any] = {"max_tokens": 6, "steps": 5, "seed": 1}
IMAGE_BODY: dict[str, Any] = {"steps": 5, "seed": 1}


def post_images(server: Running, **body: object) -> Any:
    return server.client.post("/images", json=body)


@pytest.fixture
def own(model_path: Path, images_path: Path) -> Iterator[Running]:
    """A server of both models, to be spoiled."""
    with serving(model_path, images_path) as running:
        yield running


def test_each_route_has_its_first_model(both: Running) -> None:
    assert both.post(**TEXT_BODY).json()["model"] == TEXT
    assert both.post(**TEXT_BODY, model=TEXT).json()["model"] == TEXT
    assert post_images(both, **IMAGE_BODY).json()["model"] == IMAGES
    assert post_images(both, **IMAGE_BODY, model=IMAGES).json()["model"] == IMAGES


def test_models_of_the_other_kind_name_their_route(both: Running) -> None:
    message = assert_error(both.post(model=IMAGES), 422, "wrong_route", "model")
    assert "POST /images, POST /score and POST /v1/images/generations" in message
    message = assert_error(post_images(both, model=TEXT), 422, "wrong_route", "model")
    assert "POST /generate, POST /score and POST /v1/completions" in message
    assert_error(both.client.get("/images", params={"model": TEXT}), 422, "wrong_route", "model")
    message = assert_error(post_images(both, model="../x"), 404, "model_not_found", "model")
    assert message == f"there is no such model; loaded: {TEXT}, {IMAGES}"


def test_a_route_without_a_model_has_no_description() -> None:
    assert body_schema({}) == query_schema({}, QUERY_FIELDS) == {}


def test_no_model_of_a_kind(server: Running, images_path: Path) -> None:
    for response in [post_images(server), server.client.get("/images")]:
        message = assert_error(response, 404, "model_not_found", "model")
        assert message == f"no image model is loaded; loaded: {TEXT}"
    assert (
        not {"/images", "/v1/images/generations"} & server.client.get("/openapi.json").json()["paths"].keys()
    )
    with serving(images_path) as running:
        message = assert_error(running.post(), 404, "model_not_found", "model")
        assert message == f"no text model is loaded; loaded: {IMAGES}"
        paths = running.client.get("/openapi.json").json()["paths"]
        assert not {"/generate", "/v1/completions"} & paths.keys()
        assert running.client.get("/docs").status_code == 200


def test_two_models_of_one_kind_have_a_schema_each(model_path: Path, images_path: Path) -> None:
    sources = [ModelSource("a", model_path), ModelSource("b", model_path), ModelSource("c", images_path)]
    with serving(*sources) as running:
        document = running.client.get("/openapi.json").json()
        body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
        first, second = body["anyOf"]
        assert second["properties"]["model"]["const"] == "b"
        assert second["required"] == ["model"]
        assert {"type": "null"} in first["properties"]["model"]["anyOf"]
        replies = [running.post(**TEXT_BODY, model=name).json() for name in ("a", "b")]
        assert [reply["model"] for reply in replies] == ["a", "b"]
        assert replies[0]["outputs"] == replies[1]["outputs"]
        page = running.client.get("/docs").text
        assert page.count("<h3>Body: JSON, GenerateRequest to model") == 2


def test_what_any_request_must_have_stays_required_beside_the_name() -> None:
    limits = Limits(context=64, vocab_size=16, max_n=1, max_steps=8, max_work=2**24, max_body_bytes=2**20)
    request_type = generation_request(limits, "8x8", 0, ())
    operation = body_schema({"a": request_type, "b": request_type})
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert [each["required"] for each in schema["anyOf"]] == [["prompt"], ["prompt", "model"]]


def test_a_field_of_an_address_takes_what_any_of_the_models_takes() -> None:
    limits = Limits(context=64, vocab_size=16, max_n=1, max_steps=8, max_work=2**24, max_body_bytes=2**20)
    shape = KnownShape((8, 8, 1), planes=1, digits=2, base=4, top_pixel=15)
    queries = {
        str(labels): image_query(image_request(limits, shape, labels, ()), labels, ()) for labels in (3, 5, 0)
    }
    schemas = {each["name"]: each["schema"] for each in query_schema(queries, QUERY_FIELDS)["parameters"]}
    assert [option["maximum"] for option in schemas["label"]["anyOf"]] == [2, 4]
    assert schemas["model"] == {"type": "string", "enum": ["3", "5", "0"]}
    assert "anyOf" not in schemas["n"]  # which is the same for all


def test_info_lists_the_models(both: Running) -> None:
    text, images = both.client.get("/info").json()["models"]
    assert (text["name"], text["kind"]) == (TEXT, "text")
    assert (images["name"], images["kind"], images["in_service"]) == (IMAGES, "images", True)
    assert images["picture_shape"] == [SIDE, SIDE, 1]
    assert (images["labels"], images["num_labels"], images["label_names"]) == ("class", 3, list(LABELS))
    assert images["network"]["model_channels"] == 32
    assert images["codec"]["base"] == 4
    assert "tokenizer" not in images


def test_calls_never_mix_models_and_metrics_add_up(own: Running) -> None:
    totals = (
        "row_steps",
        "denoiser_calls",
        "row_steps_skipped",
        "images",
        "generation_tokens",
        "prompt_tokens",
    )

    def sum_of(name: str, **labels: str) -> float:
        return sum(
            own.engine.metrics.registry.get_sample_value(f"prime_{name}", {"model": model, **labels}) or 0
            for model in (TEXT, IMAGES)
        )

    before = {name: sum_of(f"{name}_total") for name in totals}
    for name in (TEXT, IMAGES):
        own.denoiser_of(name).lengths.clear()
    with ThreadPoolExecutor(12) as pool:
        texts = [pool.submit(own.post, max_tokens=9 + k, n=2, steps=12, seed=k) for k in range(6)]
        images = [pool.submit(post_images, own, n=2, steps=12, seed=k) for k in range(6)]
        text_answers = [reply.result().json() for reply in texts]
        image_answers = [reply.result().json() for reply in images]
    assert all(set(lengths) == {SIDE * SIDE} for lengths in own.denoiser_of(IMAGES).lengths)
    assert all(max(lengths) < CONTEXT for lengths in own.denoiser_of(TEXT).lengths)
    grown = {name: sum_of(f"{name}_total") - before[name] for name in totals}
    answers = [*text_answers, *image_answers]
    rows = [row for answer in answers for row in answer.get("outputs", answer.get("images"))]
    assert grown["row_steps"] == sum(row["nfe"] for row in rows)
    assert grown["row_steps"] == sum(answer["usage"]["denoiser_calls"] for answer in answers)
    assert grown["row_steps_skipped"] == sum(row["steps_skipped"] for row in rows)
    assert grown["denoiser_calls"] == sum(len(own.denoiser_of(name).lengths) for name in (TEXT, IMAGES))
    assert grown["images"] == 12
    assert grown["generation_tokens"] == sum(answer["usage"]["completion_tokens"] for answer in text_answers)
    assert grown["prompt_tokens"] == 0
    assert own.metric("prime_request_success_total", model=IMAGES, finished_reason="complete") == 6
    success = sum(
        sum_of("request_success_total", finished_reason=why) for why in ("stop", "length", "complete")
    )
    assert success == sum_of("e2e_request_latency_seconds_count") == 12
    assert sum_of("request_nfe_count") == 24
    assert sum_of("num_requests_running") == sum_of("num_requests_waiting") == 0


def test_a_call_that_raises_fails_callers_of_its_model_only(own: Running) -> None:
    expected = own.post(**TEXT_BODY).json()["outputs"]
    gate = own.denoiser.hook = Gate()

    def fail(lengths: Sequence[int]) -> None:
        raise RuntimeError("no pictures today")

    with ThreadPoolExecutor(2) as pool:
        text = pool.submit(own.post, **TEXT_BODY)
        assert gate.entered.wait(60)
        own.denoiser_of(IMAGES).hook = fail
        images = pool.submit(post_images, own, **IMAGE_BODY)
        wait_until(lambda: own.engine.held_rows == 2)
        gate.opened.set()
        assert_error(images.result(), 500, "engine_error")
        assert text.result().json()["outputs"] == expected
    assert own.metric("prime_request_failure_total", model=IMAGES, reason="engine_error") == 1
    assert own.metric("prime_request_failure_total", model=TEXT, reason="engine_error") == 0


def test_a_model_that_always_fails_goes_out_of_service_alone(own: Running) -> None:
    expected = own.post(**TEXT_BODY).json()["outputs"]

    def fail(lengths: Sequence[int]) -> None:
        raise RuntimeError("no pictures any more")

    own.denoiser_of(IMAGES).hook = fail
    for _ in range(engine_module.MAX_FAULTS):
        assert_error(post_images(own, **IMAGE_BODY), 500, "engine_error")
    wait_until(lambda: own.engine.queues[IMAGES].failed)
    assert_error(post_images(own, **IMAGE_BODY), 503, "model_failed")
    assert own.metric("prime_rejected_total", model=IMAGES, reason="model_failed") == 1
    assert own.metric("prime_model_up", model=IMAGES) == 0
    assert own.metric("prime_model_up", model=TEXT) == 1
    assert [model["in_service"] for model in own.client.get("/info").json()["models"]] == [True, False]
    assert own.client.get("/ready").json() == {"status": "ready"}
    assert own.post(**TEXT_BODY).json()["outputs"] == expected
    assert own.engine.held_rows == 0


def test_turns_that_crash_take_their_model_out_of_service_alone(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = own.post(**TEXT_BODY).json()["outputs"]
    monkeypatch.setattr(own.engine.queues[IMAGES].batcher, "choose", lambda: 1 / 0)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(engine_module.MAX_CRASHES):
            text = pool.submit(own.post, **TEXT_BODY)
            assert_error(post_images(own, **IMAGE_BODY), 500, "engine_error")
            assert text.result().json()["outputs"] == expected
    wait_until(lambda: own.engine.queues[IMAGES].failed)
    assert_error(post_images(own, **IMAGE_BODY), 503, "model_failed")
    assert own.post(**TEXT_BODY).json()["outputs"] == expected


def test_the_last_model_takes_the_engine_with_it(own: Running) -> None:
    def fail(lengths: Sequence[int]) -> None:
        raise RuntimeError("nothing works")

    own.denoiser_of(TEXT).hook = own.denoiser_of(IMAGES).hook = fail
    for _ in range(engine_module.MAX_FAULTS):
        assert_error(post_images(own, **IMAGE_BODY), 500, "engine_error")
    assert own.engine.alive
    for _ in range(engine_module.MAX_FAULTS):
        assert_error(own.post(**TEXT_BODY), 500, "engine_error")
    wait_until(lambda: not own.engine.alive)
    assert own.client.get("/ready").json() == {"status": "stopped"}


def test_a_model_that_cannot_warm_up_stops_the_engine(model_path: Path, images_path: Path) -> None:
    engine, _ = make_engine(Settings.model_validate({"model": [images_path, model_path]}))
    denoiser: Any = engine.queues[TEXT].checkpoint.denoiser
    denoiser.broken_length = WARM_UP_TOKENS
    engine.start()
    wait_until(lambda: not engine.alive)
    assert engine.state == "stopped"


def test_names_must_differ_and_calls_must_hold_every_context(model_path: Path, images_path: Path) -> None:
    engine, _ = make_engine(Settings.model_validate({"model": [model_path, images_path]}))
    caps = {"max_batch_rows": 1, "max_batch_tokens": CONTEXT, "max_queue_rows": 1}
    models = [engine_module.LoadedModel("a", queue.checkpoint) for queue in engine.queues.values()]
    for wrong in ([], models):
        with pytest.raises(ValueError, match="each with a name of its own"):
            engine_module.Engine(wrong, **caps)
    with pytest.raises(
        ValueError, match=r"max_batch_tokens \(63\) must be at least the context of model 'a' \(64\)"
    ):
        engine_module.Engine(models[1:], **{**caps, "max_batch_tokens": CONTEXT - 1})
