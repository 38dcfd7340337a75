"""Chi-square test of draws against an exact law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from scipy.stats import chi2

MIN_EXPECTED = 5.0


def p_value(draws: Iterable[Hashable], law: Mapping[Any, float]) -> float:
    """P-value of the draws under the law; 0 if an impossible outcome was drawn.

    Outcomes are pooled, rarest first, until each cell expects at least five draws.
    """
    counts = Counter(draws)
    if any(law.get(outcome, 0.0) == 0 for outcome in counts):
        return 0.0
    total = counts.total()
    cells: list[tuple[float, int]] = []
    expected, observed = 0.0, 0
    for outcome, probability in sorted(law.items(), key=lambda item: item[1]):
        expected += probability * total
        observed += counts[outcome]
        if expected >= MIN_EXPECTED:
            cells.append((expected, observed))
            expected, observed = 0.0, 0
    if cells and expected > 0:
        cells[-1] = (cells[-1][0] + expected, cells[-1][1] + observed)
    assert len(cells) > 1, "a chi-square test needs two cells"
    statistic = sum((seen - mean) ** 2 / mean for mean, seen in cells)
    return float(chi2.sf(statistic, len(cells) - 1))
