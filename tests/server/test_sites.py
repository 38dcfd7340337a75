"""Pages of other sites start no work and read nothing; programs, users and proxies that say who they are may go on."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.command_line import load_settings
from server.http.keys import Key, KeyRing
from server.http.sites import is_loopback, parse_hosts
from server.main import _warn_if_open
from server.settings import Settings, SettingsError
from tests.server.running import Running, assert_error, serving

KEY = "sk-0123456789abcdef"
PICTURE = "/images?steps=1"
WORK = [
    ("GET", PICTURE, None),
    ("POST", "/images", {"steps": 1}),
    ("POST", "/generate", {"max_tokens": 1}),
    ("POST", "/score", {"text": "a"}),
    ("POST", "/v1/completions", {"max_tokens": 1}),
    ("POST", "/v1/images/generations", {"prompt": "", "steps": 1}),
]


@pytest.fixture(scope="module")
def locked(
    model_path: Path, images_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    with serving(model_path, images_path, keys=KeyRing(file)) as running:
        yield running


@pytest.mark.parametrize(("method", "path", "body"), WORK)
def test_pages_of_other_sites_start_no_work(both: Running, method: str, path: str, body: Any) -> None:
    calls = both.metric("prime_denoiser_calls_total", model="tiny-images")
    for site in ("cross-site", "same-site", "same-origin, cross-site", "Same-Origin", ""):
        response = both.client.request(method, path, json=body, headers={"Sec-Fetch-Site": site})
        assert_error(response, 403, "cross_site")
    twice = [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")]
    assert_error(both.client.request(method, path, json=body, headers=twice), 403, "cross_site")
    assert both.metric("prime_denoiser_calls_total", model="tiny-images") == calls
    for own in ({"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
        assert both.client.request(method, path, json=body, headers=own).status_code == 200
    with_key = {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer none"}
    assert both.client.request(method, path, json=body, headers=with_key).status_code == 200
    with_password = {**with_key, "Authorization": "Basic bm9uZTpub25l"}
    assert_error(both.client.request(method, path, json=body, headers=with_password), 403, "cross_site")


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/ready", "/info", "/metrics", "/v1/models"])
def test_links_from_other_sites_lead_to_what_is_no_work(both: Running, path: str) -> None:
    response = both.client.get(path, headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 401), ("same-site", 401), ("odd", 401), ("same-origin", 200), ("none", 200)],
)
def test_with_keys_a_remembered_password_counts_for_the_own_site_alone(
    locked: Running, site: str, status: int
) -> None:
    password = "Basic " + base64.b64encode(f"a:{KEY}".encode()).decode()
    for path in (PICTURE, "/info"):
        headers = {"Authorization": password, "Sec-Fetch-Site": site}
        assert locked.client.get(path, headers=headers).status_code == status
        headers["Authorization"] = f"Bearer {KEY}"
        assert locked.client.get(path, headers=headers).status_code == 200
    assert locked.client.get(PICTURE, headers={"Sec-Fetch-Site": site}).status_code == 401


OWN_NAMES = [
    "localhost",
    "localhost:8000",
    "LOCALHOST.:1",
    "a.localhost",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.9.9.9:1",
    "127.1",
    "10.0.0.5:8000",
    "[::1]",
    "[::1]:8000",
    "[fe80::1]:8000",
]
OTHER_NAMES = [
    "prime.example",
    "prime.example:8000",
    "127.0.0.1.prime.example",
    "localhost.prime.example",
    "notlocalhost",
    "localhost@prime.example",
    "[::1].prime.example",
    "[::1",
    "localhost:8000:1",
    "a b",
    "",
]


@pytest.mark.parametrize("host", OWN_NAMES)
def test_names_and_addresses_of_this_machine_are_answered(both: Running, host: str) -> None:
    assert both.client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", OTHER_NAMES)
def test_other_names_are_refused_on_loopback_without_keys(both: Running, locked: Running, host: str) -> None:
    for path in ("/v1/models", "/", "/metrics", "/nowhere", PICTURE):
        message = assert_error(both.client.get(path, headers={"Host": host}), 403, "unknown_host")
        assert "--allowed-hosts" in message
    for path in ("/health", "/ready"):  # which tell nothing, to whoever watches over the server
        assert both.client.get(path, headers={"Host": host}).status_code == 200
    with_key = {"Host": host, "Authorization": f"Bearer {KEY}"}
    assert locked.client.get("/v1/models", headers=with_key).status_code == 200


def test_names_can_be_added_and_then_count_wherever_the_server_listens(model_path: Path) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        with serving(model_path, host=host, allowed_hosts="prime.example, Other.Example") as server:
            for name, status in [("prime.example:1", 200), ("OTHER.example", 200), ("a.prime.example", 403)]:
                assert server.client.get("/info", headers={"Host": name}).status_code == status
            assert server.client.get("/info").status_code == 200
    for settings in ({"allowed_hosts": "*"}, {"host": "0.0.0.0"}):
        with serving(model_path, **settings) as server:
            assert server.client.get("/info", headers={"Host": "prime.example"}).status_code == 200


def test_a_request_of_http_1_0_needs_no_name(both: Running) -> None:
    url = httpx.URL(both.url)
    with socket.create_connection((url.host, url.port or 0), 20) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.0\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("LocalHost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.2", False),
        ("prime.example", False),
    ],
)
def test_who_can_reach_an_address(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_what_is_no_name_of_a_host_is_no_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings([]).allowed_hosts == ()
    assert load_settings(["--allowed-hosts", "a, B.c,*"]).allowed_hosts == ("a", "b.c", "*")
    assert parse_hosts(["a", "b_c-d.e"]) == ("a", "b_c-d.e")
    for value in ["", "a,,b", "a:80", "http://a", "a/b", "[::1]", ".a", "a b", "ä"]:
        with pytest.raises(SettingsError, match=r"--allowed-hosts .*without scheme and port"):
            load_settings(["--allowed-hosts", value])
    file = tmp_path / "serve.toml"
    file.write_text('allowed_hosts = ["a", "b"]\n')
    assert load_settings(["--config", str(file)]).allowed_hosts == ("a", "b")
    file.write_text("allowed_hosts = [1]\n")
    with pytest.raises(SettingsError, match="--allowed-hosts"):
        load_settings(["--config", str(file)])
    monkeypatch.setenv("PRIME_ALLOWED_HOSTS", "c,d")
    assert load_settings([]).allowed_hosts == ("c", "d")


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("127.0.0.2", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_who_can_be_reached_by_others_without_a_key_is_warned(
    caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    _warn_if_open(Settings(host=host), KeyRing())
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    caplog.clear()
    _warn_if_open(Settings(host=host), KeyRing(fixed=[Key("a", b"digest")]))
    assert not caplog.records
