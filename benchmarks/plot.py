"""`prime-bench plot`: results as one SVG picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import UsageError
from benchmarks.document import write_whole
from benchmarks.report import machine_line, milliseconds
from benchmarks.svg import Bar, Chart, draw


def plot_files(results: Sequence[Path], output: Path) -> None:
    """Draw documents of any benchmarks below each other.

    Args:
        results: what `prime-bench ... --output` wrote.
        output: the picture; replaced whole.

    Raises:
        UsageError: if a file is no result of ours, or there is no folder for the picture.
    """
    if not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {output.parent}")
    charts: list[Chart] = []
    for path in results:
        try:
            document = json.loads(path.read_text("utf-8"))
            charts += _CHARTS[document["benchmark"]](document)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path} is no result of this version of prime-bench: {error}") from None
    write_whole(output, draw(charts))


def _sampler_charts(document: dict[str, Any]) -> list[Chart]:
    """Seconds of every sampler and precision, and the ratios measured and predicted."""
    charts = []
    for entry in document.get("workloads", [document]):
        bars = [
            Bar(
                f"{run['sampler']}, {run['dtype']}",
                run["median_s"],
                _seconds(run["median_s"]) + ("*" if run["extrapolated"] else ""),
                int(run["sampler"] == "dense_published"),
            )
            for run in entry["runs"]
        ]
        labels = {run["extrapolated"]["label"] for run in entry["runs"] if run["extrapolated"]}
        note = machine_line(document) + (f"; *{', '.join(sorted(labels))}" if labels else "")
        legend = ("this project", "published sampler")
        charts.append(Chart(f"Seconds: {entry['workload']}", note, legend, tuple(bars)))
        ratios = [
            Bar(f"{name}, {kind}", ratio[kind], f"{ratio[kind]:.2f}x", series)
            for name, ratio in entry["ratios"].items()
            for series, kind in enumerate(("measured", "predicted"))
            if ratio[kind] is not None
        ]
        charts.append(Chart("Times faster", note, ("measured", "predicted"), tuple(ratios)))
    return charts


def _seconds(seconds: float) -> str:
    """Return three digits, or all before the point: minutes are not shown as powers of ten."""
    return f"{seconds:.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _ops_charts(document: dict[str, Any]) -> list[Chart]:
    bars = [
        Bar(
            f"{entry['op']} ({entry['size']})"[:46],
            entry["share_of_copy_bandwidth"],
            f"{entry['share_of_copy_bandwidth']:.1%} ({milliseconds(entry['seconds'])})",
            int(entry["backend"] == "triton"),
        )
        for entry in document["ops"]
        if entry["seconds"] is not None
    ]
    title = "Bytes an op must move, as a share of the measured copy bandwidth"
    return [Chart(title, machine_line(document), ("reference", "triton"), tuple(bars))]


def _train_charts(document: dict[str, Any]) -> list[Chart]:
    speeds = [
        Bar(run["loop"], run["tokens_per_s"], f"{run['tokens_per_s']:.4g} tokens/s", index)
        for index, run in enumerate(document["runs"])
    ]
    peaks = [
        Bar(run["loop"], peak, f"{peak / 1e6:.0f} MB", index)
        for index, run in enumerate(document["runs"])
        if (peak := run["peak_memory_above_state_bytes"]) is not None
    ]
    legend, note = ("this project's trainer", "plain loop"), machine_line(document)
    return [
        Chart("Training: tokens a second", note, legend, tuple(speeds)),
        Chart("Training: peak memory above weights, moments and average", note, legend, tuple(peaks)),
    ]


def _memory_charts(document: dict[str, Any]) -> list[Chart]:
    sizes = [
        (f"{entry['task']}, {name}", entry[key], series)
        for entry in document["tasks"]
        for series, (name, key) in enumerate(
            (("peak", "peak_bytes"), ("largest tensor", "largest_tensor_bytes"))
        )
        if entry[key] is not None
    ]
    sizes.append(("all logits (B, L, V)", document["logits_bytes"], 1))
    bars = tuple(Bar(label, size, f"{size / 1e6:.0f} MB", series) for label, size, series in sizes)
    return [Chart("Memory above weights", machine_line(document), ("peak", "largest tensor"), bars)]


def _server_charts(document: dict[str, Any]) -> list[Chart]:
    charts = []
    for loop in document["loops"]:
        load = (
            f"{loop['clients']} clients"
            if loop["loop"] == "closed"
            else f"{loop['rate_per_s']:.2f} arrivals/s"
        )
        note = (
            f"{load}; {loop['requests_per_s']:.2f} requests/s, {loop['text_tokens_per_s']:.1f} tokens/s, "
            f"{loop['images_per_s']:.2f} images/s; {machine_line(document)}"
        )
        kinds = [kind for kind in loop["latency"] if kind != "all"]
        bars = tuple(
            Bar(f"{kind}, {name}", figures[f"{name}_s"], milliseconds(figures[f"{name}_s"]), series)
            for series, kind in enumerate(kinds)
            for figures in [loop["latency"][kind]]
            for name in ("p50", "p90", "p99")
        )
        charts.append(Chart(f"Server, {loop['loop']} loop: latency", note, tuple(kinds), bars))
        cells = _histogram(loop["latency"]["all"])
        charts.append(Chart(f"Server, {loop['loop']} loop: requests by latency", note, (), cells))
    return charts


def _histogram(figures: dict[str, Any]) -> tuple[Bar, ...]:
    """Return the cells of a histogram from the first to the last that is not empty."""
    counts = figures["counts"]
    filled = [index for index, count in enumerate(counts) if count]
    bounds = [milliseconds(bound) for bound in figures["bounds_s"]]
    names = [f"up to {bound}" for bound in bounds] + [f"above {bounds[-1]}"]
    return tuple(
        Bar(names[index], counts[index], str(counts[index]), 0) for index in range(filled[0], filled[-1] + 1)
    )


_CHARTS: dict[str, Callable[[dict[str, Any]], list[Chart]]] = {
    "sampler": _sampler_charts,
    "kernels": _ops_charts,
    "train": _train_charts,
    "memory": _memory_charts,
    "server": _server_charts,
}
