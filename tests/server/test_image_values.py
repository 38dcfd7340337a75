"""Bad values of /images are refused with 422 by the name of their field and its limit, and never repeated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.checking import checked_request
from server.http.errors import ApiError
from server.images.known import KnownShape
from server.schemas.base import Limits
from server.schemas.image_query import QUERY_FIELDS
from server.schemas.images import ImagesRequest, image_request, shown_names
from tests.server.image_model import LENGTH, SIDE, image_config, write_image_checkpoint
from tests.server.image_model import NAME as IMAGES
from tests.server.running import Running, assert_error, serving

CANARY = "canary7461"
NOT_INTEGERS = [True, False, "7", 1.0, 1.5, [1], {}, "NaN"]
NOT_NUMBERS = [True, "1", None, []]
CORRECTOR = {"kind": "corrected", "scale": 1, "power": 1}
WARP = {"scale": 1, "power": 1, "offset": 0}
STRONG = {"kind": "corrected", "scale": 100, "power": 0, "final_power": 0}
CURVE = {"scale": 0.5, "power": 1, "offset": 0.5}

BAD: list[tuple[str, Any]] = [
    *[("n", value) for value in [0, -1, 17, 2**31, 10**18, 2**70, None, *NOT_INTEGERS]],
    *[("steps", value) for value in [0, -1, 4097, 2**31, 10**18, "all", None, *NOT_INTEGERS]],
    *[("top_k", value) for value in [-1, 17, 2**31, 10**18, None, *NOT_INTEGERS]],
    *[("seed", value) for value in [-1, 2**64, 2**70, *NOT_INTEGERS]],
    *[("top_p", value) for value in [0, 0.0, -0.5, 1.01, 2, *NOT_NUMBERS]],
    *[("temperature", value) for value in [-0.1, 100.1, 10**18, {}, CANARY, *NOT_NUMBERS]],
    *[("temperature", {**CURVE, "power": value}) for value in [-1, 101, *NOT_NUMBERS]],
    *[("temperature", {**CURVE, "scale": value}) for value in [-101, 101, *NOT_NUMBERS]],
    *[("temperature", {**CURVE, "offset": value}) for value in [-101, 101, *NOT_NUMBERS]],
    *[("temperature", value) for value in [{"scale": 1, "power": 1}, {**CURVE, CANARY: 1}]],
    *[("label", value) for value in [-1, 3, 2**70, 1.0, True, "", "Cats", CANARY, [0], {}]],
    *[("sampler", value) for value in ["", "Ancestral", CANARY, None, 1, ["published"]]],
    *[
        ("corrector", value)
        for value in [1, [], "published", {}, {"kind": "published"}, {**CORRECTOR, CANARY: 1}]
    ],
    *[("corrector", {**CORRECTOR, "scale": value}) for value in [-1, 101, *NOT_NUMBERS]],
    *[("corrector", {**CORRECTOR, "power": value}) for value in [-1, 101, *NOT_NUMBERS]],
    *[("corrector", {**CORRECTOR, "final_power": value}) for value in [-1, 101, True, "1"]],
    *[("corrector", {**CORRECTOR, "kind": value}) for value in ["", CANARY, None, 1]],
    *[("warp", value) for value in [1, [], {}, {"scale": 1}, {**WARP, CANARY: 1}]],
    *[("warp", {**WARP, "scale": value}) for value in [0, -1, 101, *NOT_NUMBERS]],
    *[("warp", {**WARP, "power": value}) for value in [-1, 101, *NOT_NUMBERS]],
    *[("warp", {**WARP, "offset": value}) for value in [-1, 100, *NOT_NUMBERS]],
    *[("preset", value) for value in ["", CANARY, 1, ["cifar10-l2-512"]]],
    *[
        ("known", value)
        for value in [1, CANARY, [], {}, {"pixels": []}, {CANARY: []}, {"digits": [[CANARY]]}]
    ],
    *[("known", {"pixels": [[value] * SIDE] * SIDE}) for value in [16, -1, 1.0, True, CANARY, [1, 2]]],
    *[("response_format", value) for value in ["", "jpeg", CANARY, 1, ["png"]]],
    *[("model", value) for value in [1, True, [IMAGES], {}]],
]


@pytest.fixture(scope="module")
def images(images_path: Path) -> Iterator[Running]:
    """A server that must answer a canary request in the same way at the end."""
    with serving(images_path) as running:
        before = post(running, n=2, seed=7, steps=5, response_format="npy").content
        yield running
        assert post(running, n=2, seed=7, steps=5, response_format="npy").content == before
        assert running.engine.held_rows == 0
        assert running.engine.state == "ready"


def post(server: Running, **body: object) -> httpx.Response:
    return server.client.post("/images", json=body)


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value(images: Running, field: str, value: Any) -> None:
    message = assert_error(post(images, **{field: value}), 422, "invalid_value", field)
    assert message.startswith(f"{field} must be ")
    assert CANARY not in message


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 17}, "n", "from 1 to 16"),
        ({"label": 3}, "label", "from 0 to 2, one of the names cat, dog, T-shirt/top"),
        ({"preset": "x"}, "preset", "cifar10-l2-512-corrected"),
        ({"known": {"pixels": [[0] * SIDE] * 7}}, "known", "8 rows of 8 pixels"),
        ({"known": {"digits": [[[[0]]] * SIDE] * SIDE}}, "known", "(8, 8, 1, 2)"),
        ({"temperature": {"scale": -2, "power": 1, "offset": 1}}, "temperature", "stay in [0, 100]"),
        ({"temperature": {"scale": 2, "power": 1, "offset": -1}}, "temperature", "stay in [0, 100]"),
        ({"warp": {"scale": 1, "power": 1, "offset": 1}}, "warp", "warp.offset must lie between"),
        ({"warp": {"scale": 2, "power": 0, "offset": 0}}, "warp", "warp.power"),
        ({"corrector": {**CORRECTOR, "kind": "published", "final_power": 1}}, "corrector", "leave it out"),
        ({"steps": "exact", "corrector": CORRECTOR}, "corrector", "must be null when steps is exact"),
        ({"steps": "exact", "warp": {**WARP, "power": 2}}, "warp", "must be null when steps is exact"),
        (
            {"steps": "exact", "preset": "cifar10-l2-512"},
            "preset",
            "the preset has as warp does not fit: warp must be",
        ),
        ({"n": 2, "response_format": "png"}, "response_format", "use grid, npy or b64_json"),
    ],
)
def test_limits_and_contradictions_stand_in_the_messages(
    images: Running, body: dict[str, Any], param: str, words: str
) -> None:
    assert words in assert_error(post(images, **body), 422, "invalid_value", param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-0.0", "-0", "1" + "0" * 5000])
@pytest.mark.parametrize("field", ["n", "temperature", "top_p", "seed", "label", "top_k"])
def test_numbers_that_json_cannot_mean(images: Running, field: str, number: str) -> None:
    response = images.client.post(
        "/images", content=f'{{"{field}": {number}}}', headers={"content-type": "application/json"}
    )
    assert_error(response, 422, "invalid_value", field)
    if number != "NaN" and number != "Infinity":
        assert_error(images.client.get("/images", params={field: number}), 422, *_query_error(field))


def _query_error(field: str) -> tuple[str, str | None]:
    return ("unknown_key", None) if field == "top_k" else ("invalid_value", field)


def test_unknown_and_repeated_keys(images: Running) -> None:
    for body in [{CANARY: 1}, {"n": 1, CANARY * 10000: 1}, {"y": 1}, {"prompt": "a"}]:
        message = assert_error(post(images, **body), 422, "unknown_key")
        assert CANARY not in message
    response = images.client.post(
        "/images", content=b'{"n": 1, "n": 1}', headers={"content-type": "application/json"}
    )
    assert_error(response, 422, "duplicate_key")
    for query in [CANARY, "top_k=1", "known=1", "response_format=png", "N=1"]:
        assert_error(images.client.get(f"/images?{query}{'' if '=' in query else '=1'}"), 422, "unknown_key")
    assert_error(images.client.get("/images?n=1&n=2"), 422, "duplicate_key")
    assert_error(images.client.get("/images?n"), 422, "invalid_query")
    assert_error(images.client.get("/images?label=%ff"), 422, "invalid_query")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", value) for value in ["0", "17", "1.0", "true", "", "١"]],
        *[("steps", value) for value in ["0", "all", "1.5", "Exact"]],
        *[("temperature", value) for value in ["-1", "hot", "{}", "101"]],
        *[("top_p", value) for value in ["0", "1.1", ""]],
        *[("seed", value) for value in ["-1", "18446744073709551616", "1.0"]],
        *[("label", value) for value in ["3", "-1", "1.0", "Cats", CANARY]],
        *[("preset", value) for value in ["1", "", CANARY]],
    ],
)
def test_bad_values_of_a_query(images: Running, field: str, value: str) -> None:
    message = assert_error(images.client.get("/images", params={field: value}), 422, "invalid_value", field)
    assert message.startswith(f"{field} must be ")
    assert CANARY not in message
    assert "null" not in message and "{" not in message  # which an address cannot say


@pytest.mark.parametrize("field", sorted(ImagesRequest.model_fields.keys() - set(QUERY_FIELDS)))
def test_a_field_of_bodies_is_told_from_a_typing_error(images: Running, field: str) -> None:
    message = assert_error(images.client.get(f"/images?n=1&{field}=1"), 422, "unknown_key")
    assert message == (
        "key number 2 of the query can only be in the body of POST; the keys are " + ", ".join(QUERY_FIELDS)
    )
    message = assert_error(images.client.get("/images?top_q=1"), 422, "unknown_key")
    assert message.endswith("did you mean top_p?")


def test_what_a_preset_brings_is_blamed_on_it(images_path: Path) -> None:
    with serving(images_path, max_work=1000 * LENGTH) as running:
        body = {"n": 16, "preset": "cifar10-l2-512"}
        message = assert_error(post(running, **body), 422, "invalid_value", "preset")
        assert message.startswith(
            "what the preset has as steps does not fit: n * tokens * steps is at most 64000"
        )
        assert_error(post(running, **body, steps=500), 422, "invalid_value", "steps")
        assert_error(running.client.get("/images", params=body), 422, "invalid_value", "preset")


def test_a_label_is_written_in_one_way_but_in_any_case(images: Running) -> None:
    for label in ["01", "00", "elephant"]:
        assert_error(images.client.get(f"/images?steps=2&label={label}"), 422, "invalid_value", "label")
    for label in ["dog", "DOG", "Dog"]:
        answers = [images.client.get(f"/images?steps=2&label={label}"), post(images, steps=2, label=label)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].headers["x-labels"] == "1"
        assert answers[1].json()["images"][0]["label_name"] == "dog"


def test_wrong_methods(images: Running) -> None:
    for method in ["PUT", "DELETE", "PATCH", "OPTIONS"]:
        response = images.client.request(method, "/images")
        assert_error(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, POST"


def test_labels_of_a_model_without_them(tmp_path: Path) -> None:
    path = write_image_checkpoint(tmp_path, image_config(labels="none", num_labels=1))
    with serving(path) as running:
        (image,) = post(running, steps=2, label=None).json()["images"]
        assert (image["label"], image["label_name"]) == (None, None)
        assert "x-labels" not in post(running, steps=2, response_format="png").headers
        for label in (0, "cat", True):
            message = assert_error(post(running, label=label), 422, "invalid_value", "label")
            assert message == "label must be null: this model has no labels to choose from"
        message = assert_error(running.client.get("/images?label=0"), 422, "invalid_value", "label")
        assert message == "label must be left out: this model has no labels to choose from"
        operation = running.client.get("/openapi.json").json()["paths"]["/images"]["get"]
        assert "label" not in [item.get("name") for item in operation["parameters"]]


def test_work_of_a_request_is_capped_before_anything_is_drawn(images_path: Path) -> None:
    with serving(images_path, max_work=100 * LENGTH, max_steps=100) as running:
        weak = {"kind": "corrected", "scale": 1, "power": 1}
        for body in [
            {"n": 2, "steps": 50},
            {"n": 1, "steps": 99, "corrector": weak},
            {"n": 1, "steps": 99, "warp": {**WARP, "power": 2}},
        ]:
            assert post(running, **body).status_code == 200
        calls = running.metric("prime_denoiser_calls_total")
        half_known = {"pixels": [[0] * SIDE] * 4 + [[None] * SIDE] * 4}
        for body in [
            {"n": 2, "steps": 51},
            {"n": 1, "steps": "exact"},
            {"n": 1, "steps": 100, "corrector": weak},  # one more call at the end
            {"n": 1, "steps": 100, "warp": {**WARP, "power": 2}},  # as may be here
            {"n": 1, "steps": 60, "corrector": STRONG},  # 128 digits that change 33 times each
        ]:
            message = assert_error(post(running, **body), 422, "invalid_value", "steps")
            assert str(100 * LENGTH) in message
        message = assert_error(post(running, preset="cifar10-l2-512"), 422, "invalid_value", "preset")
        assert "the limit is 100: give steps too" in message
        assert running.metric("prime_denoiser_calls_total") == calls
        exact = {"steps": "exact", "known": half_known}  # 64 free digits
        assert post(running, **exact).status_code == 200
        assert post(running, **exact, warp=WARP).status_code == 200  # which is none
        assert running.engine.held_rows == 0


def test_the_size_of_plans_is_capped_as_it_is_expected(images_path: Path) -> None:
    """A corrector of full strength: calls alone would be few, and the changes to draw a hundred times as many."""
    with serving(images_path, max_work=2**20) as running:
        assert post(running, n=4, steps=60, corrector=STRONG).status_code == 200  # 17 thousand changes
        message = assert_error(
            post(running, n=16, steps=300, corrector=STRONG), 422, "invalid_value", "steps"
        )
        assert message.startswith("n * digits * 8 * changes is at most 1048576")
        # of 16 * 64 * 301 calls, which are not too many
        assert "128 free digits, each revealed or masked again 78.84 times" in message


def test_objects_of_many_keys_are_not_described() -> None:
    limits = Limits(context=64, vocab_size=16, max_n=1, max_steps=64, max_work=2**24, max_body_bytes=2**20)
    shape = KnownShape((8, 8, 1), planes=1, digits=2, base=4, top_pixel=15)
    described = 0

    class Counting(image_request(limits, shape, 0, ())):  # type: ignore[misc]
        @classmethod
        def model_validate(cls, *arguments: Any, **options: Any) -> Any:
            nonlocal described
            described += 1
            return super().model_validate(*arguments, **options)

    many = {f"k{index}": 1 for index in range(50_000)}
    for field in ("temperature", "corrector", "warp"):
        with pytest.raises(ApiError, match=f"^{field} must be "):
            checked_request(Counting, {field: many})
    assert described == 0
    assert checked_request(Counting, {"temperature": CURVE}).temperature.scale == 0.5
    assert described == 1


def test_of_many_names_of_labels_the_first_are_shown() -> None:
    names = [f"label{number}" for number in range(23)]
    assert shown_names(names[:20]) == ", ".join(names[:20])
    assert shown_names(names) == f"{', '.join(names[:20])} and 3 more (see /info)"


def test_openapi_describes_bodies_queries_and_answers(images: Running) -> None:
    operations = images.client.get("/openapi.json").json()["paths"]["/images"]
    body = operations["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["additionalProperties"] is False
    assert body["properties"]["n"]["maximum"] == 16
    assert {"type": "string", "enum": ["cat", "dog", "T-shirt/top"]} in body["properties"]["label"]["anyOf"]
    pixels = body["properties"]["known"]["anyOf"][0]["properties"]["pixels"]
    assert (pixels["minItems"], pixels["items"]["maxItems"]) == (SIDE, SIDE)
    answers = operations["post"]["responses"]["200"]
    assert answers["content"].keys() == {
        "application/json",
        "image/png",
        "application/octet-stream",
        "text/event-stream",
    }
    assert "ImagesResponse" in str(answers["content"]["application/json"])
    assert answers["headers"].keys() == {"X-Seed", "X-NFE", "X-Labels", "X-Request-Id"}
    for header in (answers["headers"][name] for name in ("X-Seed", "X-NFE", "X-Labels")):
        assert header["required"] is False
        assert header["description"].startswith("Not in JSON answers")
    parameters = {item["name"]: item["schema"] for item in operations["get"]["parameters"] if "name" in item}
    assert list(parameters) == ["n", "steps", "temperature", "top_p", "seed", "label", "model", "preset"]
    assert parameters["temperature"]["maximum"] == 100
    assert parameters["seed"] == {"minimum": 0, "maximum": 2**64 - 1, "type": "integer"}
    assert parameters["model"]["enum"] == [IMAGES]
    for item in (item for item in operations["get"]["parameters"] if "name" in item):
        assert "null" not in str(item) and "object" not in str(item) and "{" not in item["description"]
    assert operations["get"]["responses"]["200"]["content"].keys() == {"application/json", "image/png"}
    assert "ErrorBody" in str(operations["get"]["responses"]["422"])
    page = images.client.get("/docs").text
    assert "GET /images" in page and "POST /images" in page
