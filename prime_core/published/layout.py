"""What the tensors of a published text network say about it, and what only its configuration can say.

Sizes come from tensors wherever they can; the configuration record, the metadata and the command line fill in
the rest (context length, noise schedule, dropout).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from prime_core.codec import smallest_base
from prime_core.config import CodecConfig, Config, DiTConfig, LinearConfig, explain
from prime_core.published.unpickler import InertRecord
from prime_core.weights import CheckpointError

PREFIX = "backbone."
ROTARY = "rotary_emb.inv_freq"
EMBEDDING = "vocab_embed.embedding"
HEAD = ("output_layer.linear.weight", "output_layer.linear.bias")
SIGMA = "sigma_map.mlp.0.weight"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Facts:
    """What is known beside the tensors; None where nothing is known.

    Attributes:
        num_heads: attention heads.
        length: context in tokens.
        vocab_size: V, used as a cross-check.
        eps: noise schedule alpha_t = 1 - (1 - eps) t.
        noise: name of the noise schedule.
        parameterization: name of the training objective's parameterization.
        time_conditioned: whether the network sees the noise level.
        dropout: share of activations dropped in training.
    """

    num_heads: int | None = None
    length: int | None = None
    vocab_size: int | None = None
    eps: float | None = None
    noise: str | None = None
    parameterization: str | None = None
    time_conditioned: bool | None = None
    dropout: float | None = None


def facts_of_record(record: Any) -> Facts:
    """Read facts from the configuration of a published checkpoint: nested dictionaries or records of them."""
    return Facts(
        num_heads=_integer(look_up(record, "model", "n_heads")),
        length=_integer(look_up(record, "model", "length")),
        vocab_size=_integer(look_up(record, "prime", "vocab_size")),
        eps=_number(look_up(record, "noise", "eps")),
        noise=_text(look_up(record, "noise", "type")),
        parameterization=_text(look_up(record, "parameterization")),
        time_conditioned=_flag(look_up(record, "time_conditioning")),
        dropout=_number(look_up(record, "model", "dropout")),
    )


def facts_of_metadata(metadata: Mapping[str, str]) -> Facts:
    """Read facts from the metadata of a safetensors file (keys heads, length, V)."""
    numbers = {key: int(value) for key, value in metadata.items() if re.fullmatch(r"[0-9]{1,9}", value)}
    return Facts(num_heads=numbers.get("heads"), length=numbers.get("length"), vocab_size=numbers.get("V"))


def look_up(record: Any, *path: str) -> Any:
    """Follow keys through dictionaries and inert records; None where the path ends early.

    A configuration node keeps its children in `_content` and a leaf its value in `_val`.
    """
    node = _unwrapped(record)
    for key in path:
        node = _unwrapped(node.get(key)) if isinstance(node, dict) else None
    return node


def _unwrapped(node: Any) -> Any:
    for _ in range(8):  # a hostile record may contain itself
        if not isinstance(node, InertRecord) or not isinstance(node.state, dict):
            break
        state = node.state
        node = state["_val"] if "_val" in state else state.get("_content", state)
    return node


def _integer(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < 1e9 else None


def _text(value: Any) -> str | None:
    # "${...}" is an unresolved reference to another key.
    return value if isinstance(value, str) and not value.startswith("${") else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def infer_config(where: str, shapes: Shapes, facts: Facts) -> Config:
    """Return the configuration of a published text network.

    Args:
        where: what to name in messages.
        shapes: of every tensor below `backbone.`, buffers included, names without the prefix.
        facts: what tensors cannot tell.

    Raises:
        CheckpointError: the tensors are not of this layout, contradict each other, or something is unknown
            that a command-line flag can supply.
    """
    for name in (EMBEDDING, SIGMA, *HEAD):
        if len(shapes.get(name, ())) != (1 if name.endswith("bias") else 2) or 0 in shapes[name]:
            raise CheckpointError(f"{where}: no usable tensor {PREFIX}{name}; not a published text network")
    codec, hidden_size = _infer_codec(where, shapes, facts)
    if facts.parameterization in {"d3pm", "sedd", "ar"}:
        raise CheckpointError(
            f"{where}: parameterization {facts.parameterization!r} is not masked diffusion over tokens (subs)"
        )
    if facts.noise not in (None, "loglinear") and facts.eps is None:
        raise CheckpointError(
            f"{where}: noise schedule {facts.noise!r} is unknown; if 1 - (1 - eps) t fits, pass --eps"
        )
    if facts.length is None:
        raise CheckpointError(f"{where}: the context length is not in the file; pass --length")
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    try:
        return Config(
            model=DiTConfig(
                hidden_size=hidden_size,
                num_blocks=len(blocks),
                num_heads=_infer_heads(where, shapes, facts, hidden_size),
                cond_dim=shapes[SIGMA][0],
                length=facts.length,
                dropout=0.1 if facts.dropout is None else facts.dropout,
                time_conditioned=facts.time_conditioned is True,
            ),
            codec=codec,
            schedule=LinearConfig(eps=1e-3 if facts.eps is None else facts.eps),
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}: not a usable network: {explain(error)}") from None


def _infer_codec(where: str, shapes: Shapes, facts: Facts) -> tuple[CodecConfig, int]:
    num_symbols, embedding_size = shapes[EMBEDDING]
    num_outputs, hidden_size = shapes[HEAD[0]]
    target_length, rest = divmod(hidden_size, embedding_size)
    if rest or not 1 <= target_length <= 24:
        raise CheckpointError(
            f"{where}: {PREFIX}{EMBEDDING} is {embedding_size} wide, the network {hidden_size}: no multiple"
        )
    # A network without sub-tokens has an output for the mask too, the last one, which is never sampled.
    vocab_size = num_outputs - 1 if target_length == 1 and num_outputs == num_symbols else num_outputs
    if vocab_size < 2 or smallest_base(vocab_size, target_length) != num_symbols - 1:
        raise CheckpointError(
            f"{where}: {num_outputs} outputs, {target_length} digits a token: base b must be smallest with "
            f"b^{target_length} >= V and {PREFIX}{EMBEDDING} have b + 1 rows, found {num_symbols}"
        )
    # Some count the mask as a token, so one more is not a contradiction.
    if facts.vocab_size is not None and abs(facts.vocab_size - vocab_size) > 1:
        raise CheckpointError(f"{where}: says V = {facts.vocab_size}, but the tensors have V = {vocab_size}")
    try:
        return CodecConfig(vocab_size=vocab_size, target_length=target_length), hidden_size
    except ValidationError:
        raise CheckpointError(
            f"{where}: V = {vocab_size} with {target_length} digits a token is out of range"
        ) from None


def _infer_heads(where: str, shapes: Shapes, facts: Facts, hidden_size: int) -> int:
    """Rotary embedding has half as many frequencies as a head has features."""
    if ROTARY not in shapes:
        if facts.num_heads is None:
            raise CheckpointError(f"{where}: the number of heads is not in the file; pass --num-heads")
        return facts.num_heads
    num_frequencies = shapes[ROTARY][0] if len(shapes[ROTARY]) == 1 else 0
    if num_frequencies < 1 or hidden_size % (2 * num_frequencies):
        raise CheckpointError(
            f"{where}: {PREFIX}{ROTARY} {shapes[ROTARY]} does not fit the width {hidden_size}"
        )
    num_heads = hidden_size // (2 * num_frequencies)
    if facts.num_heads not in (None, num_heads):
        raise CheckpointError(
            f"{where}: {facts.num_heads} heads were given, but {PREFIX}{ROTARY} has {num_frequencies} "
            f"frequencies, which makes {num_heads} heads"
        )
    return num_heads


def check_rotary(where: str, frequencies: Tensor) -> None:
    """Check that the stored rotary frequencies are 1e4^(-i/n): (n,) floating.

    Raises:
        CheckpointError: they are others; the network would compute something else here.
    """
    count = len(frequencies)
    expected = 1e4 ** -(torch.arange(count, dtype=torch.float64) / count)
    if not torch.allclose(frequencies.double(), expected, rtol=1e-2, atol=0):
        raise CheckpointError(
            f"{where}: {PREFIX}{ROTARY} does not have base 10000; this network is not supported"
        )
