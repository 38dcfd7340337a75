"""Every public op of `kernels` at the sizes it has in use: the registry of `prime-bench kernels`.

An op is one entry of `OPS`: the function, its sizes, how inputs of a size are made (`benchmarks.op_inputs`), and what
it must move and compute (`benchmarks.op_work`). The in-place forms of the draws are not here: they draw as the others
do, but what one call has written leaves the next one nothing to draw.

Shapes as in `benchmarks.op_inputs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks import op_inputs as inputs
from benchmarks import op_work as work
from benchmarks.op_inputs import Inputs, Size
from benchmarks.op_work import Count
from kernels.embed import embed_planes, embed_subtokens
from kernels.group_norm import group_norm_silu
from kernels.linear import packed_linear
from kernels.linear_nll import linear_nll, linear_subtoken_nll
from kernels.marginal import reveal_digits
from kernels.modulate import gated_residual, norm_modulate, residual_norm_modulate, rotate_qk
from kernels.nll import coded_nll, revealed_nll, subtoken_nll
from kernels.noise import uniform
from kernels.reveal import reveal_tokens
from kernels.rows import compact_rows, gather_rows, scatter_rows


@dataclass(frozen=True)
class Op:
    """How one op is measured.

    Attributes:
        function: the public op; if it has a parameter ``backend``, its Triton kernel is measured too.
        sizes: by scale ("cpu", "cuda", "smoke"), what letters stand for; no sizes for a device it is not for.
        inputs: makes the keyword arguments of a call, a new set each time.
        num_bytes: what a call must move.
        num_flops: what a call computes.
        gradient_of: arguments whose gradients a call takes too, given that of its result.
        product: number type of the products that its FLOPs are compared with.
    """

    function: Callable[..., Any]
    sizes: Mapping[str, tuple[Size, ...]]
    inputs: Callable[[Size, torch.Generator, torch.device], Inputs]
    num_bytes: Count
    num_flops: Count
    gradient_of: tuple[str, ...] = ()
    product: Literal["float32", "bfloat16"] = "float32"


TEXT = {"V": 50257, "S": 4}
PIXELS = {"V": 256, "S": 2}
TINY = {"V": 300, "S": 2}


def _sizes(cpu: tuple[Size, ...], cuda: tuple[Size, ...], smoke: Size) -> dict[str, tuple[Size, ...]]:
    return {"cpu": cpu, "cuda": cuda, "smoke": (smoke,)}


_EMBED_SIZES = _sizes(
    ({"T": 512, "D": 768, **TEXT},), ({"T": 65536, "D": 768, **TEXT},), {"T": 8, "D": 8, **TINY}
)
_PLANES_SIZES = _sizes(
    ({"B": 1, "C": 3, "H": 32, "E": 48, **PIXELS},),
    ({"B": 64, "C": 3, "H": 32, "E": 48, **PIXELS},),
    {"B": 2, "C": 1, "H": 4, "E": 8, "V": 16, "S": 2},
)
_IMAGE_SIZES = _sizes(
    ({"B": 1, "C": 288, "H": 32},), ({"B": 64, "C": 288, "H": 32},), {"B": 2, "C": 32, "H": 4}
)
_TOKEN_SIZES = _sizes(({"T": 512, "D": 768},), ({"T": 65536, "D": 768},), {"T": 8, "D": 64})
# Rows of the step cache: the digits of a text of 1024 tokens.
_ROW_SIZES = _sizes(({"R": 64, "D": 4096},), ({"R": 512, "D": 4096},), {"R": 4, "D": 8})
_DRAW_SIZES = _sizes(
    ({"R": 64, **TEXT}, {"R": 256, **PIXELS}), ({"R": 256, **TEXT}, {"R": 4096, **PIXELS}), {"R": 4, **TINY}
)
_NLL_SIZES = _sizes(
    ({"R": 128, **TEXT}, {"R": 4096, **PIXELS}),
    ({"R": 4096, **TEXT}, {"R": 65536, **PIXELS}),
    {"R": 4, **TINY},
)
_LINEAR_SIZES = _sizes(
    ({"R": 128, "D": 768, **TEXT},), ({"R": 4096, "D": 768, **TEXT},), {"R": 4, "D": 8, **TINY}
)

OPS: dict[str, Op] = {
    "embed_subtokens": Op(
        embed_subtokens, _EMBED_SIZES, inputs.embed_inputs, work.embed_bytes, lambda size: 0
    ),
    "embed_subtokens and gradient": Op(
        embed_subtokens,
        _EMBED_SIZES,
        inputs.embed_inputs,
        work.embed_gradient_bytes,
        work.per_feature(1),  # added to a row of the table
        gradient_of=("table",),
    ),
    "embed_planes": Op(embed_planes, _PLANES_SIZES, inputs.planes_inputs, work.planes_bytes, lambda size: 0),
    "group_norm_silu": Op(
        group_norm_silu, _IMAGE_SIZES, inputs.norm_silu_inputs, work.norm_silu_bytes, work.norm_silu_flops
    ),
    "norm_modulate": Op(
        norm_modulate, _TOKEN_SIZES, inputs.norm_inputs, work.norm_bytes, work.per_feature(7)
    ),
    "gated_residual": Op(
        gated_residual, _TOKEN_SIZES, inputs.residual_inputs, work.residual_bytes, work.per_feature(2)
    ),
    "residual_norm_modulate": Op(
        residual_norm_modulate,
        _TOKEN_SIZES,
        inputs.residual_norm_inputs,
        work.residual_norm_bytes,
        work.per_feature(9),
    ),
    "rotate_qk": Op(rotate_qk, _TOKEN_SIZES, inputs.rotate_inputs, work.rotate_bytes, work.per_feature(6)),
    "packed_linear": Op(
        packed_linear,
        {"cpu": ({"R": 512, "K": 768, "N": 3072},), "cuda": (), "smoke": ({"R": 4, "K": 16, "N": 8},)},
        inputs.packed_inputs,
        work.packed_bytes,
        work.packed_flops,
        product="bfloat16",
    ),
    "compact_rows": Op(
        compact_rows,
        _sizes(({"R": 4096},), ({"R": 65536},), {"R": 64}),
        inputs.compact_inputs,
        work.compact_bytes,
        lambda size: 0,
    ),
    "gather_rows": Op(gather_rows, _ROW_SIZES, inputs.gather_inputs, work.copy_bytes, lambda size: 0),
    "scatter_rows": Op(scatter_rows, _ROW_SIZES, inputs.scatter_inputs, work.copy_bytes, lambda size: 0),
    "reveal_tokens": Op(reveal_tokens, _DRAW_SIZES, inputs.draw_inputs, work.draw_bytes, work.per_logit(5)),
    "reveal_tokens, top k and p": Op(
        reveal_tokens, _DRAW_SIZES, inputs.truncated_inputs, work.truncated_bytes, work.per_logit(5)
    ),
    "reveal_digits": Op(
        reveal_digits,
        _sizes(({"R": 256, **PIXELS},), ({"R": 4096, **PIXELS},), {"R": 4, "V": 16, "S": 2}),
        inputs.digit_draw_inputs,
        work.digit_draw_bytes,
        work.per_logit(5),
    ),
    "coded_nll": Op(coded_nll, _NLL_SIZES, inputs.nll_inputs, work.nll_bytes, work.per_logit(4)),
    "coded_nll and gradient": Op(
        coded_nll,
        _NLL_SIZES,
        inputs.nll_inputs,
        work.nll_gradient_bytes,
        work.per_logit(8),
        gradient_of=("logits",),
    ),
    "subtoken_nll": Op(
        subtoken_nll, _NLL_SIZES, inputs.nll_inputs, work.subtoken_nll_bytes, work.subtoken_flops
    ),
    "revealed_nll": Op(
        revealed_nll, _NLL_SIZES, inputs.revealed_inputs, work.revealed_bytes, work.per_logit(5)
    ),
    "linear_nll": Op(
        linear_nll,
        _LINEAR_SIZES,
        inputs.weighted_inputs,
        work.linear_bytes,
        work.linear_flops(1, work.per_logit(5)),
    ),
    "linear_nll and gradient": Op(
        linear_nll,
        _LINEAR_SIZES,
        inputs.weighted_inputs,
        work.linear_gradient_bytes,
        work.linear_flops(3, work.per_logit(10)),
        gradient_of=("features", "head"),
    ),
    "linear_subtoken_nll": Op(
        linear_subtoken_nll,
        _LINEAR_SIZES,
        inputs.linear_inputs,
        work.linear_subtoken_bytes,
        work.linear_flops(1, work.biased_subtoken_flops),
    ),
    "uniform": Op(
        uniform,
        _sizes(({"R": 65536},), ({"R": 2**24},), {"R": 64}),
        inputs.noise_inputs,
        lambda size: 40 * size["R"],  # 32 in, 8 out
        lambda size: 2 * size["R"],
    ),
}


def describe_size(size: Size) -> str:
    """Return a size for a table: "R=256, V=50257, S=4"."""
    return ", ".join(f"{name}={value}" for name, value in size.items())


def num_input_sets(set_bytes: int, cache_bytes: int, limit_bytes: int = 8 * 2**30) -> int:
    """Return how many input sets are used in turn, so that none is still in a cache when it comes again.

    Args:
        set_bytes: of one set.
        cache_bytes: of the last cache.
        limit_bytes: most memory for all sets; at least two are used.
    """
    wanted = math.ceil(2 * cache_bytes / max(set_bytes, 1)) + 1
    return max(2, min(wanted, 16, limit_bytes // max(set_bytes, 1)))
