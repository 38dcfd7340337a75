"""What a text costs without a neural network: a general compressor and the frequencies of single tokens."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from prime_core.tokenizer import Tokenizer
from training.heldout import HeldoutText

# Ends a document in what is compressed: one byte that no text holds, as an end of text is one token.
_END = b"\x00"


def xz_bits_per_byte(documents: Sequence[str], training_documents: Sequence[str] | None = None) -> float:
    """Return the bits of `xz -9e` per UTF-8 byte of ``documents``.

    Args:
        documents: the text to compress; document ends are compressed too and credited no byte.
        training_documents: None compresses the text alone. Otherwise the figure is what the text adds to the
            compressed training text: size(training + text) - size(training). The window of xz -9 is 64 MiB,
            so of a longer training text only the last 64 MiB help.
    """
    text = _joined(documents)
    num_bytes = len(text) - len(documents)
    if training_documents is None:
        return 8 * _xz_bytes(text) / num_bytes
    training = _joined(training_documents)
    return 8 * (_xz_bytes(training + text) - _xz_bytes(training)) / num_bytes


def unigram_nats(
    text: HeldoutText, training_documents: Sequence[str], tokenizer: Tokenizer
) -> npt.NDArray[np.float64]:
    """Return the negative log-likelihood of each row under independent tokens.

    p(x) = (count of x in the training tokens + 1) / (training tokens + V): add-one smoothing.

    Args:
        text: the rows.
        training_documents: what the frequencies are counted in.
        tokenizer: of the model that is compared; V is its vocab_size.

    Returns:
        (R,) float64, nats.
    """
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for document in training_documents:
        counts += np.bincount(tokenizer.encode(document), minlength=tokenizer.vocab_size)
    if tokenizer.eos_id is not None:
        counts[tokenizer.eos_id] += len(training_documents)
    nats = np.log(counts.sum() + tokenizer.vocab_size) - np.log(counts + 1)
    return np.array([float(nats[text.row(int(index))].sum()) for index in text.rows])


def _joined(documents: Sequence[str]) -> bytes:
    return b"".join(document.encode("utf-8") + _END for document in documents)


def _xz_bytes(content: bytes) -> int:
    return len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
