"""Inputs of every public op of `kernels` at a given size, random and seeded.

Shapes: R rows (one token position each), T tokens, V tokens of the vocabulary, S digits a token, D features, b = base;
B images of C planes or channels, H pixels high and wide, E features a digit; K features in and N out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.linear import pack_weight
from kernels.linear_nll import LinearHead, Targets
from kernels.noise import Purpose
from kernels.token_digits import TokenDigits
from prime_core.codec import SubtokenCodec

Size = Mapping[str, int]
Inputs = dict[str, Any]

NUM_GROUPS = 32  # of the norms of the image network
HEAD_SIZE = 64  # features of a head of attention in the published text models


def tensors_of(inputs: Inputs) -> Iterator[Tensor]:
    """Yield the tensors of some inputs, also those inside of tuples; of packed digits what every draw reads."""
    for value in inputs.values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, TokenDigits):
                yield part.packed
            elif isinstance(part, Tensor):
                yield part


def codec_of(size: Size) -> SubtokenCodec:
    """Return the codec of V tokens of S digits."""
    return SubtokenCodec(size["V"], size["S"])


def embed_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Digits (T, S), some masked, and a bfloat16 table (b + 1, D / S)."""
    base = codec_of(size).base
    y = torch.randint(base + 1, (size["T"], size["S"]), generator=generator, device=device)
    return {"y_t": y, "table": _normal(generator, device, base + 1, size["D"] // size["S"]).bfloat16()}


def planes_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Digits (B, C, H, H, S), some masked, and a bfloat16 table (b + 1, E); channels-last memory on a GPU."""
    base, side = codec_of(size).base, size["H"]
    shape = (size["B"], size["C"], side, side, size["S"])
    return {
        "y_t": torch.randint(base + 1, shape, generator=generator, device=device),
        "table": _normal(generator, device, base + 1, size["E"]).bfloat16(),
        "memory_format": _memory_format(device),
    }


def norm_silu_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Images (B, C, H, H) in bfloat16 with scale and shift of their own; channels-last memory on a GPU."""
    x = _normal(generator, device, size["B"], size["C"], size["H"], size["H"]).bfloat16()
    vectors = _normal(generator, device, 2, size["C"]).bfloat16()
    conditions = _normal(generator, device, 2, size["B"], size["C"]).bfloat16()
    return {
        "x": x.contiguous(memory_format=_memory_format(device)),
        "weight": vectors[0],
        "bias": vectors[1],
        "num_groups": NUM_GROUPS,
        "scale": conditions[0],
        "shift": conditions[1],
    }


def norm_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """A float32 stream (T, D) and one modulation for all tokens; the result is bfloat16."""
    return {
        "x": _normal(generator, device, size["T"], size["D"]),
        "weight": _normal(generator, device, size["D"]),
        "shift": _normal(generator, device, 1, size["D"]),
        "scale": _normal(generator, device, 1, size["D"]),
        "out_dtype": torch.bfloat16,
    }


def residual_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """A float32 stream (T, D), a bfloat16 branch and one gate for all tokens."""
    return {
        "x": _normal(generator, device, size["T"], size["D"]),
        "branch": _normal(generator, device, size["T"], size["D"]).bfloat16(),
        "gate": _normal(generator, device, 1, size["D"]),
    }


def residual_norm_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """What the residual and the norm behind it read."""
    return residual_inputs(size, generator, device) | norm_inputs(size, generator, device)


def rotate_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Queries, keys and values (T, 3D) in bfloat16, and the angles of their tokens."""
    angles = _normal(generator, device, size["T"], HEAD_SIZE // 2)
    return {
        "qkv": _normal(generator, device, size["T"], 3 * size["D"]).bfloat16(),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "num_heads": size["D"] // HEAD_SIZE,
    }


def compact_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Which of R rows changed: about half."""
    return {"changed": torch.rand(size["R"], generator=generator, device=device) < 0.5}


def gather_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """R rows of D int64 in a random order, all of them to be copied."""
    return {"source": _rows(size, generator, device), **_places(size, generator, device, "out")}


def scatter_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same, to be copied back."""
    return {"rows": _rows(size, generator, device), **_places(size, generator, device, "target")}


def draw_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits (R, V) and how tokens are drawn from them: at temperature 1 without truncation, every masked digit due.

    As the samplers ask for it: digits packed once, and no tensors of settings that change nothing.
    """
    codec, num_rows = codec_of(size), size["R"]
    tokens = torch.randint(size["V"], (num_rows,), generator=generator, device=device)
    y = _masked(codec, tokens, generator)
    return {
        "logits": _logits(size, generator, device),
        "y": y,
        "due": y == codec.mask_index,
        "digits": TokenDigits(codec.digits.to(device), codec.mask_index),
        "u": _uniform(num_rows, generator, device),
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "mask_index": codec.mask_index,
    }


def digit_draw_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same with a number for every digit."""
    u = _uniform(size["R"] * size["S"], generator, device).view(size["R"], size["S"])
    return draw_inputs(size, generator, device) | {"u": u}


def truncated_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same with a temperature, top k and top p."""
    num_rows = size["R"]
    return draw_inputs(size, generator, device) | {
        "temperature": torch.full((num_rows,), 0.8, device=device),
        "top_k": torch.full((num_rows,), min(100, size["V"]), dtype=torch.int64, device=device),
        "top_p": torch.full((num_rows,), 0.9, device=device),
    }


def nll_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits (R, V), tokens, and their partly masked digits."""
    codec = codec_of(size)
    tokens = torch.randint(size["V"], (size["R"],), generator=generator, device=device)
    return {
        "logits": _logits(size, generator, device),
        "y_t": _masked(codec, tokens, generator),
        "x_0": tokens,
        "digits": codec.digits.to(device),
        "mask_index": codec.mask_index,
    }


def revealed_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Logits (R, V), and two states of the same tokens: partly masked, and with every digit."""
    codec = codec_of(size)
    after = codec.encode(torch.randint(size["V"], (size["R"],), generator=generator, device=device))
    hidden = torch.rand(after.shape, generator=generator, device=device) < 0.5
    return {
        "logits": _logits(size, generator, device),
        "before": after.masked_fill(hidden, codec.mask_index),
        "after": after,
        "digits": codec.digits.to(device),
        "mask_index": codec.mask_index,
    }


def linear_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Features (R, D), a head (V, D), and tokens with all digits masked: every token is possible, the most work."""
    codec = codec_of(size)
    tokens = torch.randint(size["V"], (size["R"],), generator=generator, device=device)
    y_t = torch.full((size["R"], size["S"]), codec.mask_index, device=device)
    return {
        "features": _normal(generator, device, size["R"], size["D"]),
        "head": LinearHead(
            size["D"] ** -0.5 * _normal(generator, device, size["V"], size["D"]),
            _normal(generator, device, size["V"]),
        ),
        "targets": Targets(y_t, tokens, codec.digits.to(device), codec.mask_index),
    }


def weighted_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """The same with a weight for every row."""
    weights = torch.rand(size["R"], generator=generator, device=device)
    return linear_inputs(size, generator, device) | {"token_weights": weights, "objective": "coded"}


def packed_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """Features (R, K) and a packed weight (N, K), both bfloat16.

    Raises:
        NotImplementedError: if weights cannot be packed here.
    """
    packed = pack_weight(_normal(generator, device, size["N"], size["K"]).bfloat16())
    if packed is None:
        raise NotImplementedError("weights cannot be packed on this processor or with this build of torch")
    x = _normal(generator, device, size["R"], size["K"]).bfloat16()
    return {"x": x, "packed": packed, "bias": _normal(generator, device, size["N"]).bfloat16()}


def noise_inputs(size: Size, generator: torch.Generator, device: torch.device) -> Inputs:
    """A seed, a position and an index for each of R numbers."""
    words = torch.randint(2**32, (4, size["R"]), generator=generator, device=device)
    return {
        "seed": words[:2].T.contiguous(),
        "positions": words[2],
        "index": words[3],
        "purpose": Purpose.DRAW,
    }


def _normal(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=device)


def _logits(size: Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return 2 * _normal(generator, device, size["R"], size["V"])


def _uniform(num: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(num, dtype=torch.float64, generator=generator, device=device).clamp(1e-9, 1 - 1e-9)


def _masked(codec: SubtokenCodec, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """Mask half of the digits of tokens (R,); at least one digit of each."""
    y = codec.encode(tokens)
    hidden = torch.rand(y.shape, generator=generator, device=y.device) < 0.5
    hidden[:, 0] |= ~hidden.any(-1)
    return y.masked_fill(hidden, codec.mask_index)


def _memory_format(device: torch.device) -> torch.memory_format:
    """Return how the image network lays images out on a device."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _rows(size: Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.randint(2**32, (size["R"], size["D"]), generator=generator, device=device)


def _places(size: Size, generator: torch.Generator, device: torch.device, target: str) -> Inputs:
    return {
        "indices": torch.randperm(size["R"], generator=generator, device=device),
        "count": torch.tensor([size["R"]], device=device),
        target: torch.zeros(size["R"], size["D"], dtype=torch.int64, device=device),
    }
