"""The law of a plan in which digits are masked again, on tiny models: the sum over all histories of all digits.

With a corrector a digit can go from masked to visible and back in every step of the grid. The probabilities of its
moves depend on the step alone, so its history has a probability that no network has a say in; a combination of
histories is a plan. `exact.dense_chain_law` is the other side of the comparison.

Shapes: N steps of the grid, S digits a token; (2^N)^(free digits) plans are summed.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prime_core.codec import SubtokenCodec
from prime_core.exact.laws import TokenLaw, plan_law
from prime_core.models.denoiser import Denoiser
from prime_core.sampling.canvas import Canvas
from prime_core.sampling.correctors import StepTables
from prime_core.sampling.histories import Transitions
from prime_core.sampling.plan import gather_events
from prime_core.sampling.settings import SamplingSettings

_PLAIN = SamplingSettings()


def planned_chain_law(
    model: Denoiser,
    codec: SubtokenCodec,
    times: Tensor,
    tables: StepTables,
    canvas: Canvas,
    settings: SamplingSettings = _PLAIN,
) -> TokenLaw:
    """Return the law of the planned sampler with re-masking: the sum over all histories of all free digits.

    Arguments and result are those of `dense_chain_law`. Each combination of histories becomes one plan, whose steps
    without a reveal call no network.
    """
    histories = list(digit_histories(tables))
    position, digit = (part.tolist() for part in canvas.free.nonzero(as_tuple=True))
    total: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for combination in itertools.product(histories, repeat=len(position)):
        weight = math.prod(history.probability for history in combination)
        reveals, remasks = (
            _transitions(
                (p, d, step)
                for p, d, history in zip(position, digit, combination, strict=True)
                for step in history.steps[first::2]
            )
            for first in (0, 1)
        )
        plan = gather_events(*reveals, (*canvas.y.shape,), times, len(times) - 1, remasks)
        for tokens, probability in plan_law(model, codec, plan, canvas, settings).items():
            total[tokens] += weight * probability
    return dict(total)


class History(NamedTuple):
    """One way a digit can go: the steps of its transitions (reveal, mask, reveal, ...), and their probability."""

    steps: tuple[int, ...]
    probability: float


def digit_histories(tables: StepTables) -> Iterator[History]:
    """Enumerate what can happen to a digit that starts masked, step by step; step N reveals what is left."""
    chances = list(zip(tables.reveal.tolist(), tables.remask.tolist(), strict=True))
    for moves in itertools.product((False, True), repeat=len(chances)):
        steps: list[int] = []
        probability = 1.0
        for step, (move, chance) in enumerate(zip(moves, chances, strict=True)):
            p = chance[len(steps) % 2]
            probability *= p if move else 1 - p
            steps += [step] * move
        if probability > 0:
            left_over = [] if len(steps) % 2 else [len(chances)]
            yield History((*steps, *left_over), probability)


def _transitions(triples: Iterable[tuple[int, int, int]]) -> Transitions:
    columns = torch.tensor(list(triples), dtype=torch.int64).view(-1, 3).T.contiguous()
    return Transitions(*columns)
