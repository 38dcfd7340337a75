"""Arguments of `score`: what a text model takes, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import CanvasError
from prime_core.scoring.score import score
from tests.stubs import TableDenoiser, byte_tokenizer, stub_checkpoint


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({}, "text", "none is given"),
        ({"text": "a", "token_ids": [1]}, "token_ids", "text and token_ids are given"),
        ({"text": ""}, "text", "nothing to score"),
        ({"token_ids": []}, "token_ids", "nothing to score"),
        ({"inputs": []}, "inputs", "not empty"),
        ({"inputs": "abc"}, "inputs", "list"),
        (
            {"inputs": ["a", "b" * 17]},
            "inputs[1]",
            r"inputs \(number 2\) has 17 tokens, but the context holds 16",
        ),
        ({"text": "a" * 17}, "text", "has 17 tokens, but the context holds 16"),
        ({"text": [1]}, "text", "must be text"),
        ({"token_ids": "ab"}, "token_ids", "list of token ids"),
        ({"token_ids": [257]}, "token_ids", r"0\.\.256"),
        ({"token_ids": [-1]}, "token_ids", r"0\.\.256"),
        ({"token_ids": [True]}, "token_ids", r"0\.\.256"),
        ({"text": "\ud800"}, "text", "surrogate"),
        ({"inputs": torch.ones(2, 3, dtype=torch.long)}, "inputs", "list"),
        ({"token_ids": torch.ones(2, 3, dtype=torch.long)}, "token_ids", r"got Tensor of shape \(2, 3\)"),
        ({"txt": "a"}, "txt", "txt is no argument of score; did you mean text?"),
        ({"text": "a", "label": 1}, "label", "image models"),
        ({"pixels": torch.zeros(4, 4, 1)}, "pixels", "image models"),
    ],
)
def test_what_does_not_fit_a_text_model(fields: dict[str, Any], param: str, words: str) -> None:
    codec = SubtokenCodec(257, 2)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec), tokenizer=byte_tokenizer())
    with pytest.raises(CanvasError, match=words) as caught:
        score(checkpoint, **fields)
    assert caught.value.param == param


def test_tensors_and_numpy_numbers_are_taken() -> None:
    codec = SubtokenCodec(257, 2)
    checkpoint = stub_checkpoint(codec, TableDenoiser(codec), tokenizer=byte_tokenizer())
    (want,) = score(checkpoint, token_ids=[7, 256], num_samples=3, seed=2**63)
    numbers = {"num_samples": np.int64(3), "seed": np.uint64(2**63)}
    for given in ({"token_ids": torch.tensor([7, 256])}, {"inputs": [np.array([7, 256], dtype=np.uint16)]}):
        assert score(checkpoint, **given, **numbers) == [want]


@pytest.mark.parametrize("num_samples", [0, -1, True, 1.0])
def test_bad_numbers_of_samples(num_samples: Any) -> None:
    codec = SubtokenCodec(50, 2)
    with pytest.raises(ValueError, match="num_samples must be"):
        score(stub_checkpoint(codec, None), token_ids=[1], num_samples=num_samples)
