"""Rows in the middle of sampling, as text and as pictures."""

from __future__ import annotations

import torch

from prime_core.codec import SubtokenCodec
from prime_core.config import UNetConfig
from prime_core.pixels import PixelCodec
from prime_core.sampling.provisional import UNKNOWN, provisional_pixels, provisional_text
from tests.stubs import byte_tokenizer


def test_text_shows_what_is_known_and_tells_how_much_of_each_token_is() -> None:
    codec = SubtokenCodec(257, 2)  # base 17
    y = codec.encode(torch.tensor(list("día".encode())))  # d, two bytes of í, a
    y[0, 1] = codec.mask_index
    text, pieces, revealed = provisional_text(codec, byte_tokenizer(), y, torch.tensor([0, 1, 3]))
    assert text == f"{UNKNOWN}ía"
    assert pieces == [None, "\ufffd", "a"]
    assert revealed == [0.5, 1.0, 1.0]
    y[1] = codec.mask_index
    assert provisional_text(codec, byte_tokenizer(), y, torch.tensor([1])).text == f"{UNKNOWN * 2}\ufffda"


def test_text_of_an_end_token_is_empty() -> None:
    codec = SubtokenCodec(257, 1)
    y = torch.tensor([[65], [256], [257]])
    assert provisional_text(codec, byte_tokenizer(), y, torch.tensor([1])) == (f"A{UNKNOWN}", [""], [1.0])


def test_outputs_without_a_token_stand_for_no_text() -> None:
    codec = SubtokenCodec(300, 2)
    y = codec.encode(torch.tensor([65, 299, 66]))
    text, pieces, _ = provisional_text(codec, byte_tokenizer(), y, torch.tensor([1, 2]))
    assert (text, pieces) == ("AB", ["", "B"])


def test_without_a_tokenizer_tokens_are_told_by_their_digits_alone() -> None:
    codec = SubtokenCodec(257, 2)
    y = codec.encode(torch.tensor([65, 66, 67]))
    y[1, 0] = codec.mask_index
    assert provisional_text(codec, None, y, torch.tensor([0, 1])) == ("", [None, None], [1.0, 0.5])


def test_masked_digits_of_pixels_take_the_middle_of_their_range() -> None:
    codec = SubtokenCodec(256, 2)
    pixels = PixelCodec(
        UNetConfig(channels=1, height=2, width=2, head_channels=32, model_channels=32, channel_mult=(1, 1))
    )
    m = codec.mask_index
    y = torch.tensor([[15, 15], [m, m], [10, m], [m, 0]])
    assert provisional_pixels(codec, pixels, y).flatten().tolist() == [255, 127, 167, 120]


def test_pixels_stay_in_the_range_of_the_model() -> None:
    codec = SubtokenCodec(243, 2)  # codes 243..255 are no pixel values
    pixels = PixelCodec(
        UNetConfig(channels=1, height=2, width=2, head_channels=32, model_channels=32, channel_mult=(1, 1))
    )
    m = codec.mask_index
    y = torch.tensor([[15, m], [14, m], [15, 2], [m, m]])
    assert provisional_pixels(codec, pixels, y).flatten().tolist() == [242, 231, 242, 127]


def test_permuted_codes_show_known_pixels_only() -> None:
    codec = SubtokenCodec(256, 2, torch.arange(255, -1, -1))
    pixels = PixelCodec(
        UNetConfig(channels=1, height=2, width=2, head_channels=32, model_channels=32, channel_mult=(1, 1))
    )
    y = codec.encode(torch.tensor([3, 7, 9, 200]))
    y[1, 0] = codec.mask_index
    assert provisional_pixels(codec, pixels, y).flatten().tolist() == [3, 128, 9, 200]
