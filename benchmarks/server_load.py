"""`prime-bench server`: throughput and latency of a server under mixed requests for text, images and scores."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any, Literal, Self

import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import Field, field_validator, model_validator

from benchmarks.document import document_head
from benchmarks.load_client import Answer, LoadRequest, Mix, closed_loop, get, mixed_requests, open_loop
from benchmarks.machine import describe_machine
from benchmarks.server_process import check_loopback, own_server
from benchmarks.settings import BenchSettings, Log, computing_threads

# Bounds of the histogram's cells in seconds, two to an octave; the last cell is open.
LATENCY_BOUNDS_S = tuple(round(0.001 * 2 ** (k / 2), 6) for k in range(34))
PERCENTILES = (50, 90, 95, 99)
# The open loop's rate where none is given, as a share of what the closed loop reached.
OPEN_LOAD = 0.7
# Settings that a server which runs already has chosen for itself.
OF_OWN_SERVER = frozenset({"device", "num_threads", "max_batch_rows"})


class ServerSettings(BenchSettings):
    """A load test, bounded in requests and in time."""

    url: str | None = Field(
        default=None, description="server on this machine's loopback interface; default: one of its own"
    )
    loop: Literal["closed", "open", "both"] = Field(default="both", description="closed, open or both")
    requests: int = Field(default=64, ge=1, le=100_000, description="requests of each loop")
    limit_s: float = Field(default=60, gt=0, le=3600, description="seconds after which a loop sends no more")
    timeout_s: float = Field(default=60, gt=0, le=3600, description="seconds to wait for an answer")
    clients: int = Field(default=8, ge=1, le=256, description="clients of the closed loop")
    rate: float | None = Field(
        default=None,
        gt=0,
        le=10_000,
        description=f"arrivals a second of the open loop; default: {OPEN_LOAD} of the closed loop's answers a second",
    )
    image_share: float = Field(default=0.2, ge=0, le=1, description="share of requests that are for images")
    score_share: float = Field(default=0.1, ge=0, le=1, description="share of requests that are for scores")
    stream_share: float = Field(
        default=0.25, ge=0, le=1, description="share of streams in the requests for text and images"
    )
    max_tokens: int = Field(
        default=64,
        ge=1,
        le=1024,
        description="tokens of a text request: drawn from a quarter of this to this",
    )
    text_steps: int = Field(default=32, ge=1, le=4096, description="steps of a text request")
    image_steps: int = Field(default=32, ge=1, le=4096, description="steps of an image request")
    score_samples: int = Field(default=16, ge=1, le=1024, description="denoiser calls of a score")
    max_batch_rows: int = Field(
        default=32, ge=1, le=512, description="its own server: most rows in one denoiser call"
    )

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if (shares := self.image_share + self.score_share) > 1:
            raise ValueError(f"image_share and score_share must be at most 1 together, got {shares:g}")
        return self

    @field_validator("url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        return None if value is None else check_loopback(value)

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.loop == "open" and self.rate is None:
            raise ValueError("--loop open needs a --rate: there is no closed loop to take it from")
        if self.url is not None and (given := sorted(OF_OWN_SERVER & self.model_fields_set)):
            flag = given[0].replace("_", "-")
            raise ValueError(f"--{flag} is for a server of the benchmark's own; with --url leave it out")
        return self


def run_server_load(settings: ServerSettings, log: Log) -> dict[str, Any]:
    """Load a server and read what it says of itself.

    Args:
        settings: how much of what.
        log: takes progress lines.

    Returns:
        The JSON document described in benchmarks/README.md, without `command`.

    Raises:
        RuntimeError: if the server does not start, is not ready, or answered no request of a loop.
    """
    with computing_threads(settings.num_threads):  # as the server will
        document = document_head("server", settings)
    flags = ["--device", settings.device, "--max-batch-rows", str(settings.max_batch_rows)]
    if settings.num_threads is not None:
        flags += ["--num-threads", str(settings.num_threads)]
    log("starting a server" if settings.url is None else f"using {settings.url}")
    server = own_server(flags) if settings.url is None else nullcontext(settings.url)
    with server as url:
        get(url, "/ready")
        info = json.loads(get(url, "/info"))
        if settings.url is not None:
            device = torch.device(info["models"][0]["device"])
            document["machine"] = describe_machine(device) | {"num_threads": None}  # it does not tell
        loops: list[dict[str, Any]] = []
        if settings.loop in ("closed", "both"):
            loops.append(_closed(settings, url, log))
        if settings.loop in ("open", "both"):
            rate = OPEN_LOAD * loops[0]["requests_per_s"] if settings.rate is None else settings.rate
            loops.append(_open(settings, url, rate, log))
    models = [{key: model[key] for key in ("name", "kind", "num_parameters", "dtype", "device")}
              for model in info["models"]]  # fmt: skip
    return document | {"models": models, "server_limits": info["limits"], "loops": loops}


def _closed(settings: ServerSettings, url: str, log: Log) -> dict[str, Any]:
    log(f"closed loop: {settings.requests} requests of {settings.clients} clients")
    before = read_metrics(url)
    answers, seconds = closed_loop(
        url,
        _requests(settings),
        num_clients=settings.clients,
        limit_s=settings.limit_s,
        timeout_s=settings.timeout_s,
    )
    head = {"loop": "closed", "clients": settings.clients, "rate_per_s": None}
    return head | summarise(answers, seconds) | server_figures(before, read_metrics(url))


def _open(settings: ServerSettings, url: str, rate: float, log: Log) -> dict[str, Any]:
    log(f"open loop: {settings.requests} requests, {rate:.2f} a second")
    before = read_metrics(url)
    answers, seconds = open_loop(
        url,
        _requests(settings),
        rate_per_s=rate,
        seed=settings.seed,
        limit_s=settings.limit_s,
        timeout_s=settings.timeout_s,
    )
    head = {"loop": "open", "clients": None, "rate_per_s": rate}
    return head | summarise(answers, seconds) | server_figures(before, read_metrics(url))


def _requests(settings: ServerSettings) -> list[LoadRequest]:
    mix = Mix(
        image_share=settings.image_share,
        score_share=settings.score_share,
        stream_share=settings.stream_share,
        max_tokens=settings.max_tokens,
        text_steps=settings.text_steps,
        image_steps=settings.image_steps,
        score_samples=settings.score_samples,
    )
    return mixed_requests(settings.requests, settings.seed, mix)


def summarise(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Return throughput and latencies of the answers of one loop.

    Raises:
        RuntimeError: if none of them is a sample.
    """
    good = [answer for answer in answers if answer.status == 200]
    if not good:
        raise RuntimeError(f"no request was answered; statuses {sorted({a.status for a in answers})}")
    kinds = sorted({answer.kind for answer in good})
    return {
        "seconds": seconds,
        "num_sent": len(answers),
        "num_answered": len(good),
        "num_refused": sum(answer.status == 429 for answer in answers),
        "num_failed": sum(answer.status not in (200, 429) for answer in answers),
        "requests_per_s": len(good) / seconds,
        "text_tokens_per_s": sum(answer.num_tokens for answer in good) / seconds,
        "images_per_s": sum(answer.num_images for answer in good) / seconds,
        "scores_per_s": sum(answer.num_scores for answer in good) / seconds,
        "latency": {
            "all": latency_figures([answer.latency_s for answer in good]),
            **{kind: latency_figures([a.latency_s for a in good if a.kind == kind]) for kind in kinds},
        },
    }


def latency_figures(latencies_s: list[float]) -> dict[str, Any]:
    """Return mean, percentiles (nearest rank), maximum and histogram of latencies in seconds.

    ``counts[i]`` is how many lie above bound i - 1 and at or below bound i of ``bounds_s``; the last count has no
    upper bound.
    """
    ordered = sorted(latencies_s)
    counts = [0] * (len(LATENCY_BOUNDS_S) + 1)
    for latency in ordered:
        counts[sum(bound < latency for bound in LATENCY_BOUNDS_S)] += 1
    return {
        "num": len(ordered),
        "mean_s": sum(ordered) / len(ordered),
        **{f"p{p}_s": ordered[-(-p * len(ordered) // 100) - 1] for p in PERCENTILES},
        "max_s": ordered[-1],
        "bounds_s": list(LATENCY_BOUNDS_S),
        "counts": counts,
    }


def read_metrics(url: str) -> dict[tuple[str, str], float]:
    """Return the server's counters: (name, reason) to the sum over models; the reason is "" for most."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(get(url, "/metrics").decode()):
        for sample in family.samples:
            if sample.name.endswith(("_total", "_sum", "_count")):
                key = sample.name, sample.labels.get("reason", "")
                found[key] = found.get(key, 0.0) + sample.value
    return found


def server_figures(
    before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]
) -> dict[str, Any]:
    """Return what a server counted between two readings of its metrics.

    ``useful_row_fraction``: the share of the tokens of all calls that belong to rows of requests, each of which has
    something to reveal or to score in that call; the others only fill a call up to one of a few sizes.
    """

    def grown(name: str, reason: str = "") -> float:
        return after.get((name, reason), 0.0) - before.get((name, reason), 0.0)

    calls, rows = grown("prime_denoiser_calls_total"), grown("prime_row_steps_total")
    skipped = grown("prime_row_steps_skipped_total")
    tokens, filling = grown("prime_call_tokens_total"), grown("prime_call_filling_tokens_total")
    reasons = sorted({reason for name, reason in after if name == "prime_rejected_total"})
    return {
        "denoiser_calls": calls,
        "row_steps": rows,
        "rows_per_call": rows / calls if calls else None,
        "skipped_step_share": skipped / (skipped + rows) if skipped + rows else None,
        "useful_row_fraction": tokens / (tokens + filling) if tokens else None,
        "rejected": {reason: grown("prime_rejected_total", reason) for reason in reasons},
    }
