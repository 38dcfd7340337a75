"""Kernel of `kernels.group_norm`: GroupNorm, scale, shift and SiLU with two reads and one write.

Shapes: B images, C channels in G groups, P pixels of an image. One program owns K whole groups of one image, a tile of
K C / G channels, and goes over the pixels twice: statistics, then results. K is 1 where the pixels of a channel lie
side by side; channels-last takes so many groups that the channels of a pixel fill 64 bytes or more of memory.

Statistics are merged block by block (Chan, Golub and LeVeque, 1983): per channel a mean and a centred sum of squares,
so a mean that is large against the spread costs no precision, and a second read is not needed for it. The channels of a
group are joined at the end.

It must move two reads and one write of B C P values; the second read mostly hits the L2 cache. For B = 64, C = 288, P =
1024 in bfloat16 that is 38 MB twice (one read, one write): 25 us at 3 TB/s. About 15 FLOPs and one exponential a value;
memory is the floor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.group_norm import is_channels_last
from kernels.triton_ops.compile_case import CompileCase

# Values of a tile: with eight warps, sixteen a thread.
_TILE = 4096
_NUM_WARPS = 8
# Channels of bfloat16 that fill 64 bytes: two sectors of memory.
_SECTORS = 32


@triton.jit
def group_norm_silu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    eps,
    NUM_PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    MODULATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """NUM_GROUPS groups of GROUP channels of one image; BLOCK_* are their numbers, filled up to powers of two."""
    image = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK_CHANNELS)
    channel = tl.program_id(1) * (NUM_GROUPS * GROUP) + local
    mine = (local < NUM_GROUPS * GROUP) & (channel < CHANNELS)
    pixel = tl.arange(0, BLOCK_PIXELS)
    if CHANNELS_LAST:
        offset = pixel[:, None] * CHANNELS + channel[None, :]
        block_stride = BLOCK_PIXELS * CHANNELS
    else:
        offset = channel[None, :] * NUM_PIXELS + pixel[:, None]
        block_stride = BLOCK_PIXELS
    start = image * NUM_PIXELS * CHANNELS

    mean = tl.zeros([BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    source = x_ptr + start + offset
    for first in range(0, NUM_PIXELS, BLOCK_PIXELS):
        inside = (first + pixel < NUM_PIXELS)[:, None] & mine[None, :]
        x = tl.load(source, inside, other=0.0).to(tl.float32)
        count = tl.sum((first + pixel < NUM_PIXELS).to(tl.float32), 0)
        block_mean = tl.sum(x, 0) / count
        centred = tl.where(inside, x - block_mean[None, :], 0.0)
        distance = block_mean - mean
        share = count / (first + count)
        mean += distance * share
        squares += tl.sum(centred * centred, 0) + distance * distance * first * share
        source += block_stride

    # Join the channels of each group; the table of which channel is whose has a few hundred entries.
    group = tl.arange(0, BLOCK_GROUPS)
    member = (local[:, None] // GROUP == group[None, :]) & mine[:, None]
    group_mean = tl.sum(tl.where(member, mean[:, None], 0.0), 0) / GROUP
    distance = tl.where(member, mean[:, None] - group_mean[None, :], 0.0)
    spread = tl.where(member, squares[:, None], 0.0) + NUM_PIXELS * distance * distance
    variance = tl.sum(spread, 0) / (NUM_PIXELS * GROUP)
    inverse_std = 1.0 / tl.sqrt(variance + eps)
    centre = tl.sum(tl.where(member, group_mean[None, :], 0.0), 1)
    slope = tl.sum(tl.where(member, inverse_std[None, :], 0.0), 1)

    slope *= tl.load(weight_ptr + channel, mine, other=0.0).to(tl.float32)
    lift = tl.load(bias_ptr + channel, mine, other=0.0).to(tl.float32)
    if MODULATED:
        scale = 1.0 + tl.load(scale_ptr + image * CHANNELS + channel, mine, other=0.0).to(tl.float32)
        slope *= scale
        lift = lift * scale + tl.load(shift_ptr + image * CHANNELS + channel, mine, other=0.0).to(tl.float32)

    source = x_ptr + start + offset
    target = out_ptr + start + offset
    for first in range(0, NUM_PIXELS, BLOCK_PIXELS):
        inside = (first + pixel < NUM_PIXELS)[:, None] & mine[None, :]
        x = tl.load(source, inside, other=0.0).to(tl.float32)
        # Zero outside: no exponential overflows for values that are not there.
        h = tl.where(inside, (x - centre[None, :]) * slope[None, :] + lift[None, :], 0.0)
        if ACTIVATION:
            h = h * tl.sigmoid(h)
        tl.store(target, h.to(out_ptr.dtype.element_ty), inside)
        source += block_stride
        target += block_stride


def launch_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: bool,
    eps: float,
) -> Tensor:
    """Run the kernel; arguments as `kernels.group_norm.group_norm_silu`."""
    channels_last = is_channels_last(x)
    if not channels_last:
        x = x.contiguous()
    out = torch.empty_like(x)
    num_images, channels, height, width = x.shape
    if x.numel() == 0:
        return out
    blocks = _blocks(channels, num_groups, height * width, channels_last)
    together = blocks["NUM_GROUPS"]
    with torch.cuda.device_of(x):
        group_norm_silu_kernel[(num_images, triton.cdiv(num_groups, together))](
            x,
            weight.contiguous(),
            bias.contiguous(),
            None if scale is None else scale.contiguous(),
            None if shift is None else shift.contiguous(),
            out,
            eps,
            **blocks,
            CHANNELS_LAST=channels_last,
            MODULATED=scale is not None,
            ACTIVATION=activation,
            num_warps=_NUM_WARPS,
        )
    return out


def _blocks(channels: int, num_groups: int, num_pixels: int, channels_last: bool) -> dict[str, int]:
    """Sizes of a program's tile."""
    group = channels // num_groups
    together = min(num_groups, max(1, _SECTORS // group)) if channels_last else 1
    block_channels = triton.next_power_of_2(together * group)
    block_pixels = max(1, min(triton.next_power_of_2(num_pixels), _TILE // block_channels))
    return {
        "NUM_PIXELS": num_pixels,
        "CHANNELS": channels,
        "GROUP": group,
        "NUM_GROUPS": together,
        "BLOCK_GROUPS": triton.next_power_of_2(together),
        "BLOCK_CHANNELS": block_channels,
        "BLOCK_PIXELS": block_pixels,
    }


def _case(channels: int, size: int, dtype: str, *, channels_last: bool, modulated: bool) -> CompileCase:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{dtype}:16")
    types["eps"] = "fp32"
    conditions = ("scale_ptr", "shift_ptr")
    if modulated:
        types |= dict.fromkeys(conditions, f"*{dtype}:16")
    constants = {
        **({} if modulated else dict.fromkeys(conditions)),
        **_blocks(channels, 32, size * size, channels_last),
        "CHANNELS_LAST": channels_last,
        "MODULATED": modulated,
        "ACTIVATION": True,
    }
    layout = "NHWC" if channels_last else "NCHW"
    title = f"group_norm_silu {channels}x{size}x{size} {dtype} {layout}{' modulated' if modulated else ''}"
    return CompileCase(title, group_norm_silu_kernel, types, constants, _NUM_WARPS)


COMPILE_CASES = [
    *(
        _case(channels, size, "bf16", channels_last=channels_last, modulated=True)
        for channels, size in ((288, 32), (384, 16), (384, 8))
        for channels_last in (True, False)
    ),
    _case(288, 32, "fp32", channels_last=True, modulated=True),
    _case(384, 16, "fp32", channels_last=False, modulated=True),
    _case(672, 32, "bf16", channels_last=True, modulated=False),
    _case(768, 16, "bf16", channels_last=True, modulated=False),
]
