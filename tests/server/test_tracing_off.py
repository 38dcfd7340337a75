"""Traces are off unless they are asked for, whether or not the packages that they need are installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.command_line import load_settings
from server.settings import SettingsError
from tests.server.processes import ROOT

URL = "http://127.0.0.1:4318/v1/traces"


def _python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PRIME_", "OTEL_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_nothing_that_sends_traces_is_imported_unless_asked_for(model_path: Path) -> None:
    build = """
import sys
from starlette.testclient import TestClient
from server.http.keys import KeyRing
from server.main import build_engine, http_config, load_settings, start_tracing
settings = load_settings(sys.argv[1:])
tracing = start_tracing(settings)
app = http_config(build_engine(settings), settings, KeyRing(), tracing).app
assert TestClient(app).get("/health").status_code == 200
# New versions of FastAPI import the interface of OpenTelemetry, which sends nothing.
senders = ("opentelemetry.sdk", "opentelemetry.exporter", "server.http.tracing")
print(tracing, [name for name in sys.modules if name.startswith(senders)])
"""
    # Variables of the SDK do not ask for it: they are often set for all programs of a machine.
    done = _python(build, "--model", str(model_path), OTEL_EXPORTER_OTLP_ENDPOINT=URL)
    assert done.stdout == "None []\n", done


def test_missing_packages_end_in_one_line_that_names_the_extra(model_path: Path) -> None:
    start = """
import sys
sys.modules["opentelemetry.sdk"] = None
from server.main import main
sys.exit(main(sys.argv[1:]))
"""
    done = _python(start, "--model", str(model_path), "--port", "0", "--otlp-traces-endpoint", URL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "prime-serve: --otlp-traces-endpoint: traces need OpenTelemetry: pip install 'mdm-prime[otel]', "
        "or leave it out\n"
    )


def test_the_endpoint_is_a_setting_like_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PRIME_")]:
        monkeypatch.delenv(name)
    assert load_settings([]).otlp_traces_endpoint is None
    file = tmp_path / "serve.toml"
    file.write_text(f'otlp_traces_endpoint = "{URL}"\n')
    assert load_settings(["--config", str(file)]).otlp_traces_endpoint == URL
    monkeypatch.setenv("PRIME_OTLP_TRACES_ENDPOINT", "https://b")
    assert load_settings(["--config", str(file)]).otlp_traces_endpoint == "https://b"
    assert (
        load_settings(["--otlp-traces-endpoint", "http://[::1]:1/"]).otlp_traces_endpoint == "http://[::1]:1/"
    )


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a",
        "localhost:4318",
        "grpc://a:4317",
        "http://",
        "http://a:x",
        "http://a:0",
        "http://[a",
        "http://a/ b",
        "http://a\n",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(["--otlp-traces-endpoint", url])
    assert "--otlp-traces-endpoint (PRIME_OTLP_TRACES_ENDPOINT): must be an http or https URL" in str(
        caught.value
    )
