"""Texts of a request are checked, tokenized and laid out once, and frames take what the core makes of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import server.text.text_stream as text_stream
from prime_core.checkpoint import load_checkpoint
from prime_core.sampling.canvas import Canvas
from prime_core.sampling.prepare import prepare_rows, text_canvas_of
from prime_core.sampling.provisional import ProvisionalText
from prime_core.sampling.request import TextRequest
from prime_core.tokenizer import Tokenizer
from server.engine.feed import Changes, RowChange
from server.schemas.text import GenerateRequest
from tests.server.running import CONTEXT, Running, assert_error, serving


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized, from when it was emptied: to load a tokenizer tries it."""
    texts: list[str] = []
    encode = Tokenizer.encode

    def note(self: Tokenizer, text: str) -> Any:
        texts.append(text)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", note)
    return texts


@pytest.mark.parametrize("max_work", [2**24, 400])
def test_every_text_is_tokenized_once(model_path: Path, encoded: list[str], max_work: int) -> None:
    """Far from the limit of work, and so near that lengths have to be known."""
    with serving(model_path, max_work=max_work) as server:
        encoded.clear()
        assert server.post(prompt="ab", suffix="yz", max_tokens=4, steps=8).status_code == 200
        assert encoded == ["ab", "yz"]
        encoded.clear()
        body = {"prompt": ["abc", "de"], "max_tokens": 4, "steps": 8}
        assert server.client.post("/v1/completions", json=body).status_code == 200
        assert encoded == ["abc", "de"]
        assert_error(server.post(prompt="a" * (CONTEXT + 1)), 422, "invalid_value", "prompt")
        assert encoded == ["abc", "de"]


def test_work_is_refused_before_plans_are_drawn(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model_path, max_work=400) as server:
        monkeypatch.setattr("server.text.generate.prepare_rows", lambda *_, **__: pytest.fail("it was drawn"))
        message = assert_error(
            server.post(prompt="ab", max_tokens=40, steps=10), 422, "invalid_value", "steps"
        )
        assert "42 tokens and steps counted up to the 80 free digits" in message


def test_prompts_of_a_completion_are_checked_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerateRequest, "__init__", lambda *_, **__: pytest.fail("it was checked again"))
    body = {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 4, "steps": 4, "seed": 1}
    assert len(server.client.post("/v1/completions", json=body).json()["choices"]) == 4


def test_a_canvas_that_is_given_is_taken(model_path: Path, images_path: Path, encoded: list[str]) -> None:
    checkpoint = load_checkpoint(model_path)
    request = TextRequest(prompt="ab", max_tokens=4, steps=4, seed=1)
    encoded.clear()
    canvas = text_canvas_of(checkpoint, request)
    assert isinstance(canvas, Canvas)
    given, plain = (prepare_rows(checkpoint, request, canvas=each).rows[0] for each in (canvas, None))
    assert encoded == ["ab", "ab"]
    assert torch.equal(given.y, plain.y) and torch.equal(given.plan.positions, plain.plan.positions)
    with pytest.raises(ValueError, match="canvas is for text requests"):
        prepare_rows(load_checkpoint(images_path), canvas=canvas)


def test_frames_take_what_the_core_says_of_a_row(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = load_checkpoint(model_path)
    y = torch.full((3, 2), checkpoint.codec.mask_index)
    changes = Changes([RowChange(0, y, torch.tensor([1]), 0, 1)], 0.5, None)
    (frame,) = text_stream.text_frames(checkpoint, changes)
    assert (frame.text, frame.pieces, frame.revealed) == ("░░░", [None], [0.0])
    shown = ProvisionalText("text", ["piece"], [0.25])
    monkeypatch.setattr(text_stream, "provisional_text", lambda *_: shown)
    (frame,) = text_stream.text_frames(checkpoint, changes)
    assert (frame.text, frame.pieces, frame.revealed) == shown
