"""What is counted of answers: their time, their tokens and why they end, the same as they say themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.noise import row_seed
from prime_core.checkpoint import load_checkpoint, save_checkpoint
from prime_core.config import CodecConfig
from prime_core.models.build import build_denoiser
from tests.server.image_model import NAME as IMAGES
from tests.server.running import NAME, Running, serving


def sum_of(server: Running, name: str, model: str) -> float:
    value = server.engine.metrics.registry.get_sample_value(f"prime_{name}", {"model": model})
    assert value is not None, name
    return value


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/generate", {"max_tokens": 4, "steps": 3}, NAME),
        ("/images", {"steps": 3}, IMAGES),
        ("/score", {"text": "ab"}, NAME),
    ],
)
def test_times_are_those_of_the_answer(both: Running, path: str, body: dict[str, Any], model: str) -> None:
    names = ("e2e_request_latency_seconds_sum", "request_queue_time_seconds_sum")
    before = [sum_of(both, name, model) for name in names]
    timings = both.client.post(path, json=body).json()["timings"]
    grown = [sum_of(both, name, model) - old for name, old in zip(names, before, strict=True)]
    assert grown == pytest.approx([timings["total_s"], timings["queue_s"]], abs=1e-9)
    assert timings["total_s"] > timings["queue_s"] > 0


@pytest.mark.parametrize(
    ("path", "body", "model"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 4, "steps": 3}, NAME),
        ("/v1/images/generations", {"prompt": "", "steps": 3}, IMAGES),
        ("/images", {"steps": 3, "response_format": "png"}, IMAGES),
    ],
)
def test_times_are_counted_of_answers_that_do_not_tell_them(
    both: Running, path: str, body: dict[str, Any], model: str
) -> None:
    names = ("e2e_request_latency_seconds_sum", "request_queue_time_seconds_sum")
    before = [sum_of(both, name, model) for name in names]
    response = both.client.post(path, json=body)
    assert response.status_code == 200
    total_s, queue_s = (sum_of(both, name, model) - old for name, old in zip(names, before, strict=True))
    assert response.elapsed.total_seconds() > total_s > queue_s > 0


def test_an_answer_ends_with_stop_when_all_its_outputs_do(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 12, "n": 8, "seed": 3, "steps": 6}
    gaps = [output["gaps"][0] for output in server.post(**body).json()["outputs"]]
    letter = next(
        letter for letter in "".join(gaps) if letter.isascii() and not all(letter in gap for gap in gaps)
    )

    def counted(**fields: Any) -> tuple[set[str], list[float]]:
        reasons = ("stop", "length")
        before = [server.metric("prime_request_success_total", finished_reason=each) for each in reasons]
        outputs = server.post(**body, **fields).json()["outputs"]
        after = [server.metric("prime_request_success_total", finished_reason=each) for each in reasons]
        grown = [new - old for new, old in zip(after, before, strict=True)]
        return {output["finish_reason"] for output in outputs}, grown

    assert counted(stop=[letter]) == ({"stop", "length"}, [0, 1])
    characters = sorted({gap[0] for gap in gaps})
    assert len(characters) <= 8
    assert counted(stop=characters) == ({"stop"}, [1, 0])


def test_the_usage_of_several_prompts_is_that_of_all(server: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 6, "steps": 4, "n": 2}
    prompts = ["a", "bcd", "ef"]
    response = server.client.post("/v1/completions", json={**body, "prompt": prompts, "seed": 7})
    alone = [
        server.post(**body, prompt=prompt, seed=row_seed(7, 2 * number)).json()["usage"]
        for number, prompt in enumerate(prompts)
    ]
    total = {name: sum(usage[name] for usage in alone) for name in alone[0]}
    assert total["prompt_tokens"] == 6
    assert response.headers["x-nfe"] == str(total.pop("denoiser_calls"))
    assert response.json()["usage"] == total


def test_the_usage_of_several_inputs_is_that_of_all(server: Running) -> None:
    body = {"inputs": ["a", "bcd", [1, 2]], "num_samples": 3}
    answer = server.client.post("/score", json=body).json()
    assert answer["usage"] == {"inputs": 3, "total_tokens": 6, "denoiser_calls": 9}


def test_the_coded_loss_of_one_digit_a_token_is_the_bound(model_path: Path, tmp_path: Path) -> None:
    told = load_checkpoint(model_path)
    config = told.config.model_copy(update={"codec": CodecConfig(vocab_size=257, target_length=1)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build_denoiser(config).state_dict()
    save_checkpoint(tmp_path / NAME, config, state, tokenizer_file=model_path / "bytes.tiktoken")
    with serving(tmp_path / NAME) as server:
        (found,) = server.client.post("/score", json={"text": "abc", "num_samples": 4}).json()["scores"]
        assert found["coded_loss"]["is_bound"] is True
        assert found["coded_loss"]["note"] == "one digit a token: equal to nelbo"
        assert found["coded_loss"]["nats"] == pytest.approx(found["nelbo"]["nats"])
