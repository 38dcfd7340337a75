"""Which of a picture and JSON a client would rather have."""

from __future__ import annotations

import pytest

from server.http.accept import preferred

CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, None),
        ("", None),
        ("*/*", None),
        ("text/html", None),
        (CHROME, None),
        ("image/png", "image"),
        ("IMAGE/PNG;q=0.1", "image"),
        ("image/*", "image"),
        ("image/avif,image/webp,image/*,*/*;q=0.8", "image"),
        ("application/json", "json"),
        ("application/*", "json"),
        ("application/json, image/png", None),
        ("application/json;q=0.9, image/png", "image"),
        ("application/json, image/png ; q=0.9", "json"),
        ("application/json, */*;q=0.5", "json"),
        ("image/png;q=0, */*", "json"),
        ("image/png;Q=0, */*", "json"),
        ("image/png;q=0, image/*", None),
        ("image/png;q=0, image/png, application/json;q=0.5", "json"),
        ("image/png;q=1.5, application/json;q=0.1", "json"),
        ("image/png;q=0.1234, application/json;q=0.1", "json"),
        ("image/png;q=2, application/json;q=0.5", "json"),
        ("image/png;q=abc, application/json;q=0.1", "json"),
        ("image/png;q, application/json;q=0.1", "json"),
        ("image/png;q=2", None),
        ("image/png;q=2, image/*;q=0.5", "image"),
        ("image/png;quality=2", "image"),
        ("application/json;profile=x;q=0.2, image/png;q=0.3", "image"),
        ('image/png;profile="a,b";q=0, */*', "json"),
        ('image/png;profile="a;q=0";q=0.5, application/json;q=0.1', "image"),
        (r'image/png;profile="a\",b";q=0.1, application/json;q=0.5', "json"),
        (r'image/png;profile="a\\",application/json;q=0.1', "image"),
        ('image/png;profile="a, application/json', "image"),
        ('"image/png", application/json;q=0.1', "json"),
        (r"a/b\,image/png", "image"),
        (";;;,,q=1,=", None),
    ],
)
def test_preference(accept: str | None, expected: str | None) -> None:
    assert preferred(accept) == expected


def test_a_huge_header_takes_no_time() -> None:
    assert preferred("image/png;q=0.5," + "a/b;q=1;" * 8000 + ",application/json") == "json"
    assert preferred('image/png;p="' + r"\"," * 30_000) == "image"
