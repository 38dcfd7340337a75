"""Pictures become tokens in channel-major order and come back; a pixel of 24 bits becomes two tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.config import UNetConfig
from prime_core.pixels import PixelCodec


def codec(channels: int = 3, height: int = 4, width: int = 2, **others: Any) -> PixelCodec:
    sizes: dict[str, Any] = {
        "model_channels": 32,
        "channel_mult": (1,),
        "attention_rates": (),
        "head_channels": 32,
    }
    return PixelCodec(UNetConfig(channels=channels, height=height, width=width, **sizes, **others))


def random_pixels(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


class TestPlanes:
    def test_token_index(self) -> None:
        pixels = random_pixels(4, 2, 3)
        x_0 = codec().encode(pixels)
        assert (x_0.shape, x_0.dtype) == ((24,), torch.int64)
        for c in range(3):
            for h in range(4):
                for w in range(2):
                    assert x_0[c * 8 + h * 2 + w] == pixels[h, w, c]

    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
    def test_round_trip(self, channels: int, batch: tuple[int, ...]) -> None:
        pixels = random_pixels(*batch, 4, 2, channels)
        planes = codec(channels)
        assert planes.picture_shape == (4, 2, channels)
        x_0 = planes.encode(pixels)
        assert x_0.shape == (*batch, 8 * channels)
        back = planes.decode(x_0)
        assert back.dtype == torch.uint8
        assert torch.equal(back, pixels)

    def test_other_integers(self) -> None:
        pixels = random_pixels(4, 2, 3)
        for dtype in (torch.int64, torch.int32, torch.int16):
            assert torch.equal(codec().encode(pixels.to(dtype)), codec().encode(pixels))


class TestSuperTokens:
    def test_worked_value(self) -> None:
        packed = codec(2, 1, 1, packing="rgb24")
        assert packed.picture_shape == (1, 1, 3)
        pixels = torch.tensor([[[1, 2, 3]]], dtype=torch.uint8)
        x_0 = packed.encode(pixels)
        assert 1 * 2**16 + 2 * 2**8 + 3 == 66051 == 16 * 4096 + 515
        assert x_0.tolist() == [16, 515]
        assert packed.decode(x_0).tolist() == [[[1, 2, 3]]]

    def test_digits_are_those_of_the_number(self) -> None:
        pixels = random_pixels(7, 4, 2, 3)
        x_0 = codec(2, packing="rgb24").encode(pixels)
        red, green, blue = pixels.long().unbind(-1)
        digits = SubtokenCodec(2**24, 2).encode((red << 16 | green << 8 | blue).flatten(-2))
        assert torch.equal(x_0.unflatten(-1, (2, 8)), digits.movedim(-1, -2))

    def test_round_trip(self) -> None:
        packed = codec(2, packing="rgb24")
        for pixels in (random_pixels(2, 5, 4, 2, 3), torch.full((4, 2, 3), 255, dtype=torch.uint8)):
            x_0 = packed.encode(pixels)
            assert x_0.shape == (*pixels.shape[:-3], 16)
            assert int(x_0.max()) < 4096
            assert torch.equal(packed.decode(x_0), pixels)


class TestRefusals:
    @pytest.mark.parametrize("shape", [(2, 4, 3), (4, 2, 1), (3, 4, 2), (2, 3), ()])
    def test_shape_of_pictures(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"\(height, width, channels\) \(4, 2, 3\), got"):
            codec().encode(torch.zeros(shape, dtype=torch.uint8))

    @pytest.mark.parametrize(
        "pixels", [torch.full((4, 2, 3), 256), torch.full((4, 2, 3), -1), torch.zeros(4, 2, 3)]
    )
    def test_values_of_pixels(self, pixels: Tensor) -> None:
        with pytest.raises(ValueError, match=r"integers in 0\.\.255"):
            codec().encode(pixels)

    @pytest.mark.parametrize("value", [256, -1])
    def test_one_value_among_good_ones(self, value: int) -> None:
        pixels = random_pixels(4, 2, 3).long()
        pixels[2, 1, 0] = value
        with pytest.raises(ValueError, match=r"integers in 0\.\.255"):
            codec().encode(pixels)

    def test_number_of_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"24 tokens, got shape \(2, 23\)"):
            codec().decode(torch.zeros(2, 23, dtype=torch.int64))

    @pytest.mark.parametrize(("packing", "channels", "limit"), [("none", 3, 256), ("rgb24", 2, 4096)])
    def test_values_of_tokens(self, packing: str, channels: int, limit: int) -> None:
        planes = codec(channels, packing=packing)
        x_0 = torch.zeros(8 * channels, dtype=torch.int64)
        assert planes.decode(x_0.index_fill(0, torch.tensor([3]), limit - 1)).numel() == 24
        for value in (limit, -1):
            with pytest.raises(ValueError, match=rf"0\.\.{limit - 1}"):
                planes.decode(x_0.index_fill(0, torch.tensor([3]), value))
