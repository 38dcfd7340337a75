"""POST /generate through real sockets: what it answers, and that neighbours change nothing."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.sample import sample
from tests.server.running import CONTEXT, Running, assert_error


def outputs(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    result: list[dict[str, Any]] = response.json()["outputs"]
    return result


def test_prompt_is_continued_and_accounted_for(server: Running) -> None:
    response = server.post(prompt="héllo", max_tokens=9, n=3, steps=12, seed=5)
    rows = outputs(response)
    body = response.json()
    assert body["model"] == "tiny"
    assert body["id"] == response.headers["x-request-id"]
    assert len(rows) == 3
    assert len({row["seed"] for row in rows}) == 3
    assert rows[0]["seed"] == 5
    for row in rows:
        assert row["text"] == "héllo" + "".join(row["gaps"])
        assert row["token_ids"][:6] == list("héllo".encode())
        assert row["steps"] == 12
        assert 1 <= row["nfe"] <= 12
        assert row["steps_skipped"] == 12 - row["nfe"]
    generated = sum(len(row["token_ids"]) - 6 for row in rows)
    assert body["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": generated,
        "total_tokens": 6 + generated,
        "denoiser_calls": sum(row["nfe"] for row in rows),
    }
    timings = body["timings"]
    assert timings["run_s"] > 0
    assert timings["queue_s"] >= 0
    assert timings["total_s"] >= timings["queue_s"] + timings["run_s"]


def test_answer_is_what_the_python_door_gives(server: Running) -> None:
    request: dict[str, Any] = {
        "prompt": "ab",
        "max_tokens": 20,
        "n": 2,
        "steps": 7,
        "seed": 2**64 - 1,
        "top_k": 40,
        "temperature": 0.7,
    }
    checkpoint = load_checkpoint(server.settings.model[0].path, dtype="float32")
    expected = sample(checkpoint, **request)
    assert [row["text"] for row in outputs(server.post(**request))] == [item.text for item in expected]


def test_each_output_is_reproduced_alone_by_its_seed(server: Running) -> None:
    request = {"prompt": "x", "max_tokens": 15, "steps": 9}
    for row in outputs(server.post(**request, n=4)):
        again = outputs(server.post(**request, seed=row["seed"]))
        assert again == [row]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_extreme_seeds_reproduce(server: Running, seed: int) -> None:
    first, second = (outputs(server.post(max_tokens=8, seed=seed)) for _ in range(2))
    assert first == second
    assert first[0]["seed"] == seed


def test_fixed_ends_and_templates_stay_intact(server: Running) -> None:
    prompt, suffix = "\ufeffهذا \u202e e\u0301\x00", " 👩\u200d🚀 end"
    row = outputs(server.post(prompt=prompt, suffix=suffix, max_tokens=5))[0]
    assert row["text"].startswith(prompt)
    assert row["text"].endswith(suffix)
    template = ["Dear ", {"gap": 3}, ", ", {"gap": 4}, "."]
    row = outputs(server.post(template=template, steps="exact"))[0]
    assert row["text"] == "Dear " + row["gaps"][0] + ", " + row["gaps"][1] + "."
    assert (row["steps"], row["nfe"], row["steps_skipped"]) == ("exact", 14, 0)
    assert len(row["token_ids"]) == 5 + 3 + 2 + 4 + 1


def test_no_prompt_fills_the_context_and_ids_are_a_prompt(server: Running) -> None:
    row = outputs(server.post(steps=2, template=None, prompt=None))[0]
    assert row["nfe"] <= 2
    assert len(row["token_ids"]) <= CONTEXT
    row = outputs(server.post(prompt=[104, 105], max_tokens=2))[0]
    assert row["text"].startswith("hi")


def test_stop_string_ends_the_text(server: Running) -> None:
    for seed in range(100):  # random weights seldom write ASCII
        free = outputs(server.post(prompt="q", max_tokens=30, seed=seed))[0]
        letters = [char for char in free["gaps"][0] if char.isascii()]
        if letters:
            break
    stop = letters[len(letters) // 2]
    row = outputs(server.post(prompt="q", max_tokens=30, seed=seed, stop=[stop]))[0]
    assert row["finish_reason"] == "stop"
    assert row["text"] == "q" + free["gaps"][0].split(stop)[0]
    alone = server.post(prompt="q", max_tokens=30, seed=seed, stop=stop)  # as in /v1/completions
    assert outputs(alone) == [row]


def test_an_empty_list_of_token_ids_is_no_prompt_on_either_route(server: Running) -> None:
    for path in ("/generate", "/v1/completions"):
        answer = server.client.post(path, json={"prompt": [], "max_tokens": 1})
        assert "a list of 1 to " in assert_error(answer, 422, "invalid_value", "prompt")


def test_same_seed_gives_the_same_text_alone_and_among_thirty_others(server: Running) -> None:
    rng = random.Random(0)
    ours = {"prompt": "In the beginning", "max_tokens": 30, "steps": 24, "seed": 11, "n": 2, "top_p": 0.9}
    others: list[dict[str, Any]] = [
        {
            "prompt": "p" * rng.randrange(20),
            "max_tokens": rng.randrange(1, CONTEXT - 20),
            "steps": rng.choice([1, 3, 17, 60, "exact"]),
            "temperature": rng.choice([0, 0.5, 1.0, 2]),
            "top_k": rng.choice([0, 1, 5]),
            "top_p": rng.choice([1.0, 0.5]),
            "n": rng.randrange(1, 4),
            "seed": rng.randrange(2**64),
        }
        for _ in range(30)
    ]
    alone = [outputs(server.post(**request)) for request in [ours, *others[:4]]]

    async def together() -> list[list[dict[str, Any]]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            replies = await asyncio.gather(
                *(client.post("/generate", json=request) for request in [*others[:15], ours, *others[15:]])
            )
        return [outputs(reply) for reply in replies]

    server.denoiser.lengths.clear()
    crowd = asyncio.run(together())
    assert any(len(set(lengths)) > 5 for lengths in server.denoiser.lengths), "the calls were not shared"
    assert crowd[15] == alone[0]
    assert crowd[:4] == alone[1:]


def test_model_names(server: Running) -> None:
    assert outputs(server.post(model="tiny", max_tokens=1))
    for name in ["other", "../tiny", "%2e%2e/tiny", "/etc/passwd", "x" * 300, "tiny\n", ""]:
        message = assert_error(server.post(model=name, max_tokens=1), 404, "model_not_found", "model")
        assert message == "there is no such model; loaded: tiny"


def test_openapi_describes_the_request_with_its_limits(server: Running) -> None:
    document = server.client.get("/openapi.json").json()
    operation = document["paths"]["/generate"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"]["maximum"] == 16
    assert "$defs" not in schema
    assert "#/$defs" not in str(document)
    assert schema["properties"]["steps"]["description"] == 'an integer from 1 to 4096, or "exact"'
    assert "GenerateResponse" in str(operation["responses"]["200"])
    assert "ErrorBody" in str(operation["responses"]["422"])


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_an_empty_suffix_is_as_none(server: Running, path: str) -> None:
    """With it a stop string was refused, and an end of text did not end anything."""
    ended = 0
    for seed in range(6):
        body = {"prompt": "ab", "max_tokens": 40, "steps": 8, "seed": seed, "stop": ["a", "e"]}
        plain, empty = (server.client.post(path, json=each) for each in (body, {**body, "suffix": ""}))
        assert plain.status_code == empty.status_code == 200
        key = "outputs" if path == "/generate" else "choices"
        assert empty.json()[key] == plain.json()[key]
        ended += plain.json()[key][0]["finish_reason"] == "stop"
        assert empty.json()["usage"] == plain.json()["usage"]
    assert ended
