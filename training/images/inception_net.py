"""Inception v3 as FID and the Inception Score use it: the network of 2015 with 1008 outputs, ported to torch.

Module names are those of the published state dictionary (`Mixed_5b.branch1x1.conv.weight`, ...). It differs from
the usual Inception v3 in three points, on which published figures rest:

- average pools of branches do not count the padding;
- the last block, Mixed_7c, has a max pool in place of the average pool;
- pictures are resized to 299 x 299 as TensorFlow 1 did: bilinear, the corner of the grid at pixel 0 and no
  smoothing, and scaled to (x - 128) / 128.

Shapes: N pictures, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 2048
NUM_CLASSES = 1008
INPUT_SIZE = 299


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


class _BlockA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, width: int, pool_width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(width, 64)
        self.branch5x5_1 = _Conv(width, 48)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(width, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(width, pool_width)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        branches = self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double
        return torch.cat([*branches, self.branch_pool(_average(x))], 1)


class _BlockB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(width, 64)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _halve(x)], 1)


class _BlockC(nn.Module):
    """17 x 17: 7x7 convolutions as pairs of 1x7 and 7x1."""

    def __init__(self, inner: int, width: int = 768) -> None:
        super().__init__()
        across, down = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        self.branch1x1 = _Conv(width, 192)
        self.branch7x7_1 = _Conv(width, inner)
        self.branch7x7_2 = _Conv(inner, inner, across[0], padding=across[1])
        self.branch7x7_3 = _Conv(inner, 192, down[0], padding=down[1])
        self.branch7x7dbl_1 = _Conv(width, inner)
        self.branch7x7dbl_2 = _Conv(inner, inner, down[0], padding=down[1])
        self.branch7x7dbl_3 = _Conv(inner, inner, across[0], padding=across[1])
        self.branch7x7dbl_4 = _Conv(inner, inner, down[0], padding=down[1])
        self.branch7x7dbl_5 = _Conv(inner, 192, across[0], padding=across[1])
        self.branch_pool = _Conv(width, 192)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class _BlockD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(width, 192)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(width, 192)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(long), _halve(x)], 1)


class _BlockE(nn.Module):
    """8 x 8: 3x3 convolutions that fork into 1x3 and 3x1."""

    def __init__(self, width: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch1x1 = _Conv(width, 320)
        self.branch3x3_1 = _Conv(width, 384)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(width, 448)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(width, 192)
        self._pool = pool

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        forks = (self.branch3x3_2a(single), self.branch3x3_2b(single),
                 self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double))  # fmt: skip
        return torch.cat([self.branch1x1(x), *forks, self.branch_pool(self._pool(x))], 1)


class InceptionNet(nn.Module):
    """Features and logits of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _BlockA(192, 32)
        self.Mixed_5c = _BlockA(256, 64)
        self.Mixed_5d = _BlockA(288, 64)
        self.Mixed_6a = _BlockB(288)
        self.Mixed_6b = _BlockC(128)
        self.Mixed_6c = _BlockC(160)
        self.Mixed_6d = _BlockC(160)
        self.Mixed_6e = _BlockC(192)
        self.Mixed_7a = _BlockD(768)
        self.Mixed_7b = _BlockE(1280, _average)
        self.Mixed_7c = _BlockE(2048, _largest)
        self.fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Look at pictures.

        Args:
            pictures: (N, 3, H, W) uint8.

        Returns:
            features (N, 2048), on which FID rests, and logits (N, 1008) without the bias of the last layer, as
            the Inception Score takes them.
        """
        x = (resize(pictures.float()) - 128) / 128
        x = _halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        features = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(pictures: Tensor) -> Tensor:
    """Resize pictures to 299 x 299: value i of the new grid lies at i * size / 299 of the old one.

    Args:
        pictures: (N, 3, H, W) floating point.

    Returns:
        (N, 3, 299, 299).
    """
    rows, columns = (_interpolation(size).to(pictures) for size in pictures.shape[2:])
    return rows @ pictures @ columns.T


def _interpolation(size: int) -> Tensor:
    """Weights (299, size) of linear interpolation; both neighbours are the last value beyond it."""
    places = torch.arange(INPUT_SIZE, dtype=torch.float64) * size / INPUT_SIZE
    below = places.floor().long()
    above = (below + 1).clamp_max(size - 1)
    share = (places - below)[:, None]
    return (1 - share) * F.one_hot(below, size) + share * F.one_hot(above, size)
