"""API keys: every route but two asks for one, and nothing of a key is ever said (faults 15 and 16)."""

from __future__ import annotations

import base64
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.app import create_app
from server.command_line import load_settings
from server.http.keys import (
    KEY_VARIABLES,
    MAX_FILE_BYTES,
    MAX_KEY_CHARS,
    SHORT_KEY_CHARS,
    KeyRing,
    KeysError,
    read_keys,
    take_environment_keys,
)
from server.http.route_table import route_table
from server.settings import SettingsError
from tests.server.running import Running, assert_error, serving

KEY = "sk-0123456789abcdef"
OTHER = "sk-fedcba9876543210"


@pytest.fixture(scope="module")
def locked(
    model_path: Path, images_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# of the team\nteam:{KEY}\n\n{OTHER}\n")
    with serving(model_path, images_path, keys=KeyRing(file)) as running:
        yield running


def routes_of(server: Running) -> list[tuple[str, str]]:
    """Method and path of every route there is, and of some that there are not."""
    table = [
        (method, path.replace("{", "").replace("}", ""))
        for method, path in route_table(create_app(server.engine, server.settings))
    ]
    assert {("POST", "/generate"), ("GET", "/metrics"), ("GET", "/openapi.json")} <= set(table)
    return [
        *table,
        ("GET", "/nowhere"),
        ("DELETE", "/generate"),
        ("GET", "/health/"),
        ("GET", "/ready/../info"),
    ]


def test_fault_15_every_route_but_two_asks_for_a_key(locked: Running) -> None:
    for method, path in routes_of(locked):
        response = locked.client.request(method, path)
        if path in {"/health", "/ready"}:
            assert response.status_code == 200, (method, path)
        elif method == "HEAD":
            assert response.status_code == 401, (method, path)
        else:
            assert_error(response, 401, "invalid_api_key")
            challenges = response.headers.get_list("www-authenticate")
            assert [challenge.split()[0] for challenge in challenges] == ["Bearer", "Basic"]


def test_every_route_answers_with_a_key(locked: Running) -> None:
    for method, path in routes_of(locked):
        response = locked.client.request(method, path, headers={"authorization": f"Bearer {KEY}"})
        assert response.status_code != 401, (method, path)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        f"Bearer {KEY}",
        f"bearer {OTHER}",
        f"BEARER   {KEY}",
        basic("", KEY),
        basic("a", KEY).replace("Ba", "bA"),
    ],
)
def test_keys_that_are_accepted(locked: Running, header: str) -> None:
    response = locked.client.post("/generate", json={"max_tokens": 1}, headers={"authorization": header})
    assert response.status_code == 200


@pytest.mark.parametrize(("site", "status"), [("cross-site", 401), ("same-origin", 200), ("none", 200)])
def test_a_remembered_password_does_not_count_for_pages_of_other_sites(
    locked: Running, site: str, status: int
) -> None:
    headers = {"authorization": basic("a", KEY), "sec-fetch-site": site}
    assert locked.client.get("/info", headers=headers).status_code == status
    bearer = {"authorization": f"Bearer {KEY}", "sec-fetch-site": site}  # which no browser adds by itself
    assert locked.client.get("/info", headers=bearer).status_code == 200


WITH_JUNK = base64.b64encode(f"a:{KEY}".encode()).decode()
WITH_JUNK = f"{WITH_JUNK[:8]}!{WITH_JUNK[8:]}"
BAD_HEADERS = [
    b"",
    b"Bearer",
    KEY.encode(),
    f"Bearer {KEY[:-1]}".encode(),
    f"Bearer {KEY}x".encode(),
    f"Bearer {KEY} {KEY}".encode(),
    f"Bearer team:{KEY}".encode(),
    f"Token {KEY}".encode(),
    "Bearer schlüssel-der-länge".encode(),
    b"Bearer \xff\xfe",
    b"Bearer " + b"a" * (MAX_KEY_CHARS + 1),
    b"Bearer " + b"a" * 60_000,
    b"Basic !!!",
    f"Basic {WITH_JUNK}".encode(),
    b"Basic " + base64.b64encode(KEY.encode()),
    b"Basic " + base64.b64encode("a:schlüssel".encode()),
    basic(KEY, "").encode(),
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_fault_16_what_is_no_key_is_refused(
    locked: Running, header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    response = locked.client.get("/info", headers=[(b"authorization", header)])
    assert_error(response, 401, "invalid_api_key")
    assert KEY not in response.text + caplog.text


def test_two_headers_are_no_key(locked: Running) -> None:
    twice = [("authorization", f"Bearer {KEY}")] * 2
    assert_error(locked.client.get("/info", headers=twice), 401, "invalid_api_key")


def test_without_keys_nobody_is_asked(server: Running) -> None:
    assert server.client.get("/info", headers={"authorization": "Bearer nonsense"}).status_code == 200


def test_only_digests_are_kept_and_all_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(left)
        return left == right

    environment = {"prime_api_key": "first-key-of-three-keys", "PRIME_API_KEYS": f"{KEY}, ops:{OTHER}"}
    ring = KeyRing(fixed=take_environment_keys(environment))
    assert environment == {}
    assert len(ring) == 3
    assert KEY not in repr(vars(ring))
    monkeypatch.setattr("server.http.keys.hmac.compare_digest", compare)
    assert ring.name_of(b"first-key-of-three-keys") == "environment-1"
    assert ring.name_of(OTHER.encode()) == "ops"
    assert ring.name_of(b"no") is None
    assert len(compared) == 9


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    ring = KeyRing(file)
    file.write_text(f"new:{OTHER}\n")
    ring.refresh()
    assert (ring.name_of(OTHER.encode()), ring.name_of(KEY.encode())) == ("new", None)
    for damage in (lambda: file.write_text("\n"), lambda: file.write_text("bad key\n"), file.unlink):
        caplog.clear()
        damage()
        ring.refresh()
        ring.refresh()
        assert ring.name_of(OTHER.encode()) == "new"
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "bad key" not in caplog.text
    file.write_text(KEY)
    mark = file.stat()
    ring.refresh()
    file.write_text(f"{OTHER}\n{KEY}")  # of another length, and with the same time
    os.utime(file, ns=(mark.st_atime_ns, mark.st_mtime_ns))
    ring.refresh()
    assert len(ring) == 2
    file.write_text(KEY)
    mark = file.stat()
    ring.refresh()
    file.write_text(KEY.swapcase())  # of the same length, and with the same time
    os.utime(file, ns=(mark.st_atime_ns, mark.st_mtime_ns))
    ring.refresh()
    assert ring.name_of(KEY.encode())
    ring.refresh(force=True)
    assert ring.name_of(KEY.encode()) is None


def test_a_file_is_read_again_when_another_takes_its_place_or_only_its_time_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prime.server")
    file, other = tmp_path / "keys", tmp_path / "other"
    file.write_text(KEY)
    ring = KeyRing(file)
    mark = file.stat()
    ring.refresh()
    assert not caplog.records  # it is as it was
    other.write_text(OTHER)  # of the same length
    os.utime(other, ns=(mark.st_atime_ns, mark.st_mtime_ns))
    other.replace(file)
    ring.refresh()
    assert ring.name_of(OTHER.encode())
    file.write_text(KEY)  # in the same place
    os.utime(file, ns=(mark.st_atime_ns, mark.st_mtime_ns + 10**9))
    ring.refresh()
    assert ring.name_of(KEY.encode())
    assert [record.getMessage() for record in caplog.records] == ["API keys read again: 1 are accepted"] * 2


def test_keys_of_the_environment_count_beside_those_of_a_file_also_when_it_is_read_again(
    tmp_path: Path,
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"team:{KEY}")
    ring = KeyRing(file, take_environment_keys({"PRIME_API_KEY": OTHER}))
    for _ in range(2):
        assert [ring.name_of(key.encode()) for key in (KEY, OTHER)] == ["team", "environment-1"]
        ring.refresh(force=True)


def test_a_file_of_keys_may_have_a_mebibyte(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(f"\n{KEY}".encode().rjust(MAX_FILE_BYTES, b"#"))
    assert len(read_keys(file)) == 1
    with file.open("ab") as more:
        more.write(b"\n")
    with pytest.raises(KeysError, match="is over 1048576 bytes"):
        read_keys(file)


def test_a_key_that_can_be_guessed_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("a" * SHORT_KEY_CHARS)
    read_keys(file)
    assert not caplog.records
    file.write_text("a" * (SHORT_KEY_CHARS - 1))
    read_keys(file)
    (record,) = caplog.records
    assert (record.levelname, "line 1: a key of under 16 characters" in record.getMessage()) == (
        "WARNING",
        True,
    )
    assert "aaa" not in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "holds no key"),
        (b"# only words\n", "holds no key"),
        (b"a b\n", "line 1"),
        (b"good-key-of-some-length\nk\xc3\xbcche\n", "line 2"),
        (b"n\xc3\xa4me:key\n", "line 1: in name:key"),
        (b"a" * (MAX_KEY_CHARS + 1), "line 1"),
        (b":key", "line 1"),
        (b"n" * 65 + b":a-key-of-some-length", "line 1: in name:key the name must be 1 to 64 letters"),
        (b"name:", "line 1"),
    ],
)
def test_bad_files_are_refused_without_repeating_them(tmp_path: Path, text: bytes, words: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(text)
    with pytest.raises(KeysError, match=words) as caught:
        read_keys(file)
    assert len(str(caught.value)) < 500


def test_an_empty_variable_is_no_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in KEY_VARIABLES:
        for value in ("", " ", "a-key-of-some-length,,b"):
            if variable == "PRIME_API_KEY" and "," in value:
                continue
            with pytest.raises(KeysError, match=f"{variable} holds an empty key"):
                take_environment_keys({variable: value})
        monkeypatch.setenv(variable, KEY)
    assert load_settings([]).api_keys_file is None  # the variables are known
    monkeypatch.setenv("PRIME_API_KEYZ", KEY)
    with pytest.raises(SettingsError) as caught:
        load_settings([])
    assert KEY not in str(caught.value)


def test_the_official_way_of_a_client_works(locked: Running) -> None:
    with httpx.Client(base_url=locked.url, auth=("anybody", KEY)) as browser:
        assert browser.get("/metrics").status_code == 200
        assert browser.get("/docs").status_code == 200
