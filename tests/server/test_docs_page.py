"""GET /docs: complete, and readable without a network, a mouse or a script."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from server.routes.docs_examples import base_url
from server.routes.docs_page import render_page
from tests.server.browser import Browser
from tests.server.running import Running, assert_error, serving

VOID = {"meta", "br"}


class Outline(HTMLParser):
    """Checks that tags nest; collects tags, ids and links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(str(value))
            if name in {"href", "src"}:
                self.links.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(server: Running) -> None:
    response = server.client.get("/docs")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["vary"] == "Host"  # which its examples name
    outline = Outline(response.text)
    assert not outline.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in response.text
    anchors = {link.removeprefix("#") for link in outline.links if link.startswith("#")}
    assert anchors == set(outline.ids)
    assert len(outline.ids) == len(anchors)
    others = [link for link in outline.links if not link.startswith("#")]
    assert others == ["openapi.json"]
    assert server.client.get("/openapi.json").status_code == 200


def body_of(document: Any, path: str) -> Any:
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_every_route_and_field_is_there_with_its_rule(both: Running) -> None:
    page = unescape(both.client.get("/docs").text)
    document = both.client.get("/openapi.json").json()
    assert "/docs" not in document["paths"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert operation["summary"] in page
    fields = [
        (name, field)
        for path in ("/generate", "/images", "/v1/completions", "/v1/images/generations")
        for name, field in body_of(document, path)["properties"].items()
    ]
    queries = [item for item in document["paths"]["/images"]["get"]["parameters"] if "$ref" not in item]
    assert queries
    fields += [(item["name"], {**item["schema"], "description": item["description"]}) for item in queries]
    for name, field in fields:
        default = f"<code>{json.dumps(field['default'])}</code>" if "default" in field else ""
        row = f"<code>{name}</code></th><td>{field['description']}</td><td>{default}</td>"
        assert row in page
    for name in ["outputs[].finish_reason", "usage.denoiser_calls", "timings.run_s", "images[].b64_json"]:
        assert f"<code>{name}</code>" in page


def examples(page: str, address: str) -> list[list[str]]:
    """The words of the commands that ask for an address."""
    commands = [shlex.split(unescape(found)) for found in re.findall(r">(curl [^<]*)</pre>", page)]
    return [words for words in commands if address in {word.partition("?")[0] for word in words}]


def headers_of(words: list[str]) -> dict[str, str]:
    """The headers that a command sends."""
    return dict(value.split(": ") for option, value in itertools.pairwise(words) if option == "-H")


@pytest.mark.parametrize(
    "path", ["/generate", "/images", "/score", "/v1/completions", "/v1/images/generations"]
)
def test_the_examples_of_bodies_work(both: Running, path: str) -> None:
    commands = examples(both.client.get("/docs").text, both.url + path)
    posts = [words for words in commands if "-d" in words]
    assert len(posts) >= 1 if path == "/score" else len(posts) >= 2  # of the others, a stream too
    for words in posts:
        response = both.client.post(path, content=words[words.index("-d") + 1], headers=headers_of(words))
        assert response.status_code == 200
        streamed = "-N" in words
        assert response.headers["content-type"].startswith("text/event-stream") == streamed


def test_the_examples_of_a_query_work(both: Running) -> None:
    commands = examples(both.client.get("/docs").text, f"{both.url}/images")
    gets = [words for words in commands if "-d" not in words]
    answers = [
        both.client.get(next(word for word in words if "?" in word), headers=headers_of(words))
        for words in gets
    ]
    types = [(answer.status_code, answer.headers["content-type"]) for answer in answers]
    assert types == [(200, "image/png"), (200, "application/json")]


def test_the_page_tells_of_headers_streams_and_every_error(both: Running) -> None:
    page = unescape(both.client.get("/docs").text)
    for text in ["X-Request-Id", "X-Request-Timeout", "Retry-After", "X-Seed", "X-NFE", "X-Labels"]:
        assert f"<code>{text}</code>" in page
    assert f"at most {both.settings.max_request_s:g}," in page
    events = ["event: denoise", "event: image_generation.partial_image", "event: image_generation.completed"]
    for event in [*events, "data"]:
        assert f"Stream: {event}</h3>" in page
    for name in ["eta_s", "progress", "digits", "pieces", "revealed", "error.code", "error.param"]:
        assert f"<code>{name}</code>" in page
    for each in both.client.get("/openapi.json").json()["x-errors"]:
        assert f"<code>{each['code']}</code></th><td>{each['meaning']}</td>" in page


@pytest.fixture(scope="module")
def any_host(model_path: Path) -> Iterator[Running]:
    with serving(model_path, allowed_hosts="*") as running:
        yield running


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("prime.example:8001", "http://prime.example:8001"),
        ("[::1]:9", "http://[::1]:9"),
        ("$(reboot)", None),
        ("a'b", None),
        ("<script>", None),
    ],
)
def test_the_examples_name_the_address_that_was_asked(
    any_host: Running, host: str, shown: str | None
) -> None:
    page = any_host.client.get("/docs", headers={"Host": host}).text
    assert examples(page, f"{any_host.url if shown is None else shown}/health")
    assert (host in page) == (shown is not None)


def test_the_page_fits_a_narrow_window(window: Browser, both: Running) -> None:
    window.resize(400)
    try:
        window.open(f"{both.url}/docs")
        assert window.js("document.documentElement.scrollWidth <= 400")
        assert window.js("document.querySelectorAll('pre').length") > 15
        assert window.complaints() == []
    finally:
        window.resize(1400)


def test_the_address_of_the_server_is_shown_where_no_name_was_asked() -> None:
    for address, shown in [("10.0.0.5", "http://10.0.0.5:81"), ("::1", "http://[::1]:81")]:
        scope = {"type": "http", "scheme": "http", "path": "/docs", "server": (address, 81), "headers": []}
        assert base_url(Request(scope)) == shown


def test_text_of_the_document_is_escaped() -> None:
    evil = "<script>\"'&"
    described = {"description": evil}
    fields = {"title": evil, "properties": {evil: {**described, "default": evil}}}
    stream = {"schema": described, "x-events": [{"event": evil, "schema": {**fields, "title": "frame"}}]}
    operation = {
        "summary": evil,
        "description": evil,
        "parameters": [{"name": evil, "in": "query", "schema": {"default": evil}, **described}],
        "requestBody": {"content": {"application/json": {"schema": {"anyOf": [fields]}}}},
        "responses": {
            "200": {
                "content": {
                    "application/json": {"schema": fields},
                    "text/event-stream": stream,
                    evil: {},
                },
                "headers": {evil: described},
            },
            evil: {},
        },
    }
    page = render_page(
        {
            "info": {"title": evil, "version": evil, "description": evil},
            "paths": {f"/{evil}": {"get": operation}},
            "components": {
                "schemas": {"ErrorBody": fields},
                "parameters": {evil: described},
                "headers": {evil: described},
                "securitySchemes": {"key": described},
            },
            "x-errors": [{"status": 400, "code": evil, "meaning": evil}],
        },
        "http://127.0.0.1",
    )
    outline = Outline(page)
    assert "script" not in outline.tags
    assert f"get-{evil}" in outline.ids
    assert evil not in page and evil[1:] not in page


def test_other_documentation_pages_are_gone(server: Running) -> None:
    for path in ["/redoc", "/docs/oauth2-redirect"]:
        assert_error(server.client.get(path), 404, "not_found")
