"""The result of a benchmark as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MISSING = "-"


def to_json(document: dict[str, Any]) -> str:
    """Return the document as JSON text, refusing NaN and infinity."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write the document to a file whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(to_json(document), "utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sampler_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench sampler` for a person to read."""
    settings, machine, rates = document["settings"], document["machine"], document["rates"]
    products = rates["product_flops_per_s"]
    lines = [
        f"{settings['model']} model, V={settings['vocab_size']}, S={settings['target_length']}, "
        f"L={settings['length']}, N={settings['steps']}, B={settings['batch']}, "
        f"median of {settings['repeats']} interleaved runs",
        f"{machine['cpu']}, {machine['num_threads']} threads, torch {document['versions']['torch']}, "
        f"commit {document['commit'] or 'unknown'}",
        "",
        *_columns(
            [("sampler", "dtype", "tokens/s", "seconds", "predicted", "calls", "row-steps", "peak MB")]
            + [_run_cells(run) for run in document["runs"]]
        ),
        "",
        *_columns(
            [("planned is faster", "measured", "predicted")]
            + [
                (f"{name} (x)", _number(ratio["measured"]), _number(ratio["predicted"]))
                for name, ratio in document["ratios"].items()
            ]
        ),
        "",
        f"product {'x'.join(map(str, rates['product_shape']))}: "
        + ", ".join(f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in products.items())
        + f"; copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s",
        *(
            f"trunk {trunk['dtype']}: {trunk['flops_per_s'] / 1e12:.3f} TFLOP/s, "
            f"{trunk['share_of_product_rate']:.0%} of the product rate"
            for trunk in document["trunk"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _run_cells(run: dict[str, Any]) -> tuple[str, ...]:
    peak = run["peak_memory_above_weights_bytes"]
    return (
        run["sampler"],
        run["dtype"],
        _number(run["tokens_per_s"]),
        f"{run['median_s']:.2f}",
        f"{run['predicted_s']:.2f}",
        str(run["denoiser_calls"]),
        str(run["row_steps"]),
        _MISSING if peak is None else f"{peak / 1e6:.0f}",
    )


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.1f}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align cells: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
