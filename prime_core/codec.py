"""Tokens as sub-tokens: the invertible map x <-> (y^1, ..., y^S) of MDM-Prime (arXiv 2505.18495, section 3).

Shapes: B rows, L tokens a row, S = target_length digits a token, V = vocab_size tokens, b = base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prime_core.integers import holds_integers


def smallest_base(vocab_size: int, target_length: int) -> int:
    """Return the smallest integer b with b**target_length >= vocab_size.

    Integer arithmetic throughout: ``round(V ** (1 / l))`` is wrong for exact powers (1000 ** (1/3) < 10).

    Args:
        vocab_size: number of tokens V, at least 2.
        target_length: digits per token, at least 1.

    Raises:
        ValueError: if either argument is out of range.
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    if target_length < 1:
        raise ValueError(f"target_length must be at least 1, got {target_length}")
    low, high = 2, vocab_size
    while low < high:
        middle = (low + high) // 2
        if middle**target_length >= vocab_size:
            high = middle
        else:
            low = middle + 1
    return low


class SubtokenCodec:
    """Writes every token as ``target_length`` base-``base`` digits, most significant digit first.

    With ``target_length == 1`` the digits of a token are the token itself, so a plain masked diffusion model is
    not a special case anywhere else. An optional permutation of the token ids is applied before the digits are
    taken ("index shuffling"): token x gets the digits of ``permutation[x]``.

    Attributes:
        vocab_size: V.
        target_length: S.
        base: b, the smallest integer with b**S >= V.
        mask_index: b, the extra symbol "masked"; sub-tokens take the values 0..b.
        place_values: (S,) int64, what a 1 in each place is worth: b**(S-1), ..., b, 1.
        digits: (V, S) int64, the digits of every token.
        permutation: (V,) int64, or None for the identity.
    """

    def __init__(self, vocab_size: int, target_length: int, permutation: Tensor | None = None) -> None:
        """Build the codec.

        Args:
            vocab_size: number of tokens V, at least 2.
            target_length: digits per token, at least 1 and at most ceil(log2(V)).
            permutation: (V,) integers, each of 0..V-1 once; None for the identity.

        Raises:
            ValueError: if a size is out of range or ``permutation`` is not a permutation of 0..V-1.
        """
        self.base = smallest_base(vocab_size, target_length)
        longest = (vocab_size - 1).bit_length()
        if target_length > longest:
            raise ValueError(
                f"target_length must be 1..{longest} for vocab_size {vocab_size} "
                f"(more digits than bits), got {target_length}"
            )
        self.vocab_size = vocab_size
        self.target_length = target_length
        self.mask_index = self.base
        self.permutation = None if permutation is None else _checked_permutation(permutation, vocab_size)
        codes = torch.arange(vocab_size) if self.permutation is None else self.permutation
        self.place_values = self.base ** torch.arange(target_length - 1, -1, -1)
        self.digits = codes[:, None] // self.place_values % self.base
        self._token_of_code = torch.empty_like(codes)
        self._token_of_code[codes] = torch.arange(vocab_size)
        self._digits_on: dict[torch.device, Tensor] = {}

    def digits_on(self, device: torch.device) -> Tensor:
        """Return `digits` on a device: brought there once, as a GPU finishes all it has before it takes a copy.

        Args:
            device: with its number, as tensors have it.
        """
        if device == self.digits.device:
            return self.digits
        if device not in self._digits_on:
            with torch.inference_mode(False):  # training may be the next to ask
                self._digits_on[device] = self.digits.to(device)
        return self._digits_on[device]

    def encode(self, x_0: Tensor) -> Tensor:
        """Return the digits of tokens.

        Args:
            x_0: (...) integers in 0..V-1.

        Returns:
            y_0 (..., S) int64: digits in 0..b-1.

        Raises:
            ValueError: if a token is no integer or outside 0..V-1.
        """
        if not holds_integers(x_0):
            raise ValueError(f"token ids must be integers, got {x_0.dtype}")
        if x_0.numel() and not (0 <= int(x_0.min()) and int(x_0.max()) < self.vocab_size):
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}")
        return self.digits_on(x_0.device)[x_0.long()]

    def decode(self, y_0: Tensor) -> Tensor:
        """Return the tokens of fully visible digits.

        Args:
            y_0: (..., S) integers in 0..b-1.

        Returns:
            x_0 (...) int64.

        Raises:
            ValueError: if a digit is no integer, masked or outside 0..b-1, or a code stands for no token (code >= V).
        """
        if not holds_integers(y_0):
            raise ValueError(f"digits must be integers, got {y_0.dtype}")
        if y_0.shape[-1:] != (self.target_length,):
            raise ValueError(
                f"the last dimension must hold {self.target_length} digits, got shape {tuple(y_0.shape)}"
            )
        if y_0.numel() and not (0 <= int(y_0.min()) and int(y_0.max()) < self.base):
            raise ValueError(f"digits to decode must be in 0..{self.base - 1} (nothing masked)")
        codes = (y_0.long() * self.place_values.to(y_0.device)).sum(-1)
        if codes.numel() and int(codes.max()) >= self.vocab_size:
            raise ValueError(
                f"digits form code {int(codes.max())}, but there are only {self.vocab_size} tokens"
            )
        return self._token_of_code.to(y_0.device)[codes]


def _checked_permutation(permutation: Tensor, vocab_size: int) -> Tensor:
    if not holds_integers(permutation) or permutation.shape != (vocab_size,):
        raise ValueError(
            f"permutation must be ({vocab_size},) integers, got {permutation.dtype} of shape {tuple(permutation.shape)}"
        )
    result = permutation.detach().to("cpu", torch.int64)
    if not torch.equal(result.sort().values, torch.arange(vocab_size)):
        raise ValueError(f"permutation must hold each of 0..{vocab_size - 1} exactly once")
    return result
