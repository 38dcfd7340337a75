"""Held-out text as rows of tokens, and per-token and per-byte means over rows with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prime_core.tokenizer import Tokenizer
from training.data.corpus import CorpusError, CorpusOptions, iter_corpus
from training.data.rows import evenly_spread


@dataclass(frozen=True, eq=False)
class HeldoutText:
    """A tokenized text, cut into rows.

    Attributes:
        tokens: (T,) int64: document, end of text, document, end of text, ...
        length: tokens per row; the last row may be shorter, so that the rows hold every token once.
        rows: indices of the rows in use, ascending.
        row_tokens: (R,) int64: tokens of each row in use.
        row_bytes: (R,) int64: UTF-8 bytes of each row in use. An end of text counts as a token but stands
            for no byte, so figures per byte pay for every document end and are never flattered.
        num_documents: documents of the whole text.
    """

    tokens: npt.NDArray[np.int64]
    length: int
    rows: npt.NDArray[np.int64]
    row_tokens: npt.NDArray[np.int64]
    row_bytes: npt.NDArray[np.int64]
    num_documents: int

    def row(self, index: int) -> npt.NDArray[np.int64]:
        """Return row ``index`` of the text: x_0 (length,) int64, the last one possibly shorter."""
        return self.tokens[index * self.length : (index + 1) * self.length]

    def batches(self, batch_rows: int) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the rows in use as x_0 (B, L) int64, B <= batch_rows; rows of a batch have equal lengths."""
        whole = [index for index in self.rows if len(self.row(int(index))) == self.length]
        for first in range(0, len(whole), batch_rows):
            yield np.stack([self.row(int(index)) for index in whole[first : first + batch_rows]])
        for index in self.rows[len(whole) :]:
            yield self.row(int(index))[None]


class Mean(NamedTuple):
    """A ratio of sums over rows and its standard error; the error is None for a single row."""

    value: float
    standard_error: float | None


def read_documents(paths: Sequence[Path], options: CorpusOptions) -> list[str]:
    """Return all documents of a corpus.

    Args:
        paths: files and folders, see `list_sources`.
        options: how documents are found in them.

    Returns:
        The texts in the order of the files, none of them empty.

    Raises:
        CorpusError: the corpus cannot be read or is empty.
    """
    return list(iter_corpus(paths, options))


def cut_rows(
    documents: Sequence[str], tokenizer: Tokenizer, length: int, max_rows: int | None = None
) -> HeldoutText:
    """Tokenize documents, joined by the end of text as in training, and cut the stream into rows.

    Args:
        documents: texts.
        tokenizer: must have an end of text.
        length: tokens per row.
        max_rows: use at most so many rows, evenly spread over the text; None uses all.

    Returns:
        tokens (T,), and rows (R,), R = min(ceil(T / length), max_rows).

    Raises:
        CorpusError: the tokenizer has no end of text.
    """
    eos_id = tokenizer.eos_id
    if eos_id is None:
        raise CorpusError("the checkpoint's tokenizer has no '<|endoftext|>', which joins documents")
    parts = [np.asarray([*tokenizer.encode(text), eos_id], dtype=np.int64) for text in documents]
    tokens = np.concatenate(parts)
    num_rows = -(-len(tokens) // length)
    rows = evenly_spread(num_rows if max_rows is None else max_rows, num_rows)
    # Bytes of every token, looked up once per id.
    token_bytes = np.array([len(tokenizer.decode_bytes([index])) for index in range(tokenizer.vocab_size)])
    pieces = [tokens[index * length : (index + 1) * length] for index in rows]
    return HeldoutText(
        tokens=tokens,
        length=length,
        rows=rows,
        row_tokens=np.array([len(piece) for piece in pieces]),
        row_bytes=np.array([int(token_bytes[piece].sum()) for piece in pieces]),
        num_documents=len(documents),
    )


def mean_over_rows(totals: npt.NDArray[np.float64], units: npt.NDArray[np.int64]) -> Mean:
    """Return sum(totals) / sum(units), with the standard error of this ratio over rows.

    The error is that of the ratio estimator: residuals totals - ratio * units, taken as independent. It holds
    both the spread of the text and the noise of the masks that were drawn. The numbers of masked digits are
    stratified over the rows of a batch, so rows are not quite independent: their noise partly cancels in the
    sum, which this error does not credit. It is conservative, larger than the true one in expectation.

    Args:
        totals: (R,) float64, nats of each row.
        units: (R,) int64, tokens or bytes of each row.

    Returns:
        The ratio, nats per unit, and its standard error.
    """
    num_rows = len(totals)
    ratio = float(totals.sum() / units.sum())
    if num_rows < 2:
        return Mean(ratio, None)
    residuals = totals - ratio * units
    spread = math.sqrt(num_rows / (num_rows - 1) * float((residuals**2).sum()))
    return Mean(ratio, spread / float(units.sum()))
