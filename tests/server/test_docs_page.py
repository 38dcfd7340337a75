"""GET /docs: complete, and readable without a network, a mouse or a script."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from html.parser import HTMLParser

from server.docs_page import render_page
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


def test_every_route_and_field_is_there_with_its_rule(server: Running) -> None:
    page = unescape(server.client.get("/docs").text)
    document = server.client.get("/openapi.json").json()
    assert "/docs" not in document["paths"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert f"<code>{method.upper()} {path}</code>" in page
            assert operation["summary"] in page
    body = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    for name, field in body["properties"].items():
        default = f"<code>{json.dumps(field['default'])}</code>" if "default" in field else ""
        row = f"<code>{name}</code></th><td>{field['description']}</td><td>{default}</td>"
        assert row in page
    for name in ["outputs[].finish_reason", "usage.denoiser_calls", "timings.run_s"]:
        assert f"<code>{name}</code>" in page


def test_the_example_works(server: Running) -> None:
    page = unescape(server.client.get("/docs").text)
    found = re.search(r"curl [^<]*/generate[^<]*", page)
    assert found
    words = shlex.split(found[0])
    headers = dict([words[words.index("-H") + 1].split(": ")])
    path = "/" + words[1].split("/", 3)[3]
    response = server.client.post(path, content=words[words.index("-d") + 1], headers=headers)
    assert response.status_code == 200


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
