"""What a model makes of a given text or image: the likelihood bound with its standard error, the coded loss beside it.

    score(checkpoint, text="In the beginning", num_samples=32, seed=1)[0].bits_per_byte

`prepare_scores` turns a request into rows, the stepper advances them (`score` offline, the engine in the server),
`finish_scores` turns rows into scores. What the bound is a bound of: -log p of the tokens given their number, of the
sampler that reveals one digit at a time; of a class-conditional model given the label; of a model with uniform labels
that of the mixture (Jensen's inequality: every state has a label of its own, drawn uniformly).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from kernels.noise import row_seed
from prime_core.checkpoint import Checkpoint
from prime_core.config import UNetConfig
from prime_core.integers import check_count, holds_integers
from prime_core.pixels import PixelCodec, top_pixel
from prime_core.sampling.canvas import CanvasError, Numbers, Tokens, as_tensor, fixed_tokens
from prime_core.sampling.prepare import NonFiniteError, label_index
from prime_core.sampling.request import checked_fields
from prime_core.sampling.sample import run_rows
from prime_core.sampling.stepper import Stepper
from prime_core.scoring.score_row import ScoreRow, draw_states, new_score_rows
from prime_core.scoring.scored import PerToken, Score, estimate

DEFAULT_SAMPLES = 16
TEXT_FIELDS = ("text", "token_ids", "inputs")


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreRequest:
    """A request for scores.

    Attributes:
        text: a text, for models with a tokenizer.
        token_ids: tokens in place of a text.
        inputs: several of them, each a text or token ids, in place of one.
        pixels: (H, W, C) integers in 0..255, for image models.
        label: 0..num_labels-1 or a label's name; needed by class-conditional models, and by no other.
        num_samples: masked states drawn for each input, at least 1; 2 for a standard error.
        seed: 0..2**64-1; None draws one. Input i uses `row_seed(seed, i)`.
        per_token: whether to keep what each token costs.
    """

    text: str | None = None
    token_ids: Tokens | None = None
    inputs: Sequence[Tokens] | None = None
    pixels: Numbers | None = None
    label: int | str | None = None
    num_samples: int = DEFAULT_SAMPLES
    seed: int | None = None
    per_token: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """What is scored, before its states are drawn.

    Attributes:
        x_0: (L,) int64, its tokens.
        num_bytes: of its text, or of what its tokens decode to; None for images, and without a tokenizer.
        num_dimensions: pixels times channels of an image; None for text.
        label: that it is scored under; None for models without, and for labels that are drawn.
        num_labels: of which every state draws one; 0 for models that draw none.
    """

    x_0: Tensor
    num_bytes: int | None = None
    num_dimensions: int | None = None
    label: int | None = None
    num_labels: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class ScoredInput:
    """One input on its way: what it is, the seed of its states, and the rows that these are shared out to."""

    content: Content
    seed: int
    rows: tuple[ScoreRow, ...]


@dataclass(frozen=True, eq=False, slots=True)
class PreparedScores:
    """The inputs of a request, ready for the stepper.

    Attributes:
        inputs: in the order of the request.
        num_digits: sub-tokens a token.
    """

    inputs: tuple[ScoredInput, ...]
    num_digits: int

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        """The rows of all inputs."""
        return tuple(row for each in self.inputs for row in each.rows)


def rows_per_input(num_inputs: int, num_samples: int, most_rows: int) -> int:
    """Return how many rows share the states of an input: at most one a state, and ``most_rows`` over all inputs."""
    return max(1, min(num_samples, most_rows // num_inputs))


def prepare_scores(
    checkpoint: Checkpoint,
    request: ScoreRequest,
    most_rows: int = 64,
    *,
    contents: Sequence[Content] | None = None,
) -> PreparedScores:
    """Turn a request into rows with their masked states; the network is not called.

    Args:
        checkpoint: the model.
        request: what is asked for.
        most_rows: see `rows_per_input`. The rows of an input can be in one call together; scores do not depend on it.
        contents: what `contents_of` gives, if it was asked already.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
    """
    check_count("num_samples", request.num_samples)
    first_seed = secrets.randbits(64) if request.seed is None else request.seed
    contents = contents_of(checkpoint, request) if contents is None else contents
    num_rows = rows_per_input(len(contents), request.num_samples, most_rows)
    inputs = tuple(
        _prepare_input(checkpoint, request, content, row_seed(first_seed, index), num_rows)
        for index, content in enumerate(contents)
    )
    return PreparedScores(inputs, checkpoint.codec.target_length)


def finish_scores(prepared: PreparedScores) -> list[Score]:
    """Turn finished rows into scores, in the order of the inputs.

    Raises:
        NonFiniteError: if a row failed.
    """
    if any(row.failed for row in prepared.rows):
        raise NonFiniteError("the network gives an input no finite likelihood; are its weights sound?")
    assert all(row.done for row in prepared.rows), "only finished rows make a score"
    return [_finish_input(each, prepared.num_digits) for each in prepared.inputs]


def score(
    checkpoint: Checkpoint, request: ScoreRequest | None = None, *, max_rows: int = 64, **given: Any
) -> list[Score]:
    """Score texts or an image; the same arguments give the same scores as the server gives.

    Args:
        checkpoint: the model.
        request: what is asked for; None takes the fields.
        max_rows: most rows in one denoiser call.
        **given: the fields of a `ScoreRequest`.

    Returns:
        One score for each input, in order.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
        ValueError: if a value is out of range.
        NonFiniteError: if the network gave no finite likelihood.
    """
    if request is None:
        request = ScoreRequest(**checked_fields(given, [each.name for each in fields(ScoreRequest)], "score"))
    elif given:
        raise ValueError("give a request or its fields, not both")
    elif not isinstance(request, ScoreRequest):
        raise ValueError(
            f"a request must be a ScoreRequest, got {type(request).__name__}; give fields by name, as text=..."
        )
    prepared = prepare_scores(checkpoint, request, max_rows)
    run_rows(Stepper(checkpoint.denoiser, checkpoint.codec), prepared.rows, max_rows)
    return finish_scores(prepared)


def contents_of(checkpoint: Checkpoint, request: ScoreRequest) -> list[Content]:
    """Return what is to be scored.

    Raises:
        CanvasError: if a field does not fit the model; ``param`` names it.
    """
    if isinstance(checkpoint.config.model, UNetConfig):
        return [_image(checkpoint, checkpoint.config.model, request)]
    for param in ("pixels", "label"):
        if getattr(request, param) is not None:
            raise CanvasError(param, f"{param} is for image models, and this model makes text; leave it out")
    given = [param for param in TEXT_FIELDS if getattr(request, param) is not None]
    if len(given) != 1:
        what = "none is given" if not given else f"{' and '.join(given)} are given"
        raise CanvasError(
            given[1] if given else "text", f"exactly one of {', '.join(TEXT_FIELDS)} is needed: {what}"
        )
    (param,) = given
    if request.inputs is None:
        return [_text(checkpoint, param, getattr(request, param))]
    inputs = request.inputs
    if not isinstance(inputs, Sequence) or isinstance(inputs, (str, bytes)) or not inputs:
        raise CanvasError("inputs", "inputs must be a list of texts or token ids that is not empty")
    return [_input(checkpoint, index, each) for index, each in enumerate(inputs)]


def _input(checkpoint: Checkpoint, index: int, given: Tokens) -> Content:
    """Return the tokens of one of several inputs; an error names its place, `inputs[0]` for the first."""
    try:
        return _text(checkpoint, "inputs", given, f" (number {index + 1})")
    except CanvasError as error:
        raise CanvasError(f"inputs[{index}]", str(error)) from None


def _text(checkpoint: Checkpoint, param: str, given: Tokens, which: str = "") -> Content:
    """Return the tokens of a text; ``param`` and ``which`` tell in messages where it stands."""
    tokenizer, context = checkpoint.tokenizer, checkpoint.config.model.length
    if isinstance(given, str) != (param == "text") and param != "inputs":
        raise CanvasError(param, f"{param} must be {'text' if param == 'text' else 'a list of token ids'}")
    tokens, text = fixed_tokens(tokenizer, checkpoint.codec, param, given)
    if not tokens:
        raise CanvasError(param, f"{param}{which} holds no token, and there is nothing to score")
    if len(tokens) > context:
        raise CanvasError(
            param,
            f"{param}{which} has {len(tokens)} tokens, but the context holds {context}; cut it into parts",
        )
    num_bytes = None
    if text is not None:
        num_bytes = len(text.encode())
    elif tokenizer is not None:
        num_bytes = len(tokenizer.decode_bytes(tokens))
    return Content(torch.tensor(tokens, dtype=torch.int64), num_bytes)


def _image(checkpoint: Checkpoint, model: UNetConfig, request: ScoreRequest) -> Content:
    for param in TEXT_FIELDS:
        if getattr(request, param) is not None:
            raise CanvasError(param, f"{param} is for text models, and this model makes images; give pixels")
    pixels, top = as_tensor(request.pixels), top_pixel(checkpoint.codec.vocab_size)
    if not isinstance(pixels, Tensor):
        raise CanvasError(
            "pixels", "pixels must be a tensor or an array (height, width, channels) of integers"
        )
    shape = PixelCodec(model).picture_shape
    if tuple(pixels.shape) != shape or not holds_integers(pixels):
        raise CanvasError(
            "pixels",
            f"pixels must be integers of shape (height, width, channels) {shape}, got {pixels.dtype} of shape "
            f"{tuple(pixels.shape)}",
        )
    if not 0 <= int(pixels.min()) <= int(pixels.max()) <= top:
        raise CanvasError("pixels", f"pixels must be in 0..{top}")
    label = label_index(checkpoint.config, model, request.label)
    if model.labels == "class" and label is None:
        raise CanvasError(
            "label", f"label must be given: this model is conditioned on one of {model.num_labels}"
        )
    num_labels = model.num_labels if model.labels == "uniform" else 0
    x_0 = PixelCodec(model).encode(pixels.cpu())
    return Content(x_0, num_dimensions=pixels.numel(), label=label, num_labels=num_labels)


def _prepare_input(
    checkpoint: Checkpoint, request: ScoreRequest, content: Content, seed: int, num_rows: int
) -> ScoredInput:
    y = checkpoint.codec.encode(content.x_0)
    states = draw_states(
        (len(y), checkpoint.codec.target_length),
        request.num_samples,
        checkpoint.schedule,
        seed,
        label=content.label,
        num_labels=content.num_labels,
    )
    rows = new_score_rows(y, content.x_0, states, num_rows, per_token=request.per_token)
    return ScoredInput(content, seed, rows)


def _finish_input(scored: ScoredInput, num_digits: int) -> Score:
    nats = torch.cat([row.nats for row in scored.rows])
    shares = [row.token_nats for row in scored.rows if row.token_nats is not None]
    per_token = None
    if shares:
        nelbo, coded = (torch.stack(shares).sum(0) / len(nats)).T.tolist()
        per_token = PerToken(nelbo, coded)
    content = scored.content
    return Score(
        nelbo=estimate(nats[:, 0]),
        coded_loss=estimate(nats[:, 1]),
        coded_loss_is_bound=num_digits == 1,
        num_tokens=len(content.x_0),
        num_bytes=content.num_bytes,
        num_dimensions=content.num_dimensions,
        label=content.label,
        seed=scored.seed,
        nfe=len(nats),
        per_token=per_token,
    )
