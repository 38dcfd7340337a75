"""The playground's files: their types, policy and caching, and that they refer to nothing but each other."""

from __future__ import annotations

import http.client
import re
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

from server.routes.playground import FOLDER, MEDIA_TYPES, POLICY
from tests.server.running import Running, assert_error

SCRIPTS = sorted(path.name for path in FOLDER.glob("*.js"))
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")


class Page(HTMLParser):
    """Collects what a page refers to, and checks that nothing in it is inline."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.label_targets: list[str] = []
        self.script = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "style"
        for name, value in attrs:
            assert not name.startswith("on") and name != "style"
            if name in {"href", "src"}:
                self.links.append(str(value))
            if name == "id":
                self.ids.append(str(value))
            if name in {"for", "aria-labelledby"}:
                self.label_targets.append(str(value))
        self.script = tag == "script"

    def handle_data(self, data: str) -> None:
        assert not (self.script and data.strip())

    def handle_endtag(self, tag: str) -> None:
        self.script = False


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in NAMES)])
def test_every_file_has_its_type_its_policy_and_a_tag(server: Running, path: str) -> None:
    response = server.client.get(path)
    assert response.status_code == 200
    suffix = ".html" if path == "/" else path[path.rindex(".") :]
    assert response.headers["content-type"] == MEDIA_TYPES[suffix]
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    again = server.client.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    kept = set(response.headers) - {"content-type", "content-length", "date", "x-request-id"}
    assert {name: again.headers.get(name) for name in kept} == {name: response.headers[name] for name in kept}
    assert "content-type" not in again.headers  # of nothing
    assert server.client.get(path, headers={"If-None-Match": "*"}).status_code == 304
    assert server.client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    head = server.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(response.content))


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    parts = {name: sources for name, *sources in (part.split() for part in POLICY.split("; "))}
    assert parts["default-src"] == ["'none'"]
    assert parts["script-src"] == parts["style-src"] == parts["connect-src"] == ["'self'"]
    assert parts["img-src"] == ["'self'", "data:"]
    assert parts["frame-ancestors"] == parts["base-uri"] == parts["form-action"] == ["'none'"]
    assert "unsafe" not in POLICY


@pytest.mark.parametrize(
    "path",
    [
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/playground/nothing.js",
        "/playground/../app.py",
        "/playground/..%2fapp.py",
        "/playground/%2e%2e/app.py",
        "/playground/..%5capp.py",
        "/playground//etc/passwd",
        "/playground/app.js%00",
        "/playground/app.js/",
        "/index.html",
    ],
)
def test_no_path_leads_to_another_file(server: Running, path: str) -> None:
    address = urlsplit(server.url)
    assert address.hostname is not None and address.port is not None
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    connection.request("GET", path)  # httpx would tidy the path up
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    assert answer.status == 404
    assert b'"not_found"' in content


@pytest.mark.parametrize("path", ["/", "/playground/app.js"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_files_are_only_read(server: Running, path: str, method: str) -> None:
    response = server.client.request(method, path)
    assert_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD"


def test_the_page_refers_to_what_is_there(server: Running) -> None:
    page = Page((FOLDER / "index.html").read_text("utf-8"))
    assert {"playground/app.js", *(f"playground/{path.name}" for path in FOLDER.glob("*.css"))} <= set(
        page.links
    )
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        else:
            assert urlsplit(link).netloc == "" and not link.startswith("/")
            assert server.client.get(f"/{link}").status_code == 200
    assert len(page.ids) == len(set(page.ids))
    assert set(page.label_targets) <= set(page.ids)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_what_is_there(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8")
    for names, source in re.findall(r"^import \{([^}]*)\} from \"([^\"]+)\";$", text, re.MULTILINE):
        assert source.startswith("./") and source[2:] in SCRIPTS
        exported = (FOLDER / source[2:]).read_text("utf-8")
        for each in names.split(","):
            if each.strip():
                found = re.search(
                    rf"^export (async )?(function\*?|class|const) {each.strip()}\b", exported, re.M
                )
                assert found, f"{source} exports no {each.strip()}"
    assert len(re.findall(r"\bimport\b", text)) == len(re.findall(r"^import \{", text, re.MULTILINE))


def test_every_id_that_scripts_look_up_is_on_the_page() -> None:
    ids = set(Page((FOLDER / "index.html").read_text("utf-8")).ids)
    for name in SCRIPTS:
        wanted = re.findall(r"getElementById\(\"([^\"]+)\"\)", (FOLDER / name).read_text("utf-8"))
        assert set(wanted) <= ids, name


@pytest.mark.parametrize("name", ["index.html", *NAMES])
def test_nothing_is_loaded_from_elsewhere_or_run_from_text(name: str) -> None:
    text = (FOLDER / name).read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    for forbidden in [
        "://",
        "@import",
        "url(",
        "eval(",
        "Function(",
        "innerHTML",
        "document.write",
        "javascript:",
    ]:
        assert forbidden not in text, forbidden


def test_info_has_what_the_page_bounds_its_controls_with(both: Running) -> None:
    info = both.client.get("/info").json()
    assert info["limits"]["max_temperature"] == 100
    assert info["limits"]["max_corrector_scale"] == info["limits"]["max_corrector_power"] == 100
    assert info["limits"]["max_template_parts"] == info["limits"]["max_samples"] == 1024
    pictures = next(model for model in info["models"] if model["kind"] == "images")
    assert pictures["top_pixel"] == 15
