"""The faults of the server, by number: where each is tried, and those that have no better place.

MDM_FLOOD=10000 and MDM_DISCONNECTS=10000 try the last two at full size.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import gc
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.batcher import Job
from tests.server.running import CONTEXT, Running, assert_error, serving, wait_until

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="counts what Linux tells in /proc"
)

NUM_FLOOD = int(os.environ.get("MDM_FLOOD", "1000"))
NUM_DISCONNECTS = int(os.environ.get("MDM_DISCONNECTS", "400"))
AT_ONCE = 400

# What happens, and the tests that try it.
FAULTS = """
1. body over the limit
    test_bad_bodies.py::test_body_over_the_limit_with_content_length
    test_bad_bodies.py::test_body_over_the_limit_in_chunks
2. huge head
    test_broken_http.py::test_broken_http_is_closed
    test_access.py::test_no_part_of_the_head_escapes_its_bound
    test_faults.py::test_fault_02_huge_heads_take_no_memory
3. slow client
    test_slow_clients.py::test_slow_clients_are_cut_off
4. slow reader
    test_stream.py::test_a_reader_that_does_not_read_is_cut_off_and_nobody_waits_for_it
    test_slow_clients.py::test_a_client_that_reads_nothing_is_cut_off
5. ambiguous framing
    test_broken_http.py::test_broken_http_is_closed
6. bad JSON
    test_bad_bodies.py::test_bad_bodies
    test_bad_bodies.py::test_compressed_bodies
7. wrong method, path or type
    test_request_line.py::test_wrong_methods_and_paths
    test_bad_bodies.py::test_wrong_types
8. numbers that are none
    test_values.py::test_numbers_that_json_cannot_mean
    test_image_values.py::test_numbers_that_json_cannot_mean
9. seeds out of range and at its ends
    test_values.py::test_bad_value
    test_generate.py::test_extreme_seeds_reproduce
10. sizes out of range
    test_values.py::test_bad_value
    test_values.py::test_work_of_a_request_is_capped
11. what does not fit
    test_values.py::test_layouts_that_do_not_fit
    test_known.py::test_wrong_values_name_the_shape
12. odd text
    test_values.py::test_lone_surrogates
    test_faults.py::test_fault_12_odd_text_comes_back_as_it_was
13. unknown and repeated keys
    test_values.py::test_unknown_keys_are_refused_without_naming_them
    test_bad_bodies.py::test_bad_bodies
14. names of models that are paths
    test_faults.py::test_fault_14_names_of_models_open_no_file
15. no key
    test_keys.py::test_fault_15_every_route_but_two_asks_for_a_key
16. odd keys
    test_keys.py::test_fault_16_what_is_no_key_is_refused
    test_keys.py::test_only_digests_are_kept_and_all_are_compared
17. nasty text in the log
    test_logs.py::test_fault_17_anything_is_one_escaped_line
    test_logs.py::test_nothing_of_a_client_but_a_plain_id_is_logged
18. many paths and models
    test_operations.py::test_fault_18_nothing_that_a_client_sends_becomes_a_series
19. NaN in one row
    test_engine_faults.py::test_a_row_that_is_not_finite_fails_alone
20. a call that raises
    test_engine_faults.py::test_a_denoiser_that_raises_fails_the_callers_of_that_call_only
    test_process.py::test_faults_one_after_the_other_leave_the_same_bytes_until_the_thread_dies
21. an engine that hangs or dies
    test_process.py::test_fault_21_a_hang_shows_within_five_seconds_and_ends_the_process_if_it_lasts
    test_process.py::test_faults_one_after_the_other_leave_the_same_bytes_until_the_thread_dies
    test_main.py::test_a_dead_engine_ends_the_process_with_an_error
22. out of memory
    test_memory.py::test_fault_22_a_call_without_memory_is_made_again_with_half_the_rows
    test_memory.py::test_one_row_without_memory_fails_its_request_alone
23. clients that leave
    test_engine_faults.py::test_clients_that_leave_free_their_rows
    test_stream.py::test_a_reader_that_goes_frees_the_rows_within_a_step
    test_faults.py::test_fault_23_many_disconnects_leave_nothing_behind
24. a flood
    test_faults.py::test_fault_24_each_request_of_a_flood_is_accepted_or_refused
25. deadlines
    test_deadline.py::test_fault_25_who_is_late_in_the_queue_never_runs
26. SIGTERM under load
    test_drain.py::test_fault_26_a_drain_under_load_loses_nothing
    test_main.py::test_a_second_signal_ends_at_once
27. a clock that moves
    test_deadline.py::test_fault_27_a_clock_that_moves_by_a_day_moves_no_deadline
28. kill -9 and restart
    test_process.py::test_fault_28_kill_and_restart_gives_the_same_bytes
29. damaged checkpoints
    test_reload.py::test_fault_29_a_damaged_checkpoint_leaves_the_old_one_with_one_line_in_the_log
"""


def test_every_fault_has_its_tests() -> None:
    folder = Path(__file__).parent
    numbers: list[int] = []
    for line in FAULTS.strip().splitlines():
        number, dot, _ = line.partition(". ")
        if dot:
            numbers.append(int(number))
            continue
        file, test = line.strip().split("::")
        tree = ast.parse((folder / file).read_text("utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, line
    assert numbers == list(range(1, 30))


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path, max_queue_rows=64, max_batch_rows=16) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each fault the server is as it was: alive, with the same answer, and with nothing left over."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Running = request.getfixturevalue("server")
    canary: dict[str, Any] = {"prompt": "canary", "max_tokens": 5, "steps": 4, "seed": 9}
    before, threads = server.post(**canary).json()["outputs"], threading.active_count()
    yield
    wait_until(lambda: server.engine.held_rows == 0)
    assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200
    assert server.post(**canary).json()["outputs"] == before
    assert threading.active_count() <= threads + 2  # the pool that prepares rows may have grown to its bound
    wait_until(lambda: num_jobs() <= 2)


def num_jobs() -> int:
    gc.collect()
    return sum(type(each) is Job for each in gc.get_objects())  # isinstance would wake lazy modules


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def address(server: Running) -> tuple[str, int]:
    url = httpx.URL(server.url)
    assert url.port is not None
    return url.host, url.port


def test_fault_02_huge_heads_take_no_memory(server: Running) -> None:
    def send() -> None:
        with socket.create_connection(address(server), 60) as connection:
            try:
                connection.sendall(
                    b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 10**6 + b"\r\n\r\n"
                )
                while connection.recv(65536):
                    pass
            except ConnectionError:
                pass

    send()
    before = resident_bytes()
    for _ in range(20):
        send()
    assert resident_bytes() - before < 8 * 2**20  # kept whole they would be 20 MB


ODD_TEXTS = [
    "a\x00b",
    "e\u0301\u0323",
    "\u05d0\u05d1\u202eab\u202c",
    "\U0001f469\u200d\U0001f4bb",
    "\ufeffbom",
    "\U0010ffff\ufffe",
    "\r\n\t\x7f\u2028",
    "<script>\"'\\",
]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
def test_fault_12_odd_text_comes_back_as_it_was(server: Running, text: str) -> None:
    response = server.post(template=[text, {"gap": 2}, text], seed=1)
    assert response.status_code == 200
    shown = response.json()["outputs"][0]["text"]
    assert shown.startswith(text)
    assert shown.endswith(text)
    assert response.json()["outputs"][0]["token_ids"][: len(text.encode())] == list(text.encode())


def test_fault_14_names_of_models_open_no_file(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real_open, real_stat = builtins.open, os.stat

    def spy(real: Any) -> Any:
        def call(path: object, *arguments: Any, **named: Any) -> Any:
            opened.append(path)
            return real(path, *arguments, **named)

        return call

    names = [
        "../x",
        "%2e%2e",
        "/etc/passwd",
        "a" * 300,
        "tiny\n",
        "tiny\x00",
        "",
        ".",
        "~",
        "C:\\x",
        "TINY",
        " tiny",
    ]
    monkeypatch.setattr(builtins, "open", spy(real_open))
    monkeypatch.setattr(os, "stat", spy(real_stat))
    for name in names:
        message = assert_error(server.post(model=name), 404, "model_not_found", "model")
        assert "loaded: tiny" in message
        assert len(message) < 200
    monkeypatch.undo()
    assert not {str(path) for path in opened} & set(names)


def request_bytes(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def test_fault_24_each_request_of_a_flood_is_accepted_or_refused(server: Running) -> None:
    asked = request_bytes({"max_tokens": 2, "steps": 2})

    async def one(gate: asyncio.Semaphore) -> bytes:
        async with gate:
            reader, writer = await asyncio.open_connection(*address(server))
            writer.write(asked)
            answer = await reader.read()
            writer.close()
        return answer[9:12]

    async def flood() -> list[bytes]:
        gate = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(one(gate) for _ in range(NUM_FLOOD)))

    def answered() -> float:
        return sum(
            server.metric("prime_request_success_total", finished_reason=reason)
            for reason in ("stop", "length")
        )

    before, refused = answered(), server.metric("prime_rejected_total", reason="queue_full")
    statuses = asyncio.run(flood())
    assert set(statuses) <= {b"200", b"429"}
    assert statuses.count(b"200") + statuses.count(b"429") == NUM_FLOOD
    assert answered() - before == statuses.count(b"200") > 0
    assert server.metric("prime_rejected_total", reason="queue_full") - refused == statuses.count(b"429")


def test_fault_23_many_disconnects_leave_nothing_behind(server: Running) -> None:
    async def leave(number: int, gate: asyncio.Semaphore) -> None:
        """Leave before, while and after the rows run, with and without a stream, also in the middle of a body."""
        body = {"max_tokens": CONTEXT, "steps": "exact", "stream": number % 2 == 0}
        sent = request_bytes(body)
        async with gate:
            reader, writer = await asyncio.open_connection(*address(server))
            writer.write(sent[: -5 if number % 5 == 4 else None])
            await writer.drain()
            if number % 4 == 0 and number % 5 != 4:
                await asyncio.wait_for(reader.read(100), 60)
            elif number % 4 == 1:
                await asyncio.sleep(0.01 * (number % 7))
            writer.transport.abort()

    async def leave_all() -> None:
        gate = asyncio.Semaphore(32)
        await asyncio.gather(
            *(leave(number, gate) for number in range(NUM_DISCONNECTS)), return_exceptions=True
        )

    files = num_open_files()
    asyncio.run(leave_all())
    wait_until(lambda: server.engine.held_rows == 0)
    calls = server.metric("prime_denoiser_calls_total")
    wait_until(lambda: num_open_files() <= files + 2)
    assert server.metric("prime_denoiser_calls_total") == calls  # nobody's rows go on
    running = server.metric("prime_num_requests_running") + server.metric("prime_num_requests_waiting")
    assert running == 0
