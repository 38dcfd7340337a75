"""The calls of a model before it serves: what they allocate and compile, the first requests need not wait for.

On a CPU that is one call. On a GPU Triton compiles a kernel when it first meets it, and for seconds the engine would
seem to hang; so there is one call for every set of kernels that a request can ask for.

They also tell whether the model works at all: when calls of requests fail, they are made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from prime_core.checkpoint import Checkpoint
from prime_core.config import UNetConfig
from prime_core.pixels import PixelCodec
from prime_core.sampling.prepare import NonFiniteError, prepare_rows
from prime_core.sampling.step_parts import StepResult
from prime_core.sampling.stepper import AnyRow, Stepper
from prime_core.scoring.score import ScoreRequest, prepare_scores

WARM_UP_TOKENS = 32

# Top-k and top-p have a search each, and a common one.
_TRUNCATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 1},
    {"top_p": 0.5},
    {"top_k": 1, "top_p": 0.5},
)


def try_checkpoint(name: str, checkpoint: Checkpoint) -> None:
    """Make one real call of a model that does not serve yet, in the calling thread.

    Args:
        name: of the model, for the message.
        checkpoint: what is to be tried.

    Raises:
        NonFiniteError: if the logits are not finite.
    """
    stepper = Stepper(checkpoint.denoiser, checkpoint.codec)
    check_finite(name, stepper.step(next(trial_calls(checkpoint, stepper.device))))


def trial_calls(checkpoint: Checkpoint, device: torch.device) -> Iterator[Sequence[AnyRow]]:
    """Yield the rows of each call.

    Args:
        checkpoint: the model.
        device: where it computes.
    """
    if device.type == "cpu":
        yield _drawn(checkpoint, {})
        return
    codec = checkpoint.codec
    draws: list[dict[str, Any]] = [{}]
    if (
        isinstance(checkpoint.config.model, UNetConfig)
        and codec.base**codec.target_length == codec.vocab_size
    ):
        draws.append({"sampler": "published"})
    for draw in draws:
        for truncation in _TRUNCATIONS:
            yield _drawn(checkpoint, draw | truncation)
    yield _scored(checkpoint)


def _drawn(checkpoint: Checkpoint, fields: dict[str, Any]) -> Sequence[AnyRow]:
    config = checkpoint.config.model
    if not isinstance(config, UNetConfig):
        fields = {"max_tokens": min(WARM_UP_TOKENS, config.length)} | fields
    return prepare_rows(checkpoint, n=1, steps=1, seed=0, **fields).rows


def _scored(checkpoint: Checkpoint) -> Sequence[AnyRow]:
    config = checkpoint.config.model
    if isinstance(config, UNetConfig):
        pixels = torch.zeros(PixelCodec(config).picture_shape, dtype=torch.int64)
        label = 0 if config.labels == "class" else None
        request = ScoreRequest(pixels=pixels, label=label, num_samples=1, seed=0)
    else:
        request = ScoreRequest(token_ids=[0] * min(WARM_UP_TOKENS, config.length), num_samples=1, seed=0)
    return prepare_scores(checkpoint, request).rows


def check_finite(name: str, results: Sequence[StepResult]) -> None:
    """Refuse weights that gave such results.

    Raises:
        NonFiniteError: if a row failed.
    """
    if not all(result.ok for result in results):
        raise NonFiniteError(
            f"model {name!r} gives logits that are not finite, so its weights are not sound: leave it out, or "
            "load another checkpoint of it"
        )
