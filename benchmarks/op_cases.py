"""Every public op of `kernels` at the sizes it has in use: the registry of `prime-bench kernels`.

An op is one entry of `OPS`: the function, its sizes, how inputs of a size are made, and what it must move and multiply.
Bytes are those that no implementation can do without: every input read once, every output written once. FLOPs count
each exponential, division, comparison and addition of a float as one; integer arithmetic and copies count none.

Shapes: R rows (one token position each), T tokens, V tokens of the vocabulary, S digits a token, D features, b = base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.embed import embed_subtokens
from kernels.marginal import reveal_digits
from kernels.nll import coded_nll, subtoken_nll
from kernels.noise import Purpose, uniform
from kernels.reveal import reveal_tokens
from prime_core.codec import SubtokenCodec

Size = Mapping[str, int]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Op:
    """How one op is measured.

    Attributes:
        function: the public op; if it has a parameter ``backend``, its Triton kernel is measured too.
        sizes: by scale ("cpu", "cuda", "smoke"), what letters stand for.
        inputs: makes the keyword arguments of a call, a new set each time.
        num_bytes: what a call must move.
        num_flops: what a call computes.
        backward: also take the gradient with respect to ``logits`` or ``table``.
    """

    function: Callable[..., Any]
    sizes: Mapping[str, tuple[Size, ...]]
    inputs: Callable[[Size, torch.Generator, torch.device], Inputs]
    num_bytes: Callable[[Size], int]
    num_flops: Callable[[Size], int]
    backward: bool = False


TEXT = {"V": 50257, "S": 4}
PIXELS = {"V": 256, "S": 2}
TINY = {"V": 300, "S": 2}


def _sizes(cpu: tuple[Size, ...], cuda: tuple[Size, ...], smoke: Size) -> dict[str, tuple[Size, ...]]:
    return {"cpu": cpu, "cuda": cuda, "smoke": (smoke,)}


def _codec(size: Size) -> SubtokenCodec:
    return SubtokenCodec(size["V"], size["S"])


def _masked(codec: SubtokenCodec, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Mask half of the digits of tokens (R,); at least one digit of each."""
    y = codec.encode(tokens)
    hidden = torch.rand(y.shape, generator=generator, device=y.device) < 0.5
    hidden[:, 0] |= ~hidden.any(-1)
    return y.masked_fill(hidden, codec.mask_index)


def embed_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Digits (T, S), some masked, and a bfloat16 table (b + 1, D / S)."""
    base = _codec(size).base
    shape = (base + 1, size["D"] // size["S"])
    table = torch.randn(shape, generator=generator, device=device).bfloat16()
    y = torch.randint(base + 1, (size["T"], size["S"]), generator=generator, device=device)
    return {"y_t": y, "table": table}


def draw_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits (R, V) and how tokens are drawn from them: no truncation, every masked digit due."""
    codec, num_rows = _codec(size), size["R"]
    tokens = torch.randint(size["V"], (num_rows,), generator=generator, device=device)
    y = _masked(codec, tokens, generator)
    return {
        "logits": 2 * torch.randn(num_rows, size["V"], generator=generator, device=device),
        "y": y,
        "due": y == codec.mask_index,
        "digits": codec.digits.to(device),
        "u": _uniform(num_rows, generator, device),
        "temperature": torch.ones(num_rows, device=device),
        "top_k": torch.zeros(num_rows, dtype=torch.int64, device=device),
        "top_p": torch.ones(num_rows, device=device),
        "mask_index": codec.mask_index,
    }


def digit_draw_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same with a number for every digit."""
    u = _uniform(size["R"] * size["S"], generator, device).view(size["R"], size["S"])
    return draw_inputs(size, generator, device) | {"u": u}


def truncated_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same with top k and top p."""
    inputs = draw_inputs(size, generator, device)
    top_k = torch.full((size["R"],), min(100, size["V"]), dtype=torch.int64, device=device)
    return inputs | {"top_k": top_k, "top_p": torch.full((size["R"],), 0.9, device=device)}


def nll_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits (R, V), tokens, and their partly masked digits."""
    codec = _codec(size)
    tokens = torch.randint(size["V"], (size["R"],), generator=generator, device=device)
    return {
        "logits": 2 * torch.randn(size["R"], size["V"], generator=generator, device=device),
        "y_t": _masked(codec, tokens, generator),
        "x_0": tokens,
        "digits": codec.digits.to(device),
        "mask_index": codec.mask_index,
    }


def noise_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """A seed, a position and an index for each of R numbers."""
    words = torch.randint(2**32, (4, size["R"]), generator=generator, device=device)
    return {
        "seed": words[:2].T.contiguous(),
        "positions": words[2],
        "index": words[3],
        "purpose": Purpose.DRAW,
    }


def _uniform(num: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(num, dtype=torch.float64, generator=generator, device=device).clamp(1e-9, 1 - 1e-9)


def draw_bytes(size: Size) -> int:
    """Logits and the digits of all tokens; per row y in and out, due, u, temperature, top k, top p and finite."""
    per_row = 4 * size["V"] + 16 * size["S"] + size["S"] + 8 + 4 + 8 + 4 + 1
    return size["R"] * per_row + 8 * size["V"] * size["S"]


def nll_bytes(size: Size) -> int:
    """Logits and the digits of all tokens; per row y_t, x_0 and a float32 result."""
    return size["R"] * (4 * size["V"] + 8 * size["S"] + 8 + 4) + 8 * size["V"] * size["S"]


def embed_bytes(size: Size) -> int:
    """The digits, the table, and bfloat16 features."""
    base = _codec(size).base
    return 8 * size["T"] * size["S"] + 2 * (base + 1) * (size["D"] // size["S"]) + 2 * size["T"] * size["D"]


def _per_logit(flops: int) -> Callable[[Size], int]:
    return lambda size: flops * size["R"] * size["V"]


_EMBED_SIZES = _sizes(
    ({"T": 512, "D": 768, **TEXT},), ({"T": 65536, "D": 768, **TEXT},), {"T": 8, "D": 8, **TINY}
)
_DRAW_SIZES = _sizes(
    ({"R": 64, **TEXT}, {"R": 256, **PIXELS}), ({"R": 256, **TEXT}, {"R": 4096, **PIXELS}), {"R": 4, **TINY}
)
_NLL_SIZES = _sizes(
    ({"R": 128, **TEXT}, {"R": 4096, **PIXELS}),
    ({"R": 4096, **TEXT}, {"R": 65536, **PIXELS}),
    {"R": 4, **TINY},
)

OPS: dict[str, Op] = {
    "embed_subtokens": Op(embed_subtokens, _EMBED_SIZES, embed_inputs, embed_bytes, lambda size: 0),
    "reveal_tokens": Op(reveal_tokens, _DRAW_SIZES, draw_inputs, draw_bytes, _per_logit(5)),
    "reveal_tokens, top k and p": Op(reveal_tokens, _DRAW_SIZES, truncated_inputs, draw_bytes, _per_logit(5)),
    "reveal_digits": Op(
        reveal_digits,
        _sizes(({"R": 256, **PIXELS},), ({"R": 4096, **PIXELS},), {"R": 4, "V": 16, "S": 2}),
        digit_draw_inputs,
        lambda size: draw_bytes(size) + 8 * size["R"] * (size["S"] - 1),
        _per_logit(5),
    ),
    "coded_nll": Op(coded_nll, _NLL_SIZES, nll_inputs, nll_bytes, _per_logit(4)),
    # The backward pass reads the logits again and writes their gradient.
    "coded_nll and gradient": Op(
        coded_nll,
        _NLL_SIZES,
        nll_inputs,
        lambda size: nll_bytes(size) + 8 * size["R"] * size["V"],
        _per_logit(8),
        backward=True,
    ),
    "subtoken_nll": Op(
        subtoken_nll,
        _NLL_SIZES,
        nll_inputs,
        lambda size: nll_bytes(size) + 4 * size["R"],
        lambda size: (4 + size["S"]) * size["R"] * size["V"],
    ),
    "uniform": Op(
        uniform,
        _sizes(({"R": 65536},), ({"R": 2**24},), {"R": 64}),
        noise_inputs,
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
