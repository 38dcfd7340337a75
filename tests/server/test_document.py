"""/openapi.json says what the server does: keys, headers, streams, and every error there is."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import server
from server.http.error_codes import ERROR_CODES
from server.http.errors import _ROUTING
from server.http.keys import KeyRing
from server.http.security import OPEN_PATHS
from server.http.sse import MEDIA_TYPE
from server.refusals import _UNAVAILABLE
from tests.server.running import Running, serving

KEY = "sk-0123456789abcdef"
FOLDER = Path(server.__file__).parent


@pytest.fixture(scope="module")
def document(both: Running) -> Any:
    return both.client.get("/openapi.json").json()


def operations(document: Any) -> Iterator[tuple[str, str, Any]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def raised() -> Iterator[tuple[int, str]]:
    """Status and code of every error that some line of the server makes, where both are written out."""
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                status, code = node.args[:2]
                if isinstance(status, ast.Constant) and isinstance(code, ast.Constant):
                    yield status.value, code.value  # type: ignore[misc]


def test_every_error_that_the_server_makes_is_described_and_no_other(document: Any) -> None:
    made = {*raised(), *((503, reason) for reason in _UNAVAILABLE)}
    made |= {(status, code) for status, (code, _) in _ROUTING.items()}
    assert len(made) > 20
    listed = [(each.status, each.code) for each in ERROR_CODES]
    assert len(listed) == len(set(listed))
    assert made == set(listed)
    shown = {(each["status"], each["code"]) for each in document["x-errors"]}
    assert shown == {each for each in listed if each[0] != 401}  # no keys are set


def test_without_keys_none_is_asked_for(document: Any) -> None:
    assert "securitySchemes" not in document["components"]
    for _, _, operation in operations(document):
        assert "security" not in operation
        assert "401" not in operation["responses"]


def test_with_keys_every_route_but_the_open_ones_asks_for_one(model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    with serving(model_path, keys=KeyRing(file)) as locked:
        headers = {"authorization": f"Bearer {KEY}"}
        document = locked.client.get("/openapi.json", headers=headers).json()
        page = locked.client.get("/docs", headers=headers).text
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        assert document["components"]["securitySchemes"]["basic"]["scheme"] == "basic"
        for method, path, operation in operations(document):
            answer = locked.client.request(method, path)
            assert (
                ("401" in operation["responses"]) == (answer.status_code == 401) == (path not in OPEN_PATHS)
            )
            assert ("security" in operation) == (path not in OPEN_PATHS)
            if answer.status_code == 401:
                assert "www-authenticate" in answer.headers
                assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
    for command in re.findall(r">(curl [^<]*)</pre>", page):
        is_open = any(path in command for path in OPEN_PATHS)
        assert ("Authorization: Bearer KEY" in command) != is_open, command
    assert "<code>invalid_api_key</code>" in page


def test_errors_of_a_body_are_told_of_routes_with_a_body_alone(document: Any) -> None:
    for method, path, operation in operations(document):
        told = {status for status in operation["responses"] if status in {"400", "408", "413", "415"}}
        assert (len(told) == 4) if method == "post" else not told, path
        assert {"431", "500"} <= operation["responses"].keys()


def test_what_metrics_answer_is_text(document: Any) -> None:
    assert document["paths"]["/metrics"]["get"]["responses"]["200"]["content"].keys() == {"text/plain"}


def test_headers_are_told_where_they_are_taken_and_given(document: Any) -> None:
    parameters = document["components"]["parameters"]
    for _, path, operation in operations(document):
        named = [item["$ref"].rsplit("/", 1)[1] for item in operation["parameters"] if "$ref" in item]
        samples = "504" in operation["responses"]
        assert named == ["X-Request-Id", "X-Request-Timeout"][: 1 + samples]
        for response in operation["responses"].values():
            assert "X-Request-Id" in response["headers"]
        assert list(operation["responses"]) == sorted(operation["responses"])
        for status in ("403", "429"):
            assert (status in operation["responses"]) == (path not in OPEN_PATHS)
        if "503" in operation["responses"]:  # of which /ready does not say when it ends
            assert ("Retry-After" in operation["responses"]["503"]["headers"]) == samples
        if path not in OPEN_PATHS:
            assert "Retry-After" in operation["responses"]["429"]["headers"], path
    assert parameters["X-Request-Timeout"]["in"] == "header"


def test_the_header_of_traces_is_told_where_traces_are_sent(model_path: Path, document: Any) -> None:
    assert "traceparent" not in document["components"]["parameters"]
    with serving(model_path, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces") as traced:
        told = traced.client.get("/openapi.json").json()
        page = traced.client.get("/docs").text
    reference = {"$ref": "#/components/parameters/traceparent"}
    assert all(reference in operation["parameters"] for _, _, operation in operations(told))
    (row,) = re.findall(r'<th scope="row"><code>traceparent</code></th><td>(.*?)</td>', page)
    assert "Trace Context" in row
    assert row.endswith("for all routes")


def properties_of(document: Any, path: str, event: str | None) -> set[str]:
    content = document["paths"][path]["post"]["responses"]["200"]["content"][MEDIA_TYPE]
    (schema,) = [each["schema"] for each in content["x-events"] if each.get("event") == event]
    return set(schema["properties"])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"max_tokens": 4}),
        ("/images", {"label": 1, "steps": 4}),
        ("/v1/completions", {"max_tokens": 4, "stream_options": {"include_usage": True}}),
        ("/v1/images/generations", {"prompt": "", "steps": 8, "partial_images": 1}),
    ],
)
def test_the_frames_of_a_stream_have_the_fields_that_are_told(
    both: Running, document: Any, path: str, body: dict[str, object]
) -> None:
    answer = both.client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200
    frames = answer.text.removesuffix("data: [DONE]\n\n").strip().split("\n\n")
    assert len(frames) > 1
    for frame in frames:
        *events, data = frame.split("\n")
        event = events[0].removeprefix("event: ") if events else None
        assert set(json.loads(data.removeprefix("data: "))) == properties_of(document, path, event)
