"""`prime-import FILE --output DIR`: convert a published text network to a checkpoint folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from prime_core.published import Imported, ImportOptions, import_published


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
        overwrite=given.overwrite,
    )
    try:
        imported = import_published(given.file, given.output, options)
    except (OSError, ValueError) as error:
        print(f"prime-import: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(summary(imported, given.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prime-import", description=__doc__)
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="published .ckpt, or .safetensors with backbone.*"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="checkpoint folder to write"
    )
    parser.add_argument("--raw", action="store_true", help="raw weights instead of their moving average")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the written weights"
    )
    parser.add_argument("--num-heads", type=int, help="attention heads, if the file does not tell")
    parser.add_argument("--length", type=int, help="context in tokens; default: what the file says")
    parser.add_argument(
        "--eps", type=float, help="schedule alpha_t = 1 - (1 - eps) t; default: the file's, or 1e-3"
    )
    parser.add_argument("--tokenizer", default="auto", help="auto, gpt2, none, or a .tiktoken rank file")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DIR")
    return parser


def summary(imported: Imported, output: Path) -> str:
    """Return what was imported, one line a subject."""
    config, model, codec = imported.config, imported.config.model, imported.config.codec
    lines = [
        f"written    {output}",
        f"network    dit, width {model.hidden_size}, {model.num_blocks} blocks, {model.num_heads} heads, "
        f"context {model.length}, {'time-conditioned' if model.time_conditioned else 'time-free'}",
        f"codec      V = {codec.vocab_size}, {codec.target_length} digits of base {codec.base} a token",
        f"parameters {imported.num_parameters:,}",
        f"schedule   {config.schedule.model_dump_json()}",
        f"tokenizer  {config.tokenizer.kind}",
        *(f"{key:<10} {value}" for key, value in config.provenance.items()),
        *(f"note       {note}" for note in imported.notes),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
