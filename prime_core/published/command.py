"""`prime-import FILE --output DIR`: convert a published network of text or images to a checkpoint folder."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from prime_core.config import (
    Config,
    CosineConfig,
    DiTConfig,
    LinearConfig,
    PolynomialConfig,
    ScheduleConfig,
)
from prime_core.published.importer import Imported, ImportOptions, import_published


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one line on standard error."""
    given = _parser().parse_args(arguments)
    options = ImportOptions(
        raw=given.raw,
        dtype=given.dtype,
        num_heads=given.num_heads,
        length=given.length,
        eps=given.eps,
        tokenizer=given.tokenizer,
        size=given.size,
        head_channels=given.head_channels,
        schedule=given.schedule,
        overwrite=given.overwrite,
    )
    try:
        imported = import_published(given.file, given.output, options)
    except (OSError, ValueError) as error:
        where = f"{given.output}: " if isinstance(error, OSError) and error.filename is None else ""
        print(f"prime-import: {where}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(summary(imported, given.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prime-import", description=__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="published .ckpt (text) or .pth (images), or .safetensors with backbone.* or model.* tensors",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="checkpoint folder to write"
    )
    parser.add_argument("--raw", action="store_true", help="raw weights instead of their moving average")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the written weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DIR")
    text = parser.add_argument_group("text networks")
    text.add_argument("--num-heads", type=int, help="attention heads, if the file does not tell")
    text.add_argument("--length", type=int, help="context in tokens; default: what the file says")
    text.add_argument(
        "--eps", type=float, help="schedule alpha_t = 1 - (1 - eps) t; default: the file's, or 1e-3"
    )
    text.add_argument("--tokenizer", default="auto", help="auto, gpt2, none, or a .tiktoken rank file")
    images = parser.add_argument_group("image networks")
    images.add_argument(
        "--size", type=_size, metavar="HxW", help="of the pictures; default: the file's, or 32x32"
    )
    images.add_argument(
        "--head-channels",
        type=_positive,
        metavar="N",
        help="width of an attention head; default: the file's, or 64 where it fits, else 32",
    )
    images.add_argument(
        "--schedule",
        type=_schedule,
        metavar="KIND[:NUMBER]",
        help="polynomial:N is (1 - t)^N, linear:EPS is 1 - (1 - EPS) t, cosine; default: the file's, or polynomial:3",
    )
    return parser


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive number")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not HEIGHTxWIDTH, such as 32x32")
    return int(match[1]), int(match[2])


def _schedule(text: str) -> ScheduleConfig:
    kind, _, number = text.partition(":")
    makers: dict[str, Callable[[float], ScheduleConfig]] = {
        "linear": lambda value: LinearConfig(eps=value),
        "polynomial": lambda value: PolynomialConfig(power=value),
    }
    try:
        if text == "cosine":
            return CosineConfig()
        return makers[kind](float(number))
    except (KeyError, ValidationError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not linear:EPS with 0 <= EPS < 1, polynomial:N with 0 < N <= 100, or cosine"
        ) from None


def summary(imported: Imported, output: Path) -> str:
    """Return what was imported, one line a subject."""
    config, codec = imported.config, imported.config.codec
    lines = [
        f"written    {output}",
        f"network    {_network(config)}, {'time-conditioned' if config.model.time_conditioned else 'time-free'}",
        f"codec      V = {codec.vocab_size}, {codec.target_length} digits of base {codec.base} a token",
        f"parameters {imported.num_parameters:,}",
        f"schedule   {config.schedule.model_dump_json()}",
        f"tokenizer  {config.tokenizer.kind}",
        *(f"{key:<10} {value}" for key, value in config.provenance.items()),
        *(f"note       {note}" for note in imported.notes),
    ]
    return "\n".join(lines)


def _network(config: Config) -> str:
    model = config.model
    if isinstance(model, DiTConfig):
        return (
            f"dit, width {model.hidden_size}, {model.num_blocks} blocks, {model.num_heads} heads, "
            f"context {model.length}"
        )
    widths = [model.model_channels * mult for mult in model.channel_mult]
    labels = f"{model.num_labels} labels" if model.labels != "none" else "no labels"
    return (
        f"unet, {model.height}x{model.width} pictures of {model.channels} planes, levels {widths} wide, "
        f"{model.num_res_blocks} blocks each, attention at rates {list(model.attention_rates)} with heads of "
        f"{model.head_channels}, {labels}"
    )


if __name__ == "__main__":
    sys.exit(main())
