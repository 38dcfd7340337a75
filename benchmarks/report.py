"""The results of benchmarks as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_MISSING = "-"


def machine_line(document: dict[str, Any]) -> str:
    """Return what computed: device, threads, torch and commit."""
    machine = document["machine"]
    gpu = machine["gpu"]
    threads = "" if machine["num_threads"] is None else f", {machine['num_threads']} threads"
    name = f"{machine['cpu']}{threads}" if gpu is None else gpu["name"]
    return f"{name}, torch {document['versions']['torch']}, commit {document['commit'] or 'unknown'}"


def sampler_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench sampler` for a person to read."""
    lines = [machine_line(document), *_ceiling_lines(document["rates"])]
    for entry in document.get("workloads", [document]):
        repeats = entry["settings"]["repeats"]
        lines += ["", f"{entry['workload']}, median of {repeats} interleaved runs", *_sampler_lines(entry)]
    return "\n".join(lines) + "\n"


def ops_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench kernels`."""
    head = ("op", "size", "backend", "time", "MB", "MFLOP", "GB/s", "of copy", "of product")
    rows = [head, *(_op_cells(entry) for entry in document["ops"])]
    lines = [machine_line(document), *_ceiling_lines(document["rates"]), "", *columns(rows)]
    lines += [f"{e['op']}, {e['backend']}: {e['error']}" for e in document["ops"] if e["seconds"] is None]
    return "\n".join(lines) + "\n"


def memory_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench memory`."""
    settings = document["settings"]
    rows = [("task", "largest tensor", "MB", "peak MB")] + [
        (
            entry["task"],
            " x ".join(map(str, entry["largest_tensor_shape"])),
            _megabytes(entry["largest_tensor_bytes"]),
            _megabytes(entry["peak_bytes"]),
        )
        for entry in document["tasks"]
    ]
    lines = [
        machine_line(document),
        f"{settings['model']} model, V={settings['vocab_size']}, S={settings['target_length']}, "
        f"L={settings['length']}, B={settings['batch_size']}; all logits (B, L, V) would be "
        f"{_megabytes(document['logits_bytes'])} MB",
        "",
        *columns(rows),
    ]
    return "\n".join(lines) + "\n"


def train_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench train`."""
    settings = document["settings"]
    rows = [("loop", "tokens/s", "seconds", "of product rate", "peak MB")] + [
        (
            run["loop"],
            _number(run["tokens_per_s"]),
            f"{run['median_s']:.3f}",
            f"{run['share_of_product_rate']:.0%}",
            _megabytes(run["peak_memory_above_state_bytes"]),
        )
        for run in document["runs"]
    ]
    lines = [
        machine_line(document),
        *_ceiling_lines(document["rates"]),
        f"{settings['model']} model, V={settings['vocab_size']}, S={settings['target_length']}, "
        f"L={settings['length']}, B={settings['batch_size']}, {settings['precision']}",
        "",
        *columns(rows),
        f"the trainer is {document['ratio']:.2f} times as fast",
    ]
    return "\n".join(lines) + "\n"


def server_table(document: dict[str, Any]) -> str:
    """Return the result of `prime-bench server`."""
    lines = [machine_line(document)]
    for loop in document["loops"]:
        load = (
            f"{loop['clients']} clients"
            if loop["loop"] == "closed"
            else f"{loop['rate_per_s']:.2f} arrivals/s"
        )
        useful = loop["useful_row_fraction"]
        rows = [("kind", "answers", "p50", "p90", "p99", "max")] + [
            (kind, str(each["num"]), *(milliseconds(each[f"{p}_s"]) for p in ("p50", "p90", "p99", "max")))
            for kind, each in loop["latency"].items()
        ]
        lines += [
            "",
            f"{loop['loop']} loop, {load}: {loop['requests_per_s']:.2f} requests/s, "
            f"{loop['text_tokens_per_s']:.1f} text tokens/s, {loop['images_per_s']:.2f} images/s, "
            f"{loop['scores_per_s']:.2f} scores/s",
            *columns(rows),
            f"sent {loop['num_sent']}, refused {loop['num_refused']}, failed {loop['num_failed']}; "
            f"useful rows {_MISSING if useful is None else f'{useful:.1%}'}, "
            f"rows a call {_number(loop['rows_per_call'])}",
        ]
    return "\n".join(lines) + "\n"


def headlines(document: dict[str, Any]) -> list[str]:
    """Return the few figures of any document that one looks at first, a line each."""
    if document["benchmark"] == "sampler":
        entries = document.get("workloads", [document])
        ratios = [
            f"{entry['workload']}: {name} {_number(ratio['measured'])}x"
            f" (predicted {_number(ratio['predicted'])}x){'; ' if 'note' in ratio else ''}{ratio.get('note', '')}"
            for entry in entries
            for name, ratio in entry["ratios"].items()
        ]
        graphs = [f"{entry['workload']}: {line}" for entry in entries for line in _graphs_lines(entry)]
        trunks = [
            f"{entry['workload']}: trunk {trunk['dtype']} {trunk['share_of_product_rate']:.0%} of the product rate"
            for entry in entries
            for trunk in entry["trunk"]
        ]
        return ratios + graphs + trunks
    if document["benchmark"] == "kernels":
        return [
            f"{entry['op']}, {entry['size']}, {entry['backend']}: "
            + (
                entry["error"]
                if entry["seconds"] is None
                else f"{milliseconds(entry['seconds'])}, {entry['share_of_copy_bandwidth']:.0%} of the copy bandwidth"
            )
            for entry in document["ops"]
        ]
    if document["benchmark"] == "train":
        trainer, plain = document["runs"]
        peaks = (_megabytes(run["peak_memory_above_state_bytes"]) for run in (trainer, plain))
        return [
            f"trainer {_number(trainer['tokens_per_s'])} tokens/s, plain loop {_number(plain['tokens_per_s'])}, "
            f"peak MB {' and '.join(peaks)}"
        ]
    if document["benchmark"] == "memory":
        return [
            f"{entry['task']}: largest tensor {_megabytes(entry['largest_tensor_bytes'])} MB, peak "
            f"{_megabytes(entry['peak_bytes'])} MB; all logits {_megabytes(document['logits_bytes'])} MB"
            for entry in document["tasks"]
        ]
    return [
        f"{loop['loop']} loop: {loop['requests_per_s']:.2f} requests/s, p50 "
        f"{milliseconds(loop['latency']['all']['p50_s'])}, p99 {milliseconds(loop['latency']['all']['p99_s'])}"
        for loop in document["loops"]
    ]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align cells: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def milliseconds(seconds: float) -> str:
    """Return a time as "12.3 ms", or in another unit where that reads better."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _sampler_lines(entry: dict[str, Any]) -> Iterator[str]:
    head = ("sampler", "dtype", "tokens/s", "seconds", "predicted", "calls", "row-steps", "peak MB")
    yield from columns([head, *(_run_cells(run) for run in entry["runs"])])
    for label in sorted({run["extrapolated"]["label"] for run in entry["runs"] if run["extrapolated"]}):
        yield f"* {label}"
    ratios = [
        (f"{name} (x)", _number(ratio["measured"]), _number(ratio["predicted"]))
        for name, ratio in entry["ratios"].items()
    ]
    yield from columns([("planned is faster", "measured", "predicted"), *ratios])
    yield from _graphs_lines(entry)
    for trunk in entry["trunk"]:
        yield (
            f"trunk {trunk['dtype']}: {trunk['flops_per_s'] / 1e12:.3f} TFLOP/s, "
            f"{trunk['share_of_product_rate']:.0%} of the product rate"
        )


def _graphs_lines(entry: dict[str, Any]) -> Iterator[str]:
    """Say what CUDA graphs made of the planned sampler's time and samples, and in how many of its calls."""
    runs = {(run["sampler"], run["dtype"]): run for run in entry["runs"]}
    for (sampler, dtype), run in runs.items():
        if sampler == "planned_graphs":
            ratio = runs["planned", dtype]["median_s"] / run["median_s"]
            yield (
                f"CUDA graphs, {dtype}: {ratio:.2f} times as fast as planned, {run['graph_replays']} of "
                f"{run['denoiser_calls']} calls; {'the same' if run['same_samples'] else 'OTHER'} samples"
            )


def _run_cells(run: dict[str, Any]) -> tuple[str, ...]:
    star = "*" if run["extrapolated"] else ""
    return (
        run["sampler"],
        run["dtype"],
        _number(run["tokens_per_s"]) + star,
        f"{run['median_s']:.2f}{star}",
        f"{run['predicted_s']:.2f}",
        str(run["denoiser_calls"]),
        str(run["row_steps"]),
        _megabytes(run["peak_memory_above_weights_bytes"]),
    )


def _op_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    names = entry["op"], entry["size"], entry["backend"]
    if entry["seconds"] is None:
        return *names, *[_MISSING] * 6
    return (
        *names,
        milliseconds(entry["seconds"]),
        f"{entry['bytes'] / 1e6:.4g}",
        f"{entry['flops'] / 1e6:.4g}",
        f"{entry['bytes_per_s'] / 1e9:.3g}",
        f"{entry['share_of_copy_bandwidth']:.1%}",
        f"{entry['share_of_product_rate']:.1%}",
    )


def _ceiling_lines(rates: dict[str, Any]) -> list[str]:
    products = ", ".join(
        f"{dtype} {rate / 1e12:.3f} TFLOP/s" for dtype, rate in rates["product_flops_per_s"].items()
    )
    shape = "x".join(map(str, rates["product_shape"]))
    return [f"product {shape}: {products}; copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s"]


def _megabytes(num_bytes: int | None) -> str:
    return _MISSING if num_bytes is None else f"{num_bytes / 1e6:.0f}"


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.1f}"
