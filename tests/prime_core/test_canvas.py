"""Canvases: layouts of requests, their errors, and rendering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from prime_core.codec import SubtokenCodec
from prime_core.sampling.canvas import Canvas, CanvasError, check_stop, digits_canvas, text_canvas
from prime_core.sampling.render import render
from tests.stubs import byte_tokenizer

TOKENIZER = byte_tokenizer()
CODEC = SubtokenCodec(257, 2)
CONTEXT = 12


def layout(**request: Any) -> Canvas:
    return text_canvas(TOKENIZER, CODEC, CONTEXT, **request)


def fill(canvas: Canvas, ids: list[int]) -> torch.Tensor:
    """Put tokens into the gaps, in order."""
    y, tokens = canvas.y.clone(), iter(ids)
    for position in canvas.free.any(-1).nonzero()[:, 0].tolist():
        y[position] = CODEC.encode(torch.tensor(next(tokens)))
    assert next(tokens, None) is None
    return CODEC.decode(y)


def spans(canvas: Canvas) -> list[tuple[int, int, bool]]:
    return [(segment.start, segment.stop, segment.gap) for segment in canvas.segments]


def test_unconditional_fills_the_context() -> None:
    canvas = layout()
    assert canvas.y.shape == (CONTEXT, 2)
    assert bool(canvas.free.all())
    assert canvas.open_ended
    assert len(canvas.free) == CONTEXT


def test_prompt_gap_and_suffix() -> None:
    canvas = layout(prompt="ab", suffix="xyz", max_tokens=4)
    assert spans(canvas) == [(0, 2, False), (2, 6, True), (6, 9, False)]
    assert torch.equal(canvas.free.all(-1), torch.tensor([0, 0, 1, 1, 1, 1, 0, 0, 0]).bool())
    assert torch.equal(canvas.free.all(-1), canvas.free.any(-1))
    assert not canvas.open_ended
    assert int(layout(prompt="ab", suffix="xyz").free.all(-1).sum()) == CONTEXT - 5


def test_an_empty_suffix_is_none() -> None:
    """Not a fixed end of nothing, which text could not stop before."""
    for prompt in (None, "", "ab"):
        plain, empty = layout(prompt=prompt, max_tokens=4), layout(prompt=prompt, max_tokens=4, suffix="")
        assert spans(empty) == spans(plain)
        assert torch.equal(empty.y, plain.y)
        assert empty.open_ended
        check_stop(empty, ["."], TOKENIZER)


def test_template_keeps_its_order_and_empty_parts() -> None:
    canvas = layout(template=[{"gap": 2}, "", "ab", 1, 3, "c"])
    assert spans(canvas) == [
        (0, 2, True),
        (2, 2, False),
        (2, 4, False),
        (4, 5, True),
        (5, 8, True),
        (8, 9, False),
    ]
    rendered = render(canvas, fill(canvas, list(b"PQRSTU")), TOKENIZER)
    assert rendered.text == "PQabRSTUc"
    assert rendered.gaps == ["PQ", "R", "STU"]


def test_prompt_of_token_ids_without_a_tokenizer() -> None:
    canvas = text_canvas(None, CODEC, CONTEXT, prompt=[256, 3], max_tokens=1)
    rendered = render(canvas, fill(canvas, [7]), None)
    assert (rendered.text, rendered.gaps, rendered.token_ids) == (None, [], [256, 3, 7])


@pytest.mark.parametrize(
    "kind", [torch.tensor, np.array, tuple, lambda ids: [np.int64(each) for each in ids]]
)
def test_token_ids_may_be_a_tensor_or_an_array(kind: Any) -> None:
    listed = layout(prompt=[256, 3], suffix=[7], max_tokens=2)
    canvas = layout(prompt=kind([256, 3]), suffix=kind([7]), max_tokens=2)
    assert torch.equal(canvas.y, listed.y) and canvas.segments == listed.segments
    assert layout(prompt=kind([]), suffix=kind([])).open_ended


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        ({"prompt": torch.zeros(1, 2, dtype=torch.long)}, "prompt", r"got Tensor of shape \(1, 2\)"),
        ({"prompt": np.zeros((2, 0), int)}, "prompt", r"got ndarray of shape \(2, 0\)"),
        ({"suffix": torch.tensor(3)}, "suffix", "got Tensor$"),
        ({"prompt": torch.tensor([3.0])}, "prompt", "token ids in 0..256"),
        ({"prompt": np.array([True])}, "prompt", "token ids in 0..256"),
        ({"prompt": "x" * 12}, "prompt", "prompt has 12 tokens, but at most 11 fit: the context holds 12"),
        ({"prompt": "x" * 9, "suffix": "yyy"}, "suffix", "suffix has 3 tokens, but at most 2 fit"),
        (
            {"prompt": "abc", "max_tokens": 10},
            "max_tokens",
            "max_tokens must be at most 9: .*, and 3 are given",
        ),
        (
            {"prompt": "a", "max_tokens": 12},
            "max_tokens",
            "max_tokens must be at most 11: .*, and 1 is given",
        ),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": True}, "max_tokens", "at least 1"),
        ({"template": ["a", 2], "prompt": ""}, "prompt", "exclude each other"),
        ({"template": ["a", 2], "suffix": ""}, "suffix", "exclude each other"),
        ({"template": ["a", 2], "max_tokens": 3}, "max_tokens", "exclude each other"),
        ({"prompt": 5}, "prompt", "text or a list"),
        ({"prompt": b"x"}, "prompt", "text or a list"),
        ({"suffix": 3}, "suffix", "text or a list"),
        ({"template": ["a", 0]}, "template", "at least 1 token"),
        ({"template": ["a", True]}, "template", "at least 1 token"),
        ({"template": ["a", {"gap": 2, "x": 1}]}, "template", "at least 1 token"),
        ({"template": [None, 3]}, "template", "at least 1 token"),
        ({"template": ["a", "b"]}, "template", "no gap"),
        ({"template": []}, "template", "no gap"),
        ({"template": ["abc", 10]}, "template", "needs 13 tokens, but the context holds 12"),
        ({"prompt": "a\ud800b"}, "prompt", "half of a surrogate pair"),
        ({"suffix": "\udfff"}, "suffix", "half of a surrogate pair"),
        ({"template": ["\ud800", 1]}, "template", "half of a surrogate pair"),
        ({"prompt": [257]}, "prompt", "token ids in 0..256"),
        ({"prompt": [-1]}, "prompt", "token ids in 0..256"),
        ({"prompt": [True]}, "prompt", "token ids in 0..256"),
    ],
)
def test_a_layout_that_does_not_fit_names_its_field(
    request_: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(CanvasError, match=message) as caught:
        layout(**request_)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("request_", "num_free"),
    [
        ({"prompt": "x" * 11}, 1),
        ({"prompt": "x" * 11, "max_tokens": 1}, 1),
        ({"suffix": "x" * 11}, 1),
        ({"prompt": "x" * 5, "suffix": "y" * 6}, 1),
        ({"prompt": "abc", "suffix": "y", "max_tokens": 8}, 8),
        ({"template": ["abc", 8, "x"]}, 8),
    ],
)
def test_a_layout_may_fill_the_context_to_its_last_token(request_: dict[str, Any], num_free: int) -> None:
    canvas = layout(**request_)
    assert canvas.length == CONTEXT
    assert int(canvas.free.all(-1).sum()) == num_free


def test_token_ids_are_those_of_the_tokenizer_where_the_network_has_more() -> None:
    codec = SubtokenCodec(300, 2)
    assert text_canvas(TOKENIZER, codec, CONTEXT, prompt=[256], max_tokens=1).length == 2
    assert text_canvas(None, codec, CONTEXT, prompt=[0, 299], max_tokens=1).length == 3
    with pytest.raises(CanvasError, match=r"token ids in 0\.\.256"):
        text_canvas(TOKENIZER, codec, CONTEXT, prompt=[257], max_tokens=1)
    with pytest.raises(CanvasError, match=r"token ids in 0\.\.299"):
        text_canvas(None, codec, CONTEXT, prompt=[300], max_tokens=1)


def test_an_empty_text_needs_no_tokenizer() -> None:
    canvas = text_canvas(None, CODEC, CONTEXT, prompt="", suffix="", max_tokens=2)
    assert bool(canvas.free.all()) and canvas.length == 2


@pytest.mark.parametrize("field", ["prompt", "suffix"])
def test_text_without_a_tokenizer_is_refused(field: str) -> None:
    with pytest.raises(CanvasError, match="no tokenizer") as caught:
        text_canvas(None, CODEC, CONTEXT, **{field: "a"})  # type: ignore[arg-type]
    assert caught.value.param == field


def test_fixed_ends_are_verbatim_whatever_the_gap_holds() -> None:
    canvas = layout(prompt="é", suffix="ü", max_tokens=3)
    rendered = render(
        canvas, fill(canvas, [0xC3, 0x28, 0xE2]), TOKENIZER
    )  # no UTF-8, and ends inside a character
    assert rendered.text is not None
    assert rendered.text.startswith("é")
    assert rendered.text.endswith("ü")
    assert rendered.gaps == ["\ufffd(\ufffd"]
    assert len(rendered.token_ids) == 7


def test_an_open_end_is_cut_at_the_end_of_text() -> None:
    canvas = layout(prompt="ab", max_tokens=5)
    rendered = render(canvas, fill(canvas, [*b"cd", 256, *b"ef"]), TOKENIZER)
    assert (rendered.text, rendered.gaps, rendered.finish_reason) == ("abcd", ["cd"], "stop")
    assert rendered.token_ids == list(b"abcd")


def test_end_of_text_elsewhere_is_no_text_and_cuts_nothing() -> None:
    canvas = layout(prompt="ab", suffix="z", max_tokens=3)
    rendered = render(canvas, fill(canvas, [ord("c"), 256, ord("d")]), TOKENIZER)
    assert (rendered.text, rendered.finish_reason) == ("abcdz", "length")
    assert rendered.token_ids == [*b"abc", 256, *b"dz"]


def test_the_first_stop_string_cuts_before_itself() -> None:
    canvas = layout(prompt="a.b", max_tokens=8)
    x_0 = fill(canvas, list("héy..END".encode())[:8])
    assert render(canvas, x_0, TOKENIZER, ["END", "."]).text == "a.bhéy"
    assert render(canvas, x_0, TOKENIZER, ["nothing"]).finish_reason == "length"
    rendered = render(canvas, x_0, TOKENIZER, ["y", "é"])
    assert (rendered.text, rendered.gaps, rendered.finish_reason) == ("a.bh", ["h"], "stop")
    assert rendered.token_ids == list(b"a.bh")


def test_stop_at_the_very_start_leaves_nothing() -> None:
    canvas = layout(prompt="a", max_tokens=2)
    rendered = render(canvas, fill(canvas, list(b".x")), TOKENIZER, ["."])
    assert (rendered.text, rendered.gaps, rendered.token_ids) == ("a", [""], [ord("a")])


@pytest.mark.parametrize(
    ("canvas", "stop"),
    [
        (layout(suffix="x"), ["a"]),
        (layout(template=[3]), ["a"]),
        (layout(), [""]),
        (layout(), "abc"),
        (layout(), b"abc"),
        (layout(), {"a"}),
        (layout(), [b"a"]),
        (layout(), ["a", "\ud800"]),
    ],
)
def test_stop_that_does_not_fit_is_refused(canvas: Canvas, stop: Any) -> None:
    with pytest.raises(CanvasError) as caught:
        check_stop(canvas, stop, TOKENIZER)
    assert caught.value.param == "stop"


def test_stop_needs_a_tokenizer_and_no_stop_needs_nothing() -> None:
    check_stop(layout(suffix="x"), [], None)
    check_stop(layout(), ["a", "b"], TOKENIZER)
    with pytest.raises(CanvasError, match="stop needs a tokenizer"):
        check_stop(layout(), ["a"], None)


def test_known_digits_give_runs_and_are_copied() -> None:
    y = CODEC.encode(torch.tensor([1, 2, 3, 4]))
    y[1, 0] = y[2, 1] = CODEC.mask_index
    canvas = digits_canvas(CODEC, y)
    assert spans(canvas) == [(0, 1, False), (1, 3, True), (3, 4, False)]
    y.zero_()
    assert canvas.free.sum() == 2
    rendered = render(canvas, torch.tensor([97, 98, 99, 100]), TOKENIZER)
    assert (rendered.text, rendered.gaps) == ("abcd", ["bc"])


@pytest.mark.parametrize("permuted", [False, True])
def test_known_digits_are_accepted_exactly_when_some_token_agrees(permuted: bool) -> None:
    permutation = torch.randperm(11, generator=torch.Generator().manual_seed(0)) if permuted else None
    codec = SubtokenCodec(11, 2, permutation)  # base 4: codes 11..15 are no tokens
    for first in range(codec.base + 1):
        for second in range(codec.base + 1):
            agrees = any(
                first in (codec.mask_index, a) and second in (codec.mask_index, b)
                for a, b in codec.digits.tolist()
            )
            y = torch.tensor([[0, 0], [first, second]])
            if agrees:
                assert torch.equal(digits_canvas(codec, y).y, y)
            else:
                with pytest.raises(CanvasError, match="position 1 agree with none of 11 tokens"):
                    digits_canvas(codec, y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "y must be"),
        (torch.zeros(3, 3, dtype=torch.int64), "y must be"),
        (torch.zeros(0, 2, dtype=torch.int64), "y must be"),
        (torch.zeros(3, 2), "integers"),
        (torch.full((1, 2), 18), r"digits must be in 0\.\.16, or 17 where free"),
        (torch.full((1, 2), -1), "digits must be in"),
        (torch.tensor([[3, 4], [18, 0], [17, 17]]), "digits must be in"),
        (torch.tensor([[3, 4], [-1, 0], [17, 17]]), "digits must be in"),
        (torch.zeros(3, 2, dtype=torch.bool), "y must hold integers, got torch.bool"),
        (torch.zeros(3, 2, dtype=torch.complex64), "y must hold integers, got torch.complex64"),
        ([[0, 0]], "y must be a tensor of digits, got list"),
    ],
)
def test_known_digits_out_of_range_are_refused(y: Any, message: str) -> None:
    with pytest.raises(CanvasError, match=message) as caught:
        digits_canvas(CODEC, y)
    assert caught.value.param == "y"


def test_outputs_without_a_token_stand_for_no_text() -> None:
    """A network with more outputs than its tokenizer has ids may draw them."""
    codec = SubtokenCodec(258, 2)
    canvas = text_canvas(TOKENIZER, codec, CONTEXT, prompt="a", max_tokens=2)
    rendered = render(canvas, torch.tensor([ord("a"), 257, ord("b")]), TOKENIZER)
    assert (rendered.text, rendered.finish_reason) == ("ab", "length")
