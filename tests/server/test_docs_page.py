"""GET /docs: complete, and readable without a network, a mouse or a script."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest

from server.routes.docs_page import render_page
from tests.server.running import Running, assert_error

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
    assert "default-src 'none'" in response.headers["content-security-policy"]
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
    queries = document["paths"]["/images"]["get"]["parameters"]
    fields += [(item["name"], {**item["schema"], "description": item["description"]}) for item in queries]
    for name, field in fields:
        default = f"<code>{json.dumps(field['default'])}</code>" if "default" in field else ""
        row = f"<code>{name}</code></th><td>{field['description']}</td><td>{default}</td>"
        assert row in page
    for name in ["outputs[].finish_reason", "usage.denoiser_calls", "timings.run_s", "images[].b64_json"]:
        assert f"<code>{name}</code>" in page


@pytest.mark.parametrize(
    "path", ["/generate", "/images", "/score", "/v1/completions", "/v1/images/generations"]
)
def test_the_examples_of_bodies_work(both: Running, path: str) -> None:
    page = unescape(both.client.get("/docs").text)
    found = re.search(rf"curl [^<?]*:8000{path} [^<?]*", page)
    assert found
    words = shlex.split(found[0])
    headers = dict([words[words.index("-H") + 1].split(": ")])
    path = "/" + words[1].split("/", 3)[3]
    response = both.client.post(path, content=words[words.index("-d") + 1], headers=headers)
    assert response.status_code == 200


def test_the_example_of_a_query_works(both: Running) -> None:
    page = unescape(both.client.get("/docs").text)
    found = re.search(r"curl '[^<]*/(images\?[^<]*)' --output", page)
    assert found
    response = both.client.get("/" + found[1])
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")


def test_text_of_the_document_is_escaped() -> None:
    evil = "<script>\"'&"
    page = render_page(
        {
            "info": {"title": evil, "version": "1"},
            "paths": {"/a": {"get": {"summary": evil, "responses": {}}}},
        }
    )
    assert "script" not in Outline(page).tags


def test_other_documentation_pages_are_gone(server: Running) -> None:
    for path in ["/redoc", "/docs/oauth2-redirect"]:
        assert_error(server.client.get(path), 404, "not_found")
