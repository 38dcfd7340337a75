"""POST /score through real sockets: what it answers, what it refuses, and that neighbours change nothing."""

from __future__ import annotations

import asyncio
import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from prime_core.checkpoint import load_checkpoint
from prime_core.pictures import to_png
from prime_core.scoring.score import score
from prime_core.tokenizer import Tokenizer
from server.http.checking import checked_request
from server.http.errors import ApiError
from server.schemas.base import Limits
from server.schemas.score import text_score_request
from tests.server.image_model import NAME as IMAGES
from tests.server.image_model import SIDE
from tests.server.running import CONTEXT, NAME, Gate, Running, assert_error, serving, wait_until

PICTURE = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE, 1) % 16
LISTS = PICTURE[..., 0].tolist()
CANARY = "canary7461"


def post(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/score", json=body)


def scores(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    result: list[dict[str, Any]] = response.json()["scores"]
    return result


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_text_is_scored_as_the_python_door_does(both: Running) -> None:
    response = post(both, text="héllo", num_samples=6, seed=2**64 - 1, per_token=True)
    (found,), body = scores(response), response.json()
    checkpoint = load_checkpoint(both.settings.model[0].path, dtype="float32")
    (expected,) = score(checkpoint, text="héllo", num_samples=6, seed=2**64 - 1, per_token=True)
    assert expected.per_token is not None
    assert found["nelbo"] == {
        "nats": expected.nelbo.nats,
        "standard_error": expected.nelbo.standard_error,
        "nats_per_token": expected.nelbo.nats / 6,
        "bits_per_token": expected.bits_per_token,
        "bits_per_byte": expected.bits_per_byte,
        "bits_per_dimension": None,
        "ppl": expected.ppl,
        "is_bound": True,
    }
    assert found["coded_loss"] == {
        "nats": expected.coded_loss.nats,
        "standard_error": expected.coded_loss.standard_error,
        "nats_per_token": expected.coded_loss.nats / 6,
        "is_bound": False,
        "note": "coded_loss is not a bound for more than one digit",
    }
    assert found["per_token"]["token_ids"] == list("héllo".encode())
    assert found["per_token"]["pieces"] == ["h", "", "é", "l", "l", "o"]
    assert found["per_token"]["nelbo"] == pytest.approx(expected.per_token.nelbo, abs=1e-6)
    assert found["per_token"]["coded_loss"] == pytest.approx(expected.per_token.coded_loss, abs=1e-6)
    assert (found["num_tokens"], found["num_bytes"], found["seed"], found["nfe"]) == (6, 6, 2**64 - 1, 6)
    assert (body["id"], body["model"]) == (response.headers["x-request-id"], NAME)
    assert body["usage"] == {"inputs": 1, "total_tokens": 6, "denoiser_calls": 6}
    assert body["timings"]["run_s"] > 0


def test_only_the_bound_is_told_as_perplexity_or_bits(both: Running) -> None:
    for body in ({"text": "a"}, {"pixels": LISTS, "label": 1}):
        (found,) = scores(post(both, **body, num_samples=1))
        assert found["coded_loss"].keys() == {"nats", "standard_error", "nats_per_token", "is_bound", "note"}
        assert found["coded_loss"]["standard_error"] is found["nelbo"]["standard_error"] is None


def test_inputs_are_scored_each_as_if_alone(both: Running) -> None:
    inputs = ["a", [104, 256, 3], "x" * CONTEXT]
    together = scores(post(both, inputs=inputs, num_samples=3, seed=4))
    assert len({each["seed"] for each in together}) == 3
    assert together[0]["seed"] == 4
    for given, found in zip(inputs, together, strict=True):
        field = "text" if isinstance(given, str) else "token_ids"
        assert scores(post(both, **{field: given}, num_samples=3, seed=found["seed"])) == [found]
    assert together[1]["num_bytes"] == 2  # the end of text has none


def test_images_are_scored_from_lists_and_files(both: Running) -> None:
    fields: dict[str, Any] = {"label": "dog", "seed": 3, "num_samples": 4, "per_token": True}
    (found,) = scores(post(both, pixels=LISTS, **fields))
    assert scores(post(both, pixels=PICTURE.tolist(), model=IMAGES, **fields)) == [found]
    assert scores(post(both, png=encoded(to_png(PICTURE)), **fields)) == [found]
    checkpoint = load_checkpoint(both.settings.model[1].path, dtype="float32")
    (expected,) = score(checkpoint, pixels=torch.from_numpy(PICTURE), **fields)
    assert found["nelbo"]["nats"] == expected.nelbo.nats
    assert found["nelbo"]["bits_per_dimension"] == expected.bits_per_dimension
    assert found["nelbo"]["ppl"] is found["nelbo"]["bits_per_byte"] is found["num_bytes"] is None
    assert (found["label"], found["num_dimensions"]) == (1, SIDE * SIDE)
    assert found["per_token"]["token_ids"] == PICTURE.flatten().tolist()
    assert found["per_token"]["pieces"] is None
    (other,) = scores(post(both, pixels=LISTS, **fields | {"label": 0}))
    assert other["nelbo"] != found["nelbo"]


def test_scores_and_texts_share_calls_and_change_nothing_for_each_other(model_path: Path) -> None:
    scored: dict[str, Any] = {"inputs": ["abcdef", "xy"], "num_samples": 5, "seed": 1, "per_token": True}
    written: dict[str, Any] = {"max_tokens": 11, "steps": 6, "seed": 2, "n": 2}
    with serving(model_path) as server:
        before = scores(post(server, **scored)), server.post(**written).json()["outputs"]
        gate = server.denoiser.hook = Gate()

        async def together() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                first = asyncio.create_task(client.post("/generate", json={"max_tokens": 7, "steps": 1}))
                await asyncio.to_thread(gate.entered.wait, 60)
                tasks = [
                    asyncio.create_task(client.post(path, json=body))
                    for path, body in [("/score", scored), ("/generate", written)]
                ]
                (queue,) = server.engine.queues.values()
                while queue.num_rows < 1 + 10 + 2:  # submitted, not only reserved
                    await asyncio.sleep(0.005)
                server.denoiser.lengths.clear()
                gate.opened.set()
                return list(await asyncio.gather(first, *tasks))[1:]

        replies = asyncio.run(together())
        first = server.denoiser.lengths[0]
        assert {6, 2, 11} <= set(first[:12])  # one call holds both scored inputs and the texts
        assert (scores(replies[0]), replies[1].json()["outputs"]) == before


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "text"),
    ({"text": "a", "token_ids": [1]}, "token_ids"),
    ({"text": "a", "inputs": ["b"]}, "inputs"),
    *[({"text": value}, "text") for value in ["", 1, ["a"], True, "a" * (CONTEXT + 1)]],
    *[({"token_ids": value}, "token_ids") for value in [[], "a", [-1], [257], [1.0], [True], ["a"], [[1]]]],
    ({"token_ids": [1] * (CONTEXT + 1)}, "token_ids"),
    *[({"inputs": value}, "inputs") for value in [[], "a", {}, [1], [None], [{}], ["a"] * 17]],
    *[({"inputs": ["a", value]}, "inputs") for value in [[], [257], [True], [1] * 65]],
    *[({"inputs": ["a", value]}, "inputs[1]") for value in ["", "a" * (CONTEXT + 1)]],
    ({"inputs": ["", "a"]}, "inputs[0]"),
    *[
        ({"text": "a", "num_samples": value}, "num_samples")
        for value in [0, -1, 1025, 2**70, 1.0, True, "1", None]
    ],
    *[({"text": "a", "seed": value}, "seed") for value in [-1, 2**64, 1.0, True, "1"]],
    *[({"text": "a", "per_token": value}, "per_token") for value in [0, 1, "true", None]],
    ({"text": "a", "model": 1}, "model"),
    ({"pixels": LISTS}, "label"),
    *[({"pixels": LISTS, "label": value}, "label") for value in [None, -1, 3, "cow", True, 1.0]],
    *[
        ({"pixels": value, "label": 0}, "pixels")
        for value in [1, "a", [], {}, LISTS[1:], [row[1:] for row in LISTS], [[16] * SIDE] * SIDE]
    ],
    *[
        ({"pixels": [[value] * SIDE] * SIDE, "label": 0}, "pixels")
        for value in [-1, None, True, 1.0, "1", [], [1, 1], [None], [[1]]]
    ],
    ({"label": 0}, "pixels"),
    ({"pixels": LISTS, "png": "aaaa", "label": 0}, "pixels"),
    *[({"png": value, "label": 0}, "png") for value in [1, True, [], "", "a", "!!!!", "aaaa", "é"]],
]


@pytest.mark.parametrize(("body", "param"), BAD)
def test_bad_value(both: Running, body: dict[str, Any], param: str) -> None:
    assert_error(post(both, **body), 422, "invalid_value", param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-0", "1" + "0" * 5000])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"text": "a", "num_samples": %s}', "num_samples"),
        ('{"text": "a", "seed": %s}', "seed"),
        ('{"token_ids": [%s]}', "token_ids"),
        ('{"inputs": ["a", [%s]]}', "inputs"),
        ('{"pixels": [[%s]], "label": 0}', "pixels"),
        ('{"pixels": [[1]], "label": %s}', "label"),
        ('{"text": "a\\ud800", "seed": 1}', "text"),
    ],
)
def test_numbers_and_texts_that_json_cannot_mean(both: Running, number: str, body: str, param: str) -> None:
    content = body % number if "%s" in body else body
    response = both.client.post("/score", content=content, headers={"content-type": "application/json"})
    assert_error(response, 422, "invalid_value", param)


def test_unknown_keys_and_keys_of_the_other_kind(both: Running) -> None:
    for body in [{"text": "a", CANARY: 1}, {"text": "a", "label": 1}, {"model": IMAGES, "text": "a"}]:
        assert CANARY not in assert_error(post(both, **body), 422, "unknown_key")
    assert_error(post(both, text="a", model="../x"), 404, "model_not_found", "model")
    assert both.client.get("/score").headers["allow"] == "POST"


def test_a_picture_without_a_model_for_it(server: Running) -> None:
    assert "no image model" in assert_error(post(server, pixels=LISTS), 404, "model_not_found", "model")


def test_fields_that_tell_no_kind_are_for_the_first_model(both: Running, images_path: Path) -> None:
    assert_error(post(both, seed=1), 422, "invalid_value", "text")
    with serving(images_path) as server:
        assert_error(post(server, seed=1), 422, "invalid_value", "label")


def test_long_lists_of_what_is_none_are_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(context=64, vocab_size=16, max_n=64, max_steps=8, max_work=2**24, max_body_bytes=2**20)
    request_type = text_score_request(limits)
    for fields in ({"token_ids": [-1] * 50}, {"inputs": [[-1] * 50] * 50}):
        with pytest.raises(ValidationError) as caught:
            request_type.model_validate(fields)
        assert caught.value.error_count() < 5
    monkeypatch.setattr(request_type, "model_validate", lambda *_: pytest.fail("it was described"))
    with pytest.raises(ApiError, match=r"^inputs must be "):
        checked_request(request_type, {"inputs": ["a", 1]})


def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    both: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: 1 / 0)
    long = "a" * (CONTEXT + 1)
    for body, param, name in [
        ({"text": long}, "text", "text"),
        ({"inputs": ["b", long]}, "inputs[1]", "inputs (number 2)"),  # an index from 0, a number from 1
    ]:
        message = assert_error(post(both, **body), 422, "invalid_value", param)
        assert message.startswith(f"{name} has {CONTEXT + 1} characters, but the context of {CONTEXT} tokens")
    assert both.engine.held_rows == 0


def test_work_of_a_request_is_capped(model_path: Path) -> None:
    with serving(model_path, max_work=100) as small:
        assert post(small, inputs=["a" * 9, "b"], num_samples=10).status_code == 200
        for body in ({"text": "a" * 11, "num_samples": 10}, {"inputs": ["a", "b"], "num_samples": 51}):
            message = assert_error(post(small, **body), 422, "invalid_value", "num_samples")
            assert "at most 100" in message
        assert small.engine.held_rows == 0


def test_random_numbers_of_a_request_are_capped(both: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.score.MAX_DRAWN_DIGITS", 40)
    assert post(both, text="ab", num_samples=10).status_code == 200  # two digits a token
    assert "at most 20" in assert_error(
        post(both, text="ab", num_samples=11), 422, "invalid_value", "num_samples"
    )


def test_scores_are_counted(both: Running) -> None:
    names = [
        "prime_scores_total",
        "prime_row_steps_total",
        "prime_request_nfe_count",
        "prime_request_nfe_sum",
    ]

    def counts() -> list[float]:
        done = both.metric("prime_request_success_total", finished_reason="scored")
        return [*(both.metric(name) for name in names), done]

    before = counts()
    post(both, inputs=["a", "bc", "d"], num_samples=7)
    assert [after - old for after, old in zip(counts(), before, strict=True)] == [3, 21, 3, 21, 1]
    refused = both.metric("prime_rejected_total", reason="invalid")
    post(both, text="")
    assert both.metric("prime_rejected_total", reason="invalid") == refused + 1
    assert both.metric("prime_scores_total", model=IMAGES) >= 0


def test_a_client_that_leaves_frees_its_rows(model_path: Path) -> None:
    with serving(model_path, max_batch_rows=4, max_queue_rows=40) as server:
        gate = server.denoiser.hook = Gate()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/score",
                json={"text": "abc", "num_samples": 100},
                timeout=httpx.Timeout(60, read=2),
            )
        assert gate.entered.is_set()
        wait_until(lambda: server.metric("prime_request_failure_total", reason="cancelled") == 1)
        calls = len(server.denoiser.lengths)
        gate.opened.set()
        wait_until(lambda: server.engine.held_rows == 0)
        assert len(server.denoiser.lengths) == calls  # not one call more


def test_a_full_queue_refuses_scores(model_path: Path) -> None:
    with serving(model_path, max_n=4, max_batch_rows=2, max_queue_rows=4) as server:
        gate = server.denoiser.hook = Gate()

        async def fill() -> list[httpx.Response]:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"text": "abc", "num_samples": 10}
                accepted = asyncio.create_task(client.post("/score", json=body))
                while server.engine.held_rows < 4:
                    await asyncio.sleep(0.005)
                refused = await client.post("/score", json=body)
                gate.opened.set()
                return [await accepted, refused]

        accepted, refused = asyncio.run(fill())
        assert accepted.status_code == 200
        assert_error(refused, 429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        wait_until(lambda: server.engine.held_rows == 0)


@pytest.mark.parametrize(
    ("body", "num_rows"),
    [
        ({"text": "abc", "num_samples": 3}, 3),
        ({"text": "abc", "num_samples": 64}, 16),
        ({"inputs": ["a", "b", "c"], "num_samples": 64}, 15),
        ({"inputs": ["a"] * 20, "num_samples": 64}, 20),
    ],
)
def test_how_much_of_the_queue_a_score_takes(model_path: Path, body: dict[str, Any], num_rows: int) -> None:
    with serving(model_path, max_n=32) as server:
        gate = server.denoiser.hook = Gate()
        with ThreadPoolExecutor() as pool:
            response = pool.submit(post, server, **body)
            assert gate.entered.wait(60)
            assert server.engine.held_rows == num_rows
            gate.opened.set()
            assert response.result().status_code == 200


def test_logits_that_are_not_finite_fail_the_request_alone(model_path: Path) -> None:
    with serving(model_path) as server:
        server.denoiser.broken_length = 3
        assert_error(post(server, text="abc"), 500, "non_finite")
        assert_error(post(server, inputs=["ab", "abc"]), 500, "non_finite")
        assert post(server, text="ab").status_code == 200
        assert server.metric("prime_request_failure_total", reason="non_finite") == 2
        assert server.engine.held_rows == 0


def test_the_documentation_has_the_bodies_of_both_kinds(both: Running) -> None:
    document = both.client.get("/openapi.json").json()
    operation = document["paths"]["/score"]["post"]
    text, image = operation["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert text["properties"].keys() == {
        "model", "seed", "num_samples", "per_token", "text", "token_ids", "inputs",
    }  # fmt: skip
    assert image["properties"].keys() == {
        "model",
        "seed",
        "num_samples",
        "per_token",
        "pixels",
        "png",
        "label",
    }
    for schema in (text, image):  # each is the first of its fields
        assert {"type": "null"} in schema["properties"]["model"]["anyOf"]
    assert image["required"] == ["label"]
