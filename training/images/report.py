"""The words and the table of an evaluation of images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from training.heldout import mean_over_rows

# What a bound is a bound of, by the kind of labels the model has.
BOUNDS: Mapping[str, str] = {
    "none": "likelihood bound",
    "class": "likelihood bound of an image given its class",
    "uniform": "likelihood bound, labels drawn uniformly (valid by Jensen's inequality)",
}
NOT_A_BOUND = "not a bound for target_length > 1"
MISSING_CLASSIFIER = (
    "the data set has no labels, so there is no classifier and no classifier_feature_distance"
)
_FIGURES = ("classifier_feature_distance", "label_agreement", "fid", "inception_score")
_ERRORS = ("standard_error", "standard_deviation")


def bounds_table(report: Mapping[str, Any]) -> str:
    """Return the first part of a report as text, a line a figure: what was measured, and bounds if any."""
    lines = [
        f"{report['checkpoint']} (step {report['step']}, {report['dtype']}, {report['target_length']} digits a token, "
        f"labels: {report['labels']}) on {report['data']}"
    ]
    if "estimates" in report:
        lines += [
            f"{report['num_rows']} images of {report['num_dimensions']} dimensions, {report['num_draws']} masks each",
            "",
            f"{'':<12} {'bits/dimension':>18}",
        ]
        for name, figures in report["estimates"].items():
            text = cell(figures["bits_per_dimension"], figures["bits_per_dimension_standard_error"])
            lines.append(f"{name:<12} {text:>18}  {figures['label']}")
    return "\n".join(lines)


def samples_table(report: Mapping[str, Any]) -> str:
    """Return its second part: an empty line, and how good the samples are; every figure says how many there were."""
    facts = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in report["samples"].items()
        if value is not None
    )
    lines = ["", f"samples: {facts}"]
    for name in _FIGURES:
        if name in report:
            lines.append(_sample_line(name, report[name]))
    for note in report["notes"]:
        lines += textwrap.wrap(f"note: {note}", 110, subsequent_indent="  ")
    return "\n".join(lines)


def bound_figures(
    name: str, nats: npt.NDArray[np.float64], num_dimensions: int, labels: str
) -> dict[str, Any]:
    """Return the figures of one of the `estimates` of a report.

    Args:
        name: "nelbo", "grid_nelbo" or "coded_loss".
        nats: (N,) float64, of every image.
        num_dimensions: of an image.
        labels: the kind of labels the model has.

    Raises:
        ValueError: some images have no finite likelihood.
    """
    if not np.isfinite(nats).all():
        raise ValueError("the model gives these images no finite likelihood; are its weights sound?")
    mean = mean_over_rows(nats, np.full(len(nats), num_dimensions))
    error = mean.standard_error
    return {
        "label": NOT_A_BOUND if name == "coded_loss" else BOUNDS[labels],
        "bits_per_dimension": mean.value / math.log(2),
        "bits_per_dimension_standard_error": None if error is None else error / math.log(2),
        "nats_per_image": float(nats.mean()),
    }


def _sample_line(name: str, figures: Mapping[str, Any]) -> str:
    error = next((figures[key] for key in _ERRORS if key in figures), None)
    beside = [
        f"{key.replace('_', ' ')} {figures[key]:.4f}"
        for key in ("floor", "classifier_accuracy")
        if key in figures
    ]
    beside += [
        f"{key} {figures[key]}" for key in ("n", "n_reference", "n_floor", "num_features") if key in figures
    ]
    remark = f" ({figures['remark']})" if "remark" in figures else ""
    return f"{name:<28} {cell(figures['value'], error):>18}  {', '.join(beside)}{remark}: {figures['label']}"


def cell(value: float | None, error: float | None) -> str:
    """Return a figure with its error as a cell of a table; empty without a figure."""
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
