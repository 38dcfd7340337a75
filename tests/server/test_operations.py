"""Health, readiness, /info and /metrics."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from tests.server.running import CONTEXT, Running


def series(server: Running) -> dict[str, float]:
    response = server.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_health_and_ready(server: Running) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.client.get("/ready").json() == {"status": "ready"}


def test_info_says_what_is_loaded_and_no_path(server: Running) -> None:
    response = server.client.get("/info")
    info = response.json()
    (model,) = info["models"]
    assert (model["name"], model["kind"], model["tokenizer"]) == ("tiny", "text", "tiktoken_file")
    assert model["codec"] == {"vocab_size": 257, "target_length": 2, "permuted": False, "base": 17}
    assert model["schedule"] == {"kind": "linear", "eps": 1e-3}
    assert model["network"]["hidden_size"] == 32
    assert (model["dtype"], model["device"], model["in_service"]) == ("float32", "cpu", True)
    assert model["limits"] == {"context": CONTEXT, "vocab_size": 257, "max_chars": CONTEXT}
    assert info["limits"]["max_n"] == 16
    assert info["limits"]["max_queue_rows"] == 512
    assert info["versions"].keys() == {"python", "torch"}
    assert str(server.settings.model[0].path.parent) not in response.text


def test_metrics_count_what_happened(server: Running) -> None:
    before = series(server)
    body = server.post(prompt="abc", max_tokens=10, n=3, steps=6, seed=1).json()
    after = series(server)

    def grown(name: str) -> float:
        return after[name] - before[name]

    rows = body["outputs"]
    reason = "stop" if all(row["finish_reason"] == "stop" for row in rows) else "length"
    assert grown(f"prime_request_success_total[('finished_reason', '{reason}'), ('model', 'tiny')]") == 1
    assert grown("prime_row_steps_total[('model', 'tiny')]") == sum(row["nfe"] for row in rows)
    assert grown("prime_row_steps_skipped_total[('model', 'tiny')]") == sum(
        row["steps_skipped"] for row in rows
    )
    assert grown("prime_request_nfe_count[('model', 'tiny')]") == 3
    assert grown("prime_denoiser_calls_total[('model', 'tiny')]") == max(row["nfe"] for row in rows)
    assert grown("prime_step_duration_seconds_count[('model', 'tiny')]") == grown(
        "prime_batch_rows_count[('model', 'tiny')]"
    )
    assert grown("prime_batch_rows_sum[('model', 'tiny')]") == grown(
        "prime_row_steps_total[('model', 'tiny')]"
    )
    assert grown("prime_batch_padding_ratio_count[('model', 'tiny')]") == grown(
        "prime_batch_rows_count[('model', 'tiny')]"
    )
    assert grown("prime_generation_tokens_total[('model', 'tiny')]") == body["usage"]["completion_tokens"]
    assert grown("prime_prompt_tokens_total[('model', 'tiny')]") == 3
    assert grown("prime_e2e_request_latency_seconds_count[('model', 'tiny')]") == 1
    assert grown("prime_request_queue_time_seconds_count[('model', 'tiny')]") == 1
    assert (
        after["prime_num_requests_running[('model', 'tiny')]"]
        == after["prime_num_requests_waiting[('model', 'tiny')]"]
        == 0
    )
    assert (
        after[
            "prime_model_info[('device', 'cpu'), ('dtype', 'float32'), ('kind', 'text'), ('model', 'tiny')]"
        ]
        == 1
    )


def test_nothing_that_a_client_sends_becomes_a_series(server: Running) -> None:
    before = series(server).keys()
    for index in range(10):
        server.client.get(f"/path{index}")
        server.post(model=f"model{index}")
        server.post(**{f"key{index}": 1})
    assert series(server).keys() == before


def test_padding_is_the_share_of_tokens_that_only_fill_a_call_up() -> None:
    metrics = Metrics()
    metrics.call_done("a", 2, 17, 15, 0.1)
    metrics.call_done("a", 1, 128, 0, 0.1)  # full as it is
    labels = {"model": "a"}
    ratio = metrics.registry.get_sample_value("prime_batch_padding_ratio_sum", labels)
    assert ratio == pytest.approx(15 / 32)
    assert metrics.registry.get_sample_value("prime_batch_padding_ratio_count", labels) == 2
