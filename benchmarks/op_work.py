"""What every public op of `kernels` must move and compute, counted by hand.

Bytes are those that no implementation can do without: every input read once, every output written once. FLOPs count
each multiplication, division, addition, comparison and exponential of floats as one; integer arithmetic, copies and
what is done once for a row, a channel or a vocabulary count none.

Shapes as in `benchmarks.op_inputs`.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.op_inputs import HEAD_SIZE, Size, codec_of

Count = Callable[[Size], int]


def embed_bytes(size: Size) -> int:
    """The digits, the table, and bfloat16 features."""
    return 8 * size["T"] * size["S"] + _table_bytes(size, size["D"] // size["S"]) + 2 * size["T"] * size["D"]


def embed_gradient_bytes(size: Size) -> int:
    """Those, the gradient of the features, and that of the table."""
    return embed_bytes(size) + 2 * size["T"] * size["D"] + _table_bytes(size, size["D"] // size["S"])


def planes_bytes(size: Size) -> int:
    """The digits, the table, and bfloat16 features."""
    num_digits = size["B"] * size["C"] * size["H"] ** 2 * size["S"]
    return 8 * num_digits + _table_bytes(size, size["E"]) + 2 * num_digits * size["E"]


def _table_bytes(size: Size, num_columns: int) -> int:
    return 2 * (codec_of(size).base + 1) * num_columns


def norm_silu_bytes(size: Size) -> int:
    """Images in and out, weight and bias, scale and shift, all bfloat16."""
    return 4 * num_pixels(size) + 4 * size["C"] + 4 * size["B"] * size["C"]


def norm_silu_flops(size: Size) -> int:
    """A value each: 1 for the mean, 3 for the variance, 2 for the affine map it all folds into, 3 for SiLU."""
    return 9 * num_pixels(size)


def num_pixels(size: Size) -> int:
    """Return the values of all images."""
    return size["B"] * size["C"] * size["H"] ** 2


def norm_bytes(size: Size) -> int:
    """The stream in float32, the result in bfloat16, weight, shift and scale."""
    return 6 * size["T"] * size["D"] + 12 * size["D"]


def residual_bytes(size: Size) -> int:
    """The stream in and out in float32, the branch in bfloat16, the gate."""
    return 10 * size["T"] * size["D"] + 4 * size["D"]


def residual_norm_bytes(size: Size) -> int:
    """As `residual_bytes`, with a bfloat16 result, weight, shift and scale."""
    return residual_bytes(size) + 2 * size["T"] * size["D"] + 12 * size["D"]


def per_feature(flops: int) -> Count:
    """Return the count of so many FLOPs for each feature of each token.

    A norm with modulation is 7: 1 for the mean, 3 for the variance, 2 factors and the shift. A gated residual is 2.
    Rotation is 6 for two features, of q and k: 6 for each of the D.
    """
    return lambda size: flops * size["T"] * size["D"]


def rotate_bytes(size: Size) -> int:
    """Queries and keys in and out in bfloat16, the angles in float32; values stay where they are."""
    return 8 * size["T"] * size["D"] + 4 * size["T"] * HEAD_SIZE


def compact_bytes(size: Size) -> int:
    """A flag in and an index out for each row, and their number."""
    return 9 * size["R"] + 8


def copy_bytes(size: Size) -> int:
    """Every row in and out, an index for each, and their number."""
    return 16 * size["R"] * size["D"] + 8 * size["R"] + 8


def draw_bytes(size: Size) -> int:
    """Logits and the packed digits (16 bits) of all tokens; per row y in and out, due, u and finite."""
    per_row = 4 * size["V"] + 16 * size["S"] + size["S"] + 8 + 1
    return size["R"] * per_row + 2 * size["V"]


def truncated_bytes(size: Size) -> int:
    """The same; per row temperature, top k and top p."""
    return draw_bytes(size) + size["R"] * (4 + 8 + 4)


def digit_draw_bytes(size: Size) -> int:
    """The same with a number for every digit."""
    return draw_bytes(size) + 8 * size["R"] * (size["S"] - 1)


def nll_bytes(size: Size) -> int:
    """Logits and the digits of all tokens; per row y_t, x_0 and a float32 result."""
    return size["R"] * (4 * size["V"] + 8 * size["S"] + 8 + 4) + 8 * size["V"] * size["S"]


def nll_gradient_bytes(size: Size) -> int:
    """The backward pass reads the logits again and writes their gradient."""
    return nll_bytes(size) + 8 * size["R"] * size["V"]


def subtoken_nll_bytes(size: Size) -> int:
    """As `nll_bytes`, with two results."""
    return nll_bytes(size) + 4 * size["R"]


def revealed_bytes(size: Size) -> int:
    """Logits and the digits of all tokens; per row both states and a float32 result."""
    return size["R"] * (4 * size["V"] + 16 * size["S"] + 4) + 8 * size["V"] * size["S"]


def linear_bytes(size: Size) -> int:
    """Features, head and the digits of all tokens; per row y_t, x_0 and its weight."""
    return _linear_bytes(size) + 4 * size["R"] + 4


def linear_gradient_bytes(size: Size) -> int:
    """The same, and the gradients of features, weight and bias, each as large as what it is of."""
    return linear_bytes(size) + 4 * (size["R"] * size["D"] + size["V"] * size["D"] + size["V"])


def linear_subtoken_bytes(size: Size) -> int:
    """Features, head and the digits of all tokens; per row y_t, x_0 and two results."""
    return _linear_bytes(size) + 8 * size["R"]


def _linear_bytes(size: Size) -> int:
    head = 4 * size["V"] * (size["D"] + 1)
    return head + size["R"] * (4 * size["D"] + 8 * size["S"] + 8) + 8 * size["V"] * size["S"]


def linear_flops(num_products: int, of_logits: Count) -> Count:
    """Return the count of so many products of all features with the whole head, and of what the logits cost.

    Args:
        num_products: 1, or 3 with the gradients of features and weight.
        of_logits: as where the logits are given, and for each logit 1 for the bias, with a gradient 2.
    """
    return lambda size: 2 * num_products * size["R"] * size["D"] * size["V"] + of_logits(size)


def per_logit(flops: int) -> Count:
    """Return the count of so many FLOPs for each of R V logits.

    A sum of exponentials is 4: a comparison for the maximum, a subtraction, an exponential, an addition; its gradient
    is 4 more. A draw has the temperature's division too. Every further set of tokens of a row is one more addition.
    """
    return lambda size: flops * size["R"] * size["V"]


def subtoken_flops(size: Size) -> int:
    """A set of tokens for each digit beside the first one."""
    return (4 + size["S"]) * size["R"] * size["V"]


def biased_subtoken_flops(size: Size) -> int:
    """The same, and the bias."""
    return subtoken_flops(size) + size["R"] * size["V"]


def packed_bytes(size: Size) -> int:
    """Features in, features out, weight and bias, all bfloat16."""
    return 2 * (size["R"] * (size["K"] + size["N"]) + size["N"] * (size["K"] + 1))


def packed_flops(size: Size) -> int:
    """A multiplication and an addition for each feature in of each feature out, and its bias."""
    return 2 * size["R"] * size["K"] * size["N"] + size["R"] * size["N"]
