"""`prime-eval`: what a model pays for held-out text, per token and in bits per byte, with standard errors.

`nelbo` and `grid_nelbo` are bounds of the negative log-likelihood and may be called so; `coded_loss`, the
published training loss, is not a bound for more than one digit a token and is labelled accordingly.

Images are measured by `evaluate_images`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from prime_core.checkpoint import Checkpoint, load_checkpoint
from prime_core.device import choose_device
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.models.denoiser import device_of
from prime_core.scoring.scored import MAX_EXPONENT
from training.baselines import unigram_nats, xz_bits_per_byte
from training.command_line import load_settings
from training.data.corpus import CorpusOptions
from training.evaluation_noise import NOISE_ROWS, noise_seeds
from training.heldout import HeldoutText, cut_rows, mean_over_rows, read_documents
from training.images import evaluate as evaluate_images
from training.images.report import NOT_A_BOUND, cell
from training.model_kind import is_toy, makes_images
from training.progress import progress_bar
from training.shared_settings import CheckpointSettings

BOUND = "likelihood bound"
EXACT = "exact code length"


class EvalConfig(CheckpointSettings):
    """Measure held-out text under a checkpoint: nelbo and coded_loss per token and in bits per byte.

    Of an image model: held-out images and samples; with its --checkpoint, --help lists the settings of images.
    """

    model_config = SettingsConfigDict(
        env_prefix="PRIME_EVAL_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    data: tuple[Path, ...] = Field(
        min_length=1, description="held-out files and folders of .txt, .jsonl, also .gz, .zst"
    )
    baselines: tuple[Path, ...] = Field(
        default=(), description="training text: also report xz -9e and a unigram model given this text"
    )
    document_separator: Literal["blank_line", "file"] = Field(
        default="blank_line", description=".txt: what ends a document"
    )
    text_key: str = Field(default="text", description=".jsonl: key of the text")
    grid_steps: int | None = Field(
        default=None, ge=1, description="also report grid_nelbo, the bound of a sampler with so many steps"
    )
    num_draws: int = Field(default=4, ge=1, description="masks drawn per row")
    rows: int | None = Field(
        default=None, ge=1, description="rows, evenly spread over the text; default: all, every token once"
    )
    length: int | None = Field(
        default=None, ge=1, description="tokens of a row; default: the model's context"
    )
    batch_rows: int = Field(
        default=8, ge=1, le=NOISE_ROWS, description="rows in memory at a time (times num_draws)"
    )
    chunk_rows: int = Field(default=1024, ge=1, description="tokens whose logits are in memory at a time")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the masks")
    as_json: bool = Field(default=False, description="print JSON instead of a table (short: --json)")


def evaluate(config: EvalConfig, *, progress: bool = True) -> dict[str, Any]:
    """Run an evaluation.

    Args:
        config: what to measure.
        progress: show progress bars.

    Returns:
        The report; see `_figures` for its entries.

    Raises:
        ValueError: the checkpoint or corpus cannot be read, or a setting does not fit them.
        OSError: likewise.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    checkpoint = load_checkpoint(config.checkpoint, device=choose_device(config.device), dtype=config.dtype)
    context = checkpoint.config.model.length
    length = context if config.length is None else config.length
    if length > context:
        raise ValueError(f"--length is {length}, but the model's context holds {context} tokens")
    if checkpoint.tokenizer is None:
        raise ValueError(f"{config.checkpoint} has no tokenizer, and text needs one")
    options = CorpusOptions(config.document_separator, config.text_key)
    documents = read_documents(config.data, options)
    text = cut_rows(documents, checkpoint.tokenizer, length, config.rows)
    report: dict[str, Any] = {
        "checkpoint": str(config.checkpoint),
        "step": checkpoint.config.provenance.get("step"),
        "target_length": checkpoint.config.codec.target_length,
        "dtype": checkpoint.dtype_name,
        "data": [str(path) for path in config.data],
        "num_documents": text.num_documents,
        "num_rows": len(text.rows),
        "num_tokens": int(text.row_tokens.sum()),
        "num_bytes": int(text.row_bytes.sum()),
        "row_length": length,
        "num_draws": config.num_draws,
        "seed": config.seed,
        "estimates": _estimates(config, checkpoint, text, progress),
    }
    if config.baselines:
        training = read_documents(config.baselines, options)
        report["baselines"] = {
            "unigram": _figures(text, unigram_nats(text, training, checkpoint.tokenizer), EXACT),
            # Of the whole text, whichever rows were chosen.
            "xz": {"label": "xz -9e of this text alone", "bits_per_byte": xz_bits_per_byte(documents)},
            "xz_given_training": {
                "label": "xz -9e: what this text adds to the training text",
                "bits_per_byte": xz_bits_per_byte(documents, training),
            },
        }
    return report


def _estimates(
    config: EvalConfig, checkpoint: Checkpoint, text: HeldoutText, progress: bool
) -> dict[str, dict[str, Any]]:
    """Estimate every objective, block by block; each has noise of its own, so none changes another."""
    noise, grid_noise = (torch.Generator().manual_seed(seed) for seed in noise_seeds(config.seed, 2))
    nats: dict[str, list[npt.NDArray[np.float64]]] = {"nelbo": [], "coded_loss": []}
    model = (checkpoint.denoiser, checkpoint.codec, checkpoint.schedule)
    device = device_of(checkpoint.denoiser)
    options: dict[str, Any] = {
        "num_draws": config.num_draws,
        "batch_rows": config.batch_rows,
        "chunk_rows": config.chunk_rows,
    }
    with progress_bar(total=len(text.rows), unit="row", shown=progress) as bar:
        for rows in text.batches(NOISE_ROWS):
            x_0 = torch.from_numpy(rows).to(device)
            both = estimate_likelihood(*model, x_0, generator=noise, **options)
            nats["nelbo"].append(both.nelbo.cpu().numpy())
            nats["coded_loss"].append(both.coded_loss.cpu().numpy())
            if config.grid_steps is not None:
                grid = estimate_grid_nelbo(*model, x_0, config.grid_steps, generator=grid_noise, **options)
                nats.setdefault("grid_nelbo", []).append(grid.cpu().numpy())
            bar.update(len(rows))
    estimates = {
        name: _figures(text, np.concatenate(parts), NOT_A_BOUND if name == "coded_loss" else BOUND)
        for name, parts in nats.items()
    }
    if config.grid_steps is not None:
        estimates["grid_nelbo"]["steps"] = config.grid_steps
    return estimates


def _figures(text: HeldoutText, nats: npt.NDArray[np.float64], label: str) -> dict[str, Any]:
    """Return label, nats per token, bits per byte, standard errors; `ppl` for what is a likelihood."""
    if not np.isfinite(nats).all():
        raise ValueError("the model gives this text no finite likelihood; are its weights sound?")
    per_token, per_byte = mean_over_rows(nats, text.row_tokens), mean_over_rows(nats, text.row_bytes)
    error = per_byte.standard_error
    figures: dict[str, Any] = {
        "label": label,
        "nats_per_token": per_token.value,
        "nats_per_token_standard_error": per_token.standard_error,
        "bits_per_byte": per_byte.value / math.log(2),
        "bits_per_byte_standard_error": None if error is None else error / math.log(2),
    }
    if label != NOT_A_BOUND:
        figures["ppl"] = math.exp(min(per_token.value, MAX_EXPONENT))
    return figures


def table(report: dict[str, Any]) -> str:
    """Return a report as text, one line a figure."""
    lines = [
        f"{report['checkpoint']} (step {report['step']}, {report['dtype']}, {report['target_length']} digits "
        f"a token) on {', '.join(report['data'])}",
        f"{report['num_tokens']} tokens, {report['num_bytes']} bytes, {report['num_documents']} documents; "
        f"{report['num_rows']} rows of {report['row_length']}, {report['num_draws']} draws each",
        "",
        f"{'':<18} {'nats/token':>18} {'bits/byte':>18} {'ppl':>10}",
    ]
    for name, figures in {**report["estimates"], **report.get("baselines", {})}.items():
        cells = [
            cell(figures.get(key), figures.get(f"{key}_standard_error"))
            for key in ("nats_per_token", "bits_per_byte")
        ]
        ppl = f"{figures['ppl']:.2f}" if "ppl" in figures else ""
        lines.append(f"{name:<18} {cells[0]:>18} {cells[1]:>18} {ppl:>10}  {figures['label']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: ``prime-eval --checkpoint DIR --data FILE ...``; returns 0, or 2 after an error."""
    arguments = sys.argv[1:] if argv is None else argv
    if makes_images(arguments, "PRIME_EVAL_"):
        return evaluate_images.main(arguments)
    if is_toy(arguments, "PRIME_EVAL_") and not {"-h", "--help"} & set(arguments):
        print(
            "prime-eval: a toy2d checkpoint has no evaluation beyond that of its training: heldout_nelbo and "
            "heldout_entropy in the run's metrics.jsonl, and preview.png",
            file=sys.stderr,
        )
        return 2
    try:
        config = load_settings(EvalConfig, "prime-eval", arguments, synonyms={"json": "as_json"})
        report = evaluate(config)
    except (ValueError, OSError) as error:
        print(f"prime-eval: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report, indent=2) if config.as_json else table(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
