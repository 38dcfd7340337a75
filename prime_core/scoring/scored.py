"""Scores: estimates of the likelihood bound and of the coded loss, and the units they are told in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

MAX_EXPONENT = 700.0  # exp of more is no float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over masked states.

    Attributes:
        nats: of the whole input.
        standard_error: of ``nats``, see `estimate`; None for a single state.
    """

    nats: float
    standard_error: float | None


def estimate(values: Tensor) -> Estimate:
    """Return the mean of K values, one from each of K strata in order, and its standard error.

    The strata have means of their own, which vary more than what is inside them, so the deviation from the common mean
    would exaggerate. Neighbours are compared instead ("collapsed strata", Cochran, Sampling Techniques, 5A.12): of a
    group of G neighbours, G / (G - 1) times the sum of squares around the group's mean is on average the sum of their
    variances plus what their means differ by. So the square of the error is on average right or too large.

    Args:
        values: (K,) float64, K at least 1.
    """
    num = len(values)
    mean = float(values.mean())
    if num < 2:
        return Estimate(mean, None)
    variance = 0.0
    for group in values.tensor_split(num // 2):  # pairs, and one group of three if K is odd
        variance += len(group) / (len(group) - 1) * float((group - group.mean()).square().sum())
    return Estimate(mean, math.sqrt(variance) / num)


@dataclass(frozen=True, slots=True)
class PerToken:
    """What every token costs: its share of the estimates, which add up to them.

    Attributes:
        nelbo: (L,) nats.
        coded_loss: (L,) nats.
    """

    nelbo: list[float]
    coded_loss: list[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a model makes of one text or image.

    Attributes:
        nelbo: unbiased for an upper bound of -log p of the tokens: may be called a likelihood bound.
        coded_loss: unbiased for the published training loss. For more than one sub-token a token NOT a bound.
        coded_loss_is_bound: whether there is one sub-token a token; then both are the same.
        num_tokens: L, at least 1.
        num_bytes: of the text in UTF-8; None for images, and for tokens without a text.
        num_dimensions: pixels times channels of an image; None for text.
        label: that the image was scored under; None if the model takes none.
        seed: seed that gives this score alone.
        nfe: denoiser calls it took: one for each masked state.
        per_token: None unless asked for.
    """

    nelbo: Estimate
    coded_loss: Estimate
    coded_loss_is_bound: bool
    num_tokens: int
    num_bytes: int | None
    num_dimensions: int | None
    label: int | None
    seed: int
    nfe: int
    per_token: PerToken | None

    @property
    def bits_per_token(self) -> float:
        """The bound in bits per token."""
        return self.nelbo.nats / math.log(2) / self.num_tokens

    @property
    def bits_per_byte(self) -> float | None:
        """The bound in bits per byte of UTF-8; None if there is no byte."""
        return self.nelbo.nats / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def bits_per_dimension(self) -> float | None:
        """The bound in bits per pixel and channel; None for text."""
        return self.nelbo.nats / math.log(2) / self.num_dimensions if self.num_dimensions else None

    @property
    def ppl(self) -> float:
        """The bound as a perplexity per token."""
        return math.exp(min(self.nelbo.nats / self.num_tokens, MAX_EXPONENT))
