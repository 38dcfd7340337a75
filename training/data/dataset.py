"""Reading token shards: blocks of the stream through memory maps, and the order in which to train on them."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from training.data.manifest import ShardError, read_manifest

_SEED_LIMIT = 2**64


class TokenDataset:
    """The token stream of a folder of shards.

    A block of length L is a contiguous slice of the stream: block i is tokens i·L .. (i+1)·L-1. `len()` is
    the number of tokens.

    Attributes:
        folder: the folder.
        manifest: its manifest.
        num_tokens: length of the stream.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder of shards.

        Raises:
            ShardError: no manifest, or a shard is missing or does not have the size the manifest states.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.num_tokens: int = self.manifest.num_tokens
        self._ends = list(accumulate(shard.num_tokens for shard in self.manifest.shards))
        dtype = np.dtype(self.manifest.token_dtype).newbyteorder("<")
        self._shards: list[npt.NDArray[np.unsignedinteger]] = []
        for shard in self.manifest.shards:
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            expected = shard.num_tokens * dtype.itemsize
            if size != expected:
                found = "is missing" if size is None else f"has {size} bytes, the manifest says {expected}"
                raise ShardError(f"{path} {found}: remove {folder} and build the shards again")
            self._shards.append(np.memmap(path, dtype=dtype, mode="r"))

    def __len__(self) -> int:
        return self.num_tokens

    def num_blocks(self, length: int) -> int:
        """Return the number of whole blocks of `length` tokens; the rest of the stream is not trained on.

        Raises:
            ValueError: `length` is below 1.
        """
        _check_length(length)
        return self.num_tokens // length

    def block(self, index: int, length: int) -> npt.NDArray[np.int64]:
        """Return whole block `index`.

        Args:
            index: 0..num_blocks(length)-1.
            length: tokens per block.

        Returns:
            x_0 (length,) int64: token ids.

        Raises:
            ValueError: `index` or `length` is out of range.
            ShardError: an id is not in the vocabulary.
        """
        if not 0 <= index < self.num_blocks(length):
            raise ValueError(
                f"block {index} is outside 0..{self.num_blocks(length) - 1}: the stream has "
                f"{self.num_tokens} tokens, blocks have {length}"
            )
        return self._slice(index * length, (index + 1) * length)

    def _slice(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        tokens = np.empty(stop - start, dtype=np.int64)
        position = start
        while position < stop:
            index = bisect_right(self._ends, position)
            shard_start = self._ends[index] - len(self._shards[index])
            end = min(stop, self._ends[index])
            tokens[position - start : end - start] = self._shards[index][
                position - shard_start : end - shard_start
            ]
            position = end
        if tokens.max() >= self.manifest.vocab_size:
            raise ShardError(
                f"{self.folder}: tokens {start}..{stop - 1} hold id {tokens.max()}, the vocabulary ends at "
                f"{self.manifest.vocab_size - 1}: the shards are damaged; remove the folder and build again"
            )
        return tokens


class BlockOrder:
    """The order in which training visits blocks: each epoch is a fresh permutation.

    `index` is a pure function of (num_blocks, seed, position), so one integer resumes training exactly. Epoch
    e sorts the blocks by the raw 64-bit output of Philox with the key (seed, e); unlike numpy's shuffles,
    that output is the same in every version of numpy.
    """

    def __init__(self, num_blocks: int, seed: int) -> None:
        """Set the order up.

        Args:
            num_blocks: number of blocks, at least 1.
            seed: 0..2^64-1.

        Raises:
            ValueError: an argument is out of range.
        """
        if num_blocks < 1:
            raise ValueError(
                f"num_blocks is {num_blocks}: the corpus is shorter than one block; "
                "use a shorter length or more text"
            )
        if not 0 <= seed < _SEED_LIMIT:
            raise ValueError(f"seed is {seed}: give 0..2^64-1")
        self.num_blocks = num_blocks
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def index(self, step_position: int) -> int:
        """Return the block at a position of the endless sequence of epochs.

        Args:
            step_position: number of blocks visited before, at least 0.

        Raises:
            ValueError: `step_position` is negative.
        """
        if step_position < 0:
            raise ValueError(f"step_position is {step_position}: it counts from 0")
        epoch, place = divmod(step_position, self.num_blocks)
        if epoch != self._epoch:  # kept for the next calls; it changes no result
            generator = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64))
            self._permutation = np.argsort(generator.random_raw(self.num_blocks), kind="stable")
            self._epoch = epoch
        return int(self._permutation[place])


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"length is {length}: a block has at least 1 token")
