"""A linear layer that keeps its weight a second time, in the layout of the CPU's vector units, for inference.

Shapes: R rows, K features in, N features out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.linear import Activation, linear, pack_weight, packed_linear


class PackedLinear(nn.Linear):
    """`nn.Linear` with the same parameters, and after `pack` with a faster product where no gradient is wanted."""

    _packed: Tensor | None = None

    def pack(self) -> None:
        """Pack the weight as it is now; where that does not pay, nothing changes (`kernels.linear.pack_weight`).

        Later changes of the weight are not seen until it is packed again. Training drops what is packed.
        """
        self._packed = pack_weight(self.weight)

    def train(self, mode: bool = True) -> PackedLinear:
        """Set training or evaluation mode; weights that are trained are not packed."""
        if mode:
            self._packed = None
        super().train(mode)
        return self

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        """Map x (R, K) to activation(x W^T + bias) (R, N)."""
        packed = self._packed
        if packed is None or x.device.type != "cpu" or x.dtype != packed.dtype or torch.is_grad_enabled():
            return linear(x, self.weight, self.bias, activation)
        return packed_linear(x, packed, self.bias, activation)


def pack_linears(network: nn.Module) -> None:
    """Pack every `PackedLinear` of a network that is in evaluation mode and stays as it is."""
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.pack()
