"""Load and its figures: by hand, against a slow server of our own, and against the real one."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from benchmarks import server_load
from benchmarks.load_client import Answer, LoadRequest, Mix, closed_loop, mixed_requests, open_loop
from benchmarks.main import main
from benchmarks.report import machine_line
from benchmarks.server_load import (
    OPEN_LOAD,
    ServerSettings,
    latency_figures,
    run_server_load,
    server_figures,
    summarise,
)
from benchmarks.server_process import check_loopback, own_server

TEXT = LoadRequest("text", {"max_tokens": 2})


@contextmanager
def one_at_a_time(
    seconds: float, status: int = 200, together: threading.Barrier | None = None
) -> Iterator[str]:
    """A server that takes so long for each request and serves one after the other.

    With ``together`` no request is served before as many are there as pass that barrier at once.
    """
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if together is not None:
                together.wait()
            with turn:
                time.sleep(seconds)
            body = json.dumps({"outputs": [{"token_ids": [1, 2]}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with suppress(threading.BrokenBarrierError):  # drops the connection
                super().handle()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_closed_loop_sends_all_from_clients_at_the_same_time() -> None:
    with one_at_a_time(0.01, together=threading.Barrier(3, timeout=60)) as url:
        answers, seconds = closed_loop(url, [TEXT] * 6, num_clients=3, limit_s=60, timeout_s=90)
    assert [answer.status for answer in answers] == [200] * 6
    assert sum(answer.num_tokens for answer in answers) == 12
    assert seconds >= 6 * 0.01


def test_closed_loop_has_no_more_in_flight_than_clients() -> None:
    with one_at_a_time(0.01, together=threading.Barrier(3, timeout=0.3)) as url:
        answers, _ = closed_loop(url, [TEXT] * 2, num_clients=2, limit_s=60, timeout_s=90)
    assert [answer.status for answer in answers] == [0, 0]  # a third one never came


def test_closed_loop_ends_in_time() -> None:
    with one_at_a_time(0.05) as url:
        answers, _ = closed_loop(url, [TEXT] * 1000, num_clients=1, limit_s=0.3, timeout_s=30)
    assert 1 <= len(answers) < 10


def test_open_loop_counts_from_the_arrival() -> None:
    """All arrive at once, so the last one waits for all others, whoever sent it."""
    with one_at_a_time(0.03) as url:
        answers, _ = open_loop(url, [TEXT] * 5, rate_per_s=1e4, seed=0, limit_s=30, timeout_s=30)
    assert max(answer.latency_s for answer in answers) > 0.14
    assert len(answers) == 5


def test_what_is_no_answer_is_counted_apart() -> None:
    with one_at_a_time(0, status=429) as url:
        answers, _ = closed_loop(url, [TEXT] * 2, num_clients=1, limit_s=30, timeout_s=30)
    answers += [Answer("text", 200, 0.5, 4), Answer("images", 200, 1.5, 0, 1), Answer("text", 0, 9.0)]
    figures = summarise(answers, 2.0)
    assert (figures["num_sent"], figures["num_answered"]) == (5, 2)
    assert (figures["num_refused"], figures["num_failed"]) == (2, 1)
    assert (figures["requests_per_s"], figures["text_tokens_per_s"], figures["images_per_s"]) == (1, 2, 0.5)
    assert figures["latency"]["images"]["max_s"] == 1.5 and figures["latency"]["all"]["num"] == 2
    with pytest.raises(RuntimeError, match="no request was answered"):
        summarise(answers[:2], 1.0)


def test_percentiles_and_histogram_by_hand() -> None:
    figures = latency_figures([k / 100 for k in range(1, 101)])
    assert (figures["p50_s"], figures["p90_s"], figures["p99_s"], figures["max_s"]) == (0.5, 0.9, 0.99, 1.0)
    assert figures["mean_s"] == pytest.approx(0.505)
    assert sum(figures["counts"]) == 100 and len(figures["counts"]) == len(figures["bounds_s"]) + 1
    below = [bound for bound in figures["bounds_s"] if bound <= 0.512]
    assert sum(figures["counts"][: len(below)]) == 51  # 0.01 to 0.51; the bound itself is 0.512
    assert latency_figures([1e9])["counts"][-1] == 1


def test_mixture_is_seeded_and_every_request_has_its_own_seed() -> None:
    mix = Mix(0.25, 0.25, 0.5, max_tokens=40, text_steps=3, image_steps=5, score_samples=7)
    first, again = (mixed_requests(400, 3, mix) for _ in range(2))
    assert first == again
    assert mixed_requests(400, 4, mix) != first
    assert [request.body["seed"] for request in first] == list(range(400))
    kinds = Counter(request.kind for request in first)
    assert kinds == {"images": 100, "scores": 100, "text": 200}
    bodies = {kind: [request.body for request in first if request.kind == kind] for kind in kinds}
    assert {body["steps"] for body in bodies["text"]} == {3}
    assert {body["steps"] for body in bodies["images"]} == {5}
    assert {body["num_samples"] for body in bodies["scores"]} == {7}
    lengths = {body["max_tokens"] for body in bodies["text"]}
    assert (min(lengths), max(lengths)) == (10, 40) and len(lengths) > 25
    assert 30 < sum("stream" in body for body in bodies["images"]) < 70
    assert not any("stream" in body for body in bodies["scores"])
    only_text = Mix(0, 0, 0, max_tokens=1, text_steps=1, image_steps=1, score_samples=1)
    assert {request.kind for request in mixed_requests(50, 0, only_text)} == {"text"}


def test_every_kind_of_answer_is_read() -> None:
    mix = Mix(0.3, 0.3, 0.5, max_tokens=8, text_steps=2, image_steps=2, score_samples=2)
    requests = mixed_requests(24, 0, mix)
    with own_server(["--num-threads", "1"]) as url:
        answers, _ = closed_loop(url, requests, num_clients=4, limit_s=60, timeout_s=60)
    assert [answer.status for answer in answers] == [200] * 24
    figures = summarise(answers, 1.0)
    streams = Counter(request.kind for request in requests if "stream" in request.body)
    assert streams["text"] and streams["images"]
    kinds = Counter(request.kind for request in requests)
    assert (figures["images_per_s"], figures["scores_per_s"]) == (kinds["images"], kinds["scores"])
    asked = sum(request.body.get("max_tokens", 0) for request in requests)
    assert 0 < figures["text_tokens_per_s"] <= asked


def test_server_figures_are_differences() -> None:
    before = {("prime_denoiser_calls_total", ""): 10.0, ("prime_row_steps_total", ""): 40.0}
    after = {
        ("prime_denoiser_calls_total", ""): 20.0,
        ("prime_row_steps_total", ""): 70.0,
        ("prime_row_steps_skipped_total", ""): 10.0,
        ("prime_call_tokens_total", ""): 300.0,
        ("prime_call_filling_tokens_total", ""): 100.0,
        ("prime_rejected_total", "queue_full"): 3.0,
    }
    figures = server_figures(before, after)
    assert (figures["denoiser_calls"], figures["rows_per_call"]) == (10, 3)
    assert (figures["skipped_step_share"], figures["useful_row_fraction"]) == (0.25, 0.75)
    assert figures["rejected"] == {"queue_full": 3}
    assert server_figures({}, {})["rows_per_call"] is None


@pytest.mark.parametrize("url", ["http://127.0.0.1:80", "http://localhost:8000/", "http://[::1]:9"])
def test_loopback_is_taken(url: str) -> None:
    assert check_loopback(url) == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    ["http://10.0.0.1:80", "http://example.org", "https://127.0.0.1", "127.0.0.1:80", "http://[::1]:9/x"],
)
def test_other_machines_are_left_alone(url: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        ServerSettings(url=url)


@pytest.mark.parametrize("name", ["device", "num_threads", "max_batch_rows"])
def test_a_server_that_runs_already_has_its_own_settings(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    value = "cpu" if name == "device" else "1"
    flag = f"--{name.replace('_', '-')}"
    assert main(["server", "--url", "http://127.0.0.1:9", flag, value]) == 2
    assert f"{flag} is for a server of the benchmark's own" in capsys.readouterr().err
    monkeypatch.setenv(f"PRIME_BENCH_{name.upper()}", value)
    assert main(["server", "--url", "http://127.0.0.1:9"]) == 2
    assert f"{flag} is for a server of the benchmark's own" in capsys.readouterr().err


def test_the_open_loop_alone_needs_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", "--loop", "open"]) == 2
    assert "needs a --rate" in capsys.readouterr().err
    assert main(["server", "--loop", "open", "--rate", "0"]) == 2
    assert "--rate" in capsys.readouterr().err
    assert ServerSettings(loop="open", rate=2.5).rate == 2.5
    assert str(OPEN_LOAD) in str(ServerSettings.model_fields["rate"].description)


def test_the_machine_of_another_server_is_what_that_server_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is that of its models, and how many threads it has it does not tell."""
    model = {"name": "a", "kind": "text", "num_parameters": 1, "dtype": "float32", "device": "cpu"}
    pages = {"/ready": b"", "/info": json.dumps({"models": [model], "limits": {}}).encode(), "/metrics": b""}
    monkeypatch.setattr(server_load, "get", lambda url, path: pages[path])
    monkeypatch.setattr(server_load, "closed_loop", lambda *_, **__: ([Answer("text", 200, 0.5, 4)], 1.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    document = run_server_load(ServerSettings(url="http://127.0.0.1:9", loop="closed"), lambda line: None)
    assert document["machine"]["device"] == "cpu" and document["machine"]["num_threads"] is None
    assert "threads" not in machine_line(document)
    assert document["loops"][0]["num_answered"] == 1


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(RuntimeError, match="max-batch-rows"), own_server(["--max-batch-rows", "0"]):
        raise AssertionError("it cannot run")
