"""PNG files that clients send: what is read of them, and that no small file costs much or breaks the decoder."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from prime_core.pictures import to_png
from server.images.png_chunks import SIGNATURE
from tests.server.image_model import SIDE, image_config, write_image_checkpoint
from tests.server.running import Running, assert_error, serving

PICTURE = np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE, 1) % 16
GOOD = to_png(PICTURE)
PROFILE = b"a\0\0" + zlib.compress(b"\0" * 1_000_000)


def post(server: Running, content: bytes, **body: object) -> httpx.Response:
    png = base64.b64encode(content).decode()
    return server.client.post("/score", json={"png": png, "label": 0, "num_samples": 1, "seed": 1, **body})


def png_of(change: Callable[[Image.Image], Image.Image], **options: Any) -> bytes:
    file = io.BytesIO()
    change(Image.fromarray(PICTURE[..., 0])).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def head_of(side: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))


def bomb() -> bytes:
    """Some kilobytes that claim to be a picture of the right size and unpack to many megabytes."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**27))
    return SIGNATURE + head_of(SIDE) + text + chunk(b"IEND", b"")


def two_heads(side: int) -> bytes:
    """The first head is right, and a decoder obeys the second."""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 2**20))
    return SIGNATURE + head_of(SIDE) + head_of(side) + pixels + chunk(b"IEND", b"")


def with_chunk(kind: bytes, content: bytes, *, before: bytes) -> bytes:
    """A good file with one more chunk."""
    place = GOOD.index(before) - 4
    return GOOD[:place] + chunk(kind, content) + GOOD[place:]


def cut_pixels() -> bytes:
    """A whole chain of chunks whose pixels end too early."""
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * SIDE))
    return SIGNATURE + head_of(SIDE) + pixels + chunk(b"IEND", b"")


def split_pixels() -> bytes:
    """Two runs of pixels with another chunk between them."""
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PICTURE))
    parts = [chunk(b"IDAT", pixels[:9]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", pixels[9:])]
    return SIGNATURE + head_of(SIDE) + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        png_of(lambda image: image.resize((SIDE + 1, SIDE))),
        png_of(lambda image: image.convert("RGB")),
        png_of(lambda image: image.convert("LA")),
        png_of(lambda image: image.convert("P")),
        png_of(lambda image: image.convert("1")),
        png_of(lambda image: image.convert("I;16")),
        png_of(lambda image: image.point(lambda value: value + 1)),
        SIGNATURE + chunk(b"IHDR", b"short") + GOOD[33:],
        with_chunk(b"ABCD", b"", before=b"IDAT"),  # a reader must know it: its first letter is large
        split_pixels(),
        png_of(lambda image: image, transparency=3),
        png_of(lambda image: image, save_all=True, append_images=[Image.new("L", (SIDE, SIDE))]),
        GOOD[: len(GOOD) // 2],
        GOOD[:30],
        GOOD[:8],
        GOOD.replace(b"IDAT", b"IDAX"),
        b"GIF89a" + GOOD[6:],
        bomb(),
        two_heads(13_000),
        two_heads(2**30),
        two_heads(SIDE),
        cut_pixels(),
        GOOD[:-12],
        GOOD.replace(b"IHDR", b"IHDS"),
        with_chunk(b"tEXt", b"a\0b", before=b"IEND").replace(b"IEND", b"IDAT"),
        with_chunk(b"teXt", b"", before=b"IDAT").replace(b"teXt", b"tEXt"),
        SIGNATURE + head_of(SIDE) + chunk(b"IEND", b""),
        SIGNATURE + GOOD[33:],
        SIGNATURE,
    ],
    ids=[
        "size",
        "rgb",
        "alpha",
        "palette",
        "bits",
        "16",
        "values",
        "short head",
        "critical chunk",
        "split pixels",
        "key",
        "apng",
        "half",
        "30",
        "8",
        "chunk",
        "gif",
        "bomb",
        "second head",
        "huge second head",
        "equal second head",
        "cut pixels",
        "no end",
        "no head",
        "no end mark",
        "checksum",
        "no pixels",
        "first head missing",
        "signature",
    ],
)
def test_files_that_are_no_picture_of_the_model(both: Running, content: bytes) -> None:
    assert_error(post(both, content), 422, "invalid_value", "png")


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"iCCP", b""),
        (b"iCCP", b"\0"),
        (b"iCCP", PROFILE),
        (b"zTXt", PROFILE),
        (b"pHYs", b"\0"),
        (b"PLTE", b"\0" * 3),
    ],
)
def test_chunks_beside_the_pixels_are_not_even_looked_at(
    both: Running, monkeypatch: pytest.MonkeyPatch, kind: bytes, content: bytes, before: bytes
) -> None:
    monkeypatch.setattr("PIL.PngImagePlugin._safe_zlib_decompress", lambda packed: 1 / 0)
    decorated = post(both, with_chunk(kind, content, before=before))
    assert decorated.json()["scores"] == post(both, GOOD).json()["scores"]


def test_nothing_is_unpacked_where_the_decoder_sees_another_picture_than_the_head(
    both: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Image.new("L", (SIDE + 1, SIDE))
    monkeypatch.setattr(other, "load", lambda: pytest.fail("it was unpacked"))
    monkeypatch.setattr("server.images.given_picture.Image.open", lambda file, formats: other)
    assert_error(post(both, GOOD), 422, "invalid_value", "png")


def test_whatever_a_decoder_raises_is_the_fault_of_the_file(
    both: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.images.given_picture.Image.open", lambda file, formats: [][0])
    assert_error(post(both, GOOD), 422, "invalid_value", "png")


def test_the_size_is_told_in_good_words(both: Running) -> None:
    content = png_of(lambda image: image.resize((SIDE + 1, SIDE)))
    message = assert_error(post(both, content), 422, "invalid_value", "png")
    assert f"{SIDE} x {SIDE} pixels (width x height) with 1 channel of 8 bits" in message


def test_a_coloured_picture_that_is_no_square_is_read_as_its_lists_are(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 16, (8, 4, 3), dtype=np.uint8)
    path = write_image_checkpoint(tmp_path, image_config(channels=3, height=8, width=4, model_channels=96))
    with serving(path) as server:
        fields = {"label": 0, "num_samples": 1, "seed": 1, "per_token": True}
        listed = server.client.post("/score", json={"pixels": picture.tolist(), **fields})
        (found,) = post(server, to_png(picture), per_token=True).json()["scores"]
        assert listed.json()["scores"] == [found]
        assert found["per_token"]["token_ids"] == np.moveaxis(picture, -1, 0).flatten().tolist()
        turned = to_png(picture.transpose(1, 0, 2))
        message = assert_error(post(server, turned), 422, "invalid_value", "png")
        assert "4 x 8 pixels (width x height) with 3 channels of 8 bits" in message
        made = server.client.post("/v1/images/generations", json={"prompt": "", "steps": 1}).json()
        assert made["size"] == "4x8"
        assert Image.open(io.BytesIO(base64.b64decode(made["data"][0]["b64_json"]))).size == (4, 8)


def test_channels_that_png_does_not_have_come_as_lists(tmp_path: Path) -> None:
    with serving(write_image_checkpoint(tmp_path, image_config(channels=2))) as server:
        message = assert_error(post(server, GOOD), 422, "invalid_value", "png")
        assert message == "a PNG file cannot hold 2 channels; give pixels"
