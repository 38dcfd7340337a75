"""POST and GET /images through real sockets: every format decoded, and that neighbours change nothing."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prime_core.checkpoint import load_checkpoint
from prime_core.pictures import to_grid
from prime_core.sampling.presets import PRESETS
from prime_core.sampling.request import fill_in_preset
from prime_core.sampling.sample import sample
from tests.server.image_model import LABELS, LENGTH, SIDE
from tests.server.image_model import NAME as IMAGES
from tests.server.running import Running

CHROME = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


def post(server: Running, accept: str = "*/*", **body: object) -> httpx.Response:
    response = server.client.post("/images", json=body, headers={"accept": accept})
    assert response.status_code == 200, response.text
    return response


def get(server: Running, accept: str = "*/*", **query: Any) -> httpx.Response:
    response = server.client.get("/images", params=query, headers={"accept": accept})
    assert response.status_code == 200, response.text
    return response


def images(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/json"
    result: list[dict[str, Any]] = response.json()["images"]
    return result


def pixels_of(content: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(content))
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)[..., None]


def decoded(response: httpx.Response) -> NDArray[np.uint8]:
    """The pictures (n, H, W, C) of a JSON answer."""
    return np.stack([pixels_of(base64.b64decode(image["b64_json"])) for image in images(response)])


def expected_pixels(server: Running, **request: Any) -> NDArray[np.uint8]:
    """What the Python door gives."""
    checkpoint = load_checkpoint(server.settings.model[1].path, dtype="float32")
    return np.stack([item.pixels.numpy() for item in sample(checkpoint, **request)])


def test_json_holds_the_images_of_the_python_door_and_what_they_took(both: Running) -> None:
    request: dict[str, Any] = {"n": 3, "steps": 12, "seed": 5, "temperature": 0.8, "top_k": 9, "label": 1}
    response = post(both, **request)
    body = response.json()
    assert body["model"] == IMAGES
    assert body["id"] == response.headers["x-request-id"]
    rows = images(response)
    assert np.array_equal(decoded(response), expected_pixels(both, **request))
    assert len({row["seed"] for row in rows}) == 3
    assert rows[0]["seed"] == 5
    for row in rows:
        assert (row["label"], row["label_name"], row["steps"]) == (1, "dog", 12)
        assert 1 <= row["nfe"] <= 12
        assert row["steps_skipped"] == 12 - row["nfe"]
    assert body["usage"] == {"images": 3, "denoiser_calls": sum(row["nfe"] for row in rows)}
    timings = body["timings"]
    assert timings["total_s"] >= timings["queue_s"] + timings["run_s"] > 0


def test_every_format_holds_the_same_pixels(both: Running) -> None:
    request: dict[str, Any] = {"n": 5, "steps": 8, "seed": 3}
    json = post(both, **request)
    pictures = decoded(json)
    assert pictures.shape == (5, SIDE, SIDE, 1)
    nfe = str(json.json()["usage"]["denoiser_calls"])

    npy = post(both, **request, response_format="npy")
    assert npy.headers["content-type"] == "application/octet-stream"
    assert np.array_equal(np.load(io.BytesIO(npy.content), allow_pickle=False), pictures)

    grid = post(both, **request, response_format="grid")
    assert grid.headers["content-type"] == "image/png"
    assert np.array_equal(pixels_of(grid.content), to_grid(pictures))

    for response in (npy, grid):
        assert (response.headers["x-seed"], response.headers["x-nfe"]) == ("3", nfe)
        assert response.headers["x-request-id"].startswith("req-")

    png = post(both, **{**request, "n": 1}, response_format="png")
    assert png.headers["content-type"] == "image/png"
    assert np.array_equal(pixels_of(png.content), pictures[0])
    assert png.content == base64.b64decode(images(json)[0]["b64_json"])


@pytest.mark.parametrize(
    ("accept", "posted", "got"),
    [
        ("*/*", "json", "png"),
        (CHROME, "json", "png"),
        ("image/png", "png", "png"),
        ("image/avif,image/webp,image/*,*/*;q=0.8", "png", "png"),
        ("application/json", "json", "json"),
        ("application/json, image/png;q=0.5", "json", "json"),
        ("text/html", "json", "png"),
    ],
)
def test_accept_decides_where_the_format_is_not_given(
    both: Running, accept: str, posted: str, got: str
) -> None:
    kinds = {"json": "application/json", "png": "image/png"}
    assert post(both, accept, steps=2).headers["content-type"] == kinds[posted]
    assert get(both, accept, steps=2).headers["content-type"] == kinds[got]
    assert post(both, accept, steps=2, response_format=None).headers["content-type"] == kinds[posted]
    fixed = post(both, accept, steps=2, response_format="npy")
    assert fixed.headers["content-type"] == "application/octet-stream"
    assert (fixed.headers["vary"], fixed.headers["cache-control"]) == ("Accept", "no-store")


def test_a_browser_gets_one_picture_or_a_grid(both: Running) -> None:
    one = get(both, n=1, steps=6, seed=2, label="cat", temperature=0.5, top_p=0.9, model=IMAGES)
    posted = post(both, steps=6, seed=2, label=0, temperature=0.5, top_p=0.9, response_format="png")
    assert one.content == posted.content
    many = get(both, "image/*", n=16, label=2, seed=1, steps=6)
    assert pixels_of(many.content).shape == (4 * 10 - 2, 4 * 10 - 2, 1)
    assert many.content == get(both, n=16, label="T-shirt/top", seed=1, steps=6).content
    assert get(both, steps="exact", seed=1).headers["x-nfe"] == str(2 * LENGTH)
    assert get(both, n=16, label="2", seed=1, steps=6).content == many.content
    assert len(images(get(both, "application/json", n=2, steps=3))) == 2
    assert both.client.get("/images").headers["x-seed"].isdigit()  # nothing needs to be given


def test_each_image_is_reproduced_alone_by_its_seed(both: Running) -> None:
    request = {"steps": 9, "corrector": {"kind": "corrected", "scale": 4, "power": 1, "final_power": 0.5}}
    for row in images(post(both, **request, n=3)):
        assert images(post(both, **request, seed=row["seed"])) == [row]


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_extreme_seeds_reproduce(both: Running, seed: int) -> None:
    first, second = (post(both, steps=3, seed=seed, response_format="png") for _ in range(2))
    assert first.content == second.content
    assert first.headers["x-seed"] == str(seed)
    assert get(both, steps=3, seed=seed).content == first.content


def test_labels_by_number_by_name_and_drawn(both: Running) -> None:
    by_number, by_name = (images(post(both, seed=1, steps=6, label=label)) for label in (2, LABELS[2]))
    assert by_number == by_name
    drawn = images(post(both, seed=1, steps=2, n=16))
    assert {row["label"] for row in drawn} == {0, 1, 2}
    for response_format in ("grid", "npy"):
        told = post(both, seed=1, steps=2, n=16, response_format=response_format).headers["x-labels"]
        assert told == ",".join(str(row["label"]) for row in drawn)
    assert "x-labels" not in post(both, seed=1, steps=2).headers
    assert all(row["label_name"] == LABELS[row["label"]] for row in drawn)


def test_known_pixels_stay_and_the_rest_is_sampled(both: Running) -> None:
    pixels: list[list[int | None]] = [
        [(x * y) % 16 if x < 3 else None for x in range(SIDE)] for y in range(SIDE)
    ]
    pictures = decoded(post(both, n=4, steps=20, seed=1, known={"pixels": pixels}))
    fixed = np.array([[-1 if value is None else value for value in row] for row in pixels])
    for picture in pictures:
        assert np.array_equal(picture[fixed >= 0, 0], fixed[fixed >= 0])
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_known_digits_stay_and_all_known_costs_nothing(both: Running) -> None:
    high_digits: list[Any] = [[[[(x + y) % 4, None]] for x in range(SIDE)] for y in range(SIDE)]
    response = post(both, n=2, steps=20, seed=1, known={"digits": high_digits})
    rows, columns = np.indices((SIDE, SIDE))
    for picture in decoded(response):
        assert np.array_equal(picture[..., 0] // 4, (rows + columns) % 4)
    (row,) = images(post(both, known={"pixels": [[7] * SIDE] * SIDE}))
    assert (row["nfe"], row["steps_skipped"]) == (0, 64)


def test_presets_are_what_they_say_and_given_fields_come_first(both: Running) -> None:
    name = "cifar10-l2-512"
    published = fill_in_preset({"preset": name})
    alone = post(both, preset=name, seed=4)
    assert np.array_equal(decoded(alone), expected_pixels(both, seed=4, **published))
    assert images(alone)[0]["steps"] == PRESETS[name].steps
    body = {"preset": name, "seed": 4, "steps": 10, "corrector": None, "sampler": "ancestral"}
    expected = expected_pixels(
        both, seed=4, **{**published, "steps": 10, "corrector": None, "sampler": "ancestral"}
    )
    assert np.array_equal(decoded(post(both, **body)), expected)
    assert get(both, preset=name, steps=10, seed=4).status_code == 200
    described = next(model for model in both.client.get("/info").json()["models"] if model["name"] == IMAGES)
    told = described["presets"][name]
    assert (told["steps"], told["published_fid"]) == (512, 3.26)
    assert told["note"].startswith("Published in full.")


def test_every_sampler_setting_reaches_the_sampler(both: Running) -> None:
    base: dict[str, Any] = {"steps": 12, "seed": 6, "label": 0}
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": {"scale": -0.5, "power": 2, "offset": 1}},
        {"sampler": "published"},
        {"warp": {"scale": 1, "power": 1.7, "offset": 0}},
        {"corrector": {"kind": "published", "scale": 16, "power": 2}},
        {"corrector": {"kind": "corrected", "scale": 16, "power": 2, "final_power": 0.75}},
        {"top_p": 0.3},
        {"top_k": 2},
        {"temperature": 0},
        {"label": 1},
        {"steps": "exact"},
    ]
    answers = [post(both, **{**base, **changes}, response_format="npy").content for changes in settings]
    assert len(set(answers)) == len(answers)


def test_same_seed_gives_the_same_bytes_alone_and_in_a_crowd_of_text_and_images(both: Running) -> None:
    rng = random.Random(0)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/images", {"n": rng.randrange(1, 4), "steps": rng.choice([1, 5, 30]), "response_format": "npy"})
        for _ in range(8)
    ]
    bodies += [("/images", {"preset": "cifar10-l2-512", "steps": 20, "n": 2, "response_format": "grid"})]
    bodies += [("/images", {"steps": 40, "response_format": "png", "sampler": "published"})]
    bodies += [
        ("/generate", {"max_tokens": rng.randrange(1, 40), "steps": rng.choice([1, 9, 40]), "n": 2})
        for _ in range(10)
    ]
    for index, (_, body) in enumerate(bodies):
        body["seed"] = 1000 + index
    rng.shuffle(bodies)

    def outcome(response: httpx.Response) -> object:
        assert response.status_code == 200, response.text
        is_json = response.headers["content-type"] == "application/json"
        return response.json()["outputs"] if is_json else response.content

    alone = [outcome(both.client.post(path, json=body)) for path, body in bodies]

    async def together() -> list[object]:
        async with httpx.AsyncClient(base_url=both.url, timeout=60) as client:
            replies = await asyncio.gather(*(client.post(path, json=body) for path, body in bodies))
        return [outcome(reply) for reply in replies]

    for name in both.engine.queues:
        both.denoiser_of(name).lengths.clear()
    assert asyncio.run(together()) == alone
    for name in both.engine.queues:
        assert any(len(lengths) > 2 for lengths in both.denoiser_of(name).lengths), "calls were not shared"
