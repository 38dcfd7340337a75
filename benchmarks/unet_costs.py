"""FLOPs of the image network, counted by hand.

A convolution of k x k from f to g features takes 2 k^2 f g a pixel. A residual block has two of 3 x 3 and, where its
width changes, one of 1 x 1; attention at width f over P pixels takes 2 f 3f a pixel for q, k, v, 2 f f for the output
and 4 P f for scores and values. The head is a 3 x 3 convolution: 2 9 f V a token. Norms, activations and the
conditioning are left out: they are bytes, not products.
"""

from __future__ import annotations

from prime_core.config import UNetConfig


def unet_trunk_flops(config: UNetConfig, num_images: float) -> float:
    """Return the FLOPs of the trunk for so many images."""
    widths = [config.model_channels * mult for mult in config.channel_mult]
    pixels = config.height * config.width
    total, skips, dim = 0.0, [widths[0]], widths[0]
    for level, width in enumerate(widths):
        at_level = pixels // 4**level
        for _ in range(config.num_res_blocks):
            total += _stage_flops(config, level, dim, width, at_level)
            dim = width
            skips.append(dim)
        if level < len(widths) - 1:
            skips.append(dim)
    lowest = pixels // 4 ** (len(widths) - 1)
    total += 2 * _residual_flops(dim, dim, lowest) + _attention_flops(dim, lowest)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.num_res_blocks + 1):
            total += _stage_flops(config, level, dim + skips.pop(), width, pixels // 4**level)
            dim = width
    return num_images * total


def unet_head_flops(config: UNetConfig, num_positions: float, vocab_size: int) -> float:
    """Return the FLOPs of the output head for so many tokens."""
    return num_positions * 2 * 9 * config.model_channels * config.channel_mult[0] * vocab_size


def _stage_flops(config: UNetConfig, level: int, dim_in: int, dim: int, pixels: int) -> float:
    attends = 2**level in config.attention_rates
    return _residual_flops(dim_in, dim, pixels) + (_attention_flops(dim, pixels) if attends else 0)


def _residual_flops(dim_in: int, dim: int, pixels: int) -> float:
    skip = 2 * dim_in * dim if dim_in != dim else 0
    return pixels * (18 * dim_in * dim + 18 * dim * dim + skip)


def _attention_flops(dim: int, pixels: int) -> float:
    return pixels * (8 * dim * dim + 4 * pixels * dim)
