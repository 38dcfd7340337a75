"""Train a byte-level BPE tokenizer and write it as a .tiktoken rank file.

    python -m training.data.bpe --input train.txt --vocab-size 4096 --output tokenizer.tiktoken

The corpus is split into pieces by the GPT-2 pattern. The most frequent pair of neighbouring tokens, counted
over pieces, becomes the next token, again and again (Sennrich et al., arXiv 1508.07909).

A candidate is known by its bytes alone, which is also how an encoder reads the ranks. Nothing is lost: where
two neighbours spell a string, no merge has crossed its ends, so the merges inside went as they go in the
string by itself, and at any moment a string splits into two neighbours in one way only.
"""

from __future__ import annotations

import argparse
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex

from prime_core.rank_files import write_rank_file
from prime_core.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from training.data.corpus import CorpusOptions, iter_corpus

NUM_BYTES = 256


def count_pieces(documents: Iterable[str], pattern: str = GPT2_PATTERN) -> Counter[bytes]:
    """Return how often each piece of the split pattern occurs, as UTF-8 bytes."""
    compiled = regex.compile(pattern)
    texts: Counter[str] = Counter()
    for document in documents:
        texts.update(compiled.findall(document))
    return Counter({text.encode("utf-8"): count for text, count in texts.items()})


def train_ranks(pieces: Counter[bytes], num_ranks: int) -> list[bytes]:
    """Return the bytes of ranks 0..num_ranks-1: the 256 bytes by value, then the merges in order.

    Ties between equally frequent candidates go to the smaller byte string, so the result depends on the
    counts alone.

    Args:
        pieces: number of occurrences of each piece.
        num_ranks: 256 + number of merges.

    Raises:
        ValueError: `num_ranks` is below 256, or more than the pieces can give.
    """
    if num_ranks < NUM_BYTES:
        raise ValueError(f"num_ranks is {num_ranks}: the {NUM_BYTES} single bytes always have a rank each")
    merger = _Merger(pieces)
    ranks = [bytes([value]) for value in range(NUM_BYTES)]
    while len(ranks) < num_ranks:
        token = merger.most_frequent()
        if token is None:
            raise ValueError(
                f"only {len(ranks)} of {num_ranks} ranks can be made: no pair occurs twice any more; "
                "give a smaller vocabulary or more text"
            )
        ranks.append(token)
        merger.add(token)
    return ranks


class _Merger:
    """The pieces, each as its current tokens, with the count of every candidate kept up to date.

    A merge touches only the pieces that hold the candidate. The heap keeps outdated entries; one is
    recognised, when it comes up, by a count that is no longer true.
    """

    def __init__(self, pieces: Counter[bytes]) -> None:
        self._words: list[list[bytes]] = []
        self._word_counts: list[int] = []
        self._candidate_counts: dict[bytes, int] = defaultdict(int)
        self._words_with: dict[bytes, set[int]] = defaultdict(set)
        for piece, count in sorted(pieces.items()):
            word = [bytes([value]) for value in piece]
            for left, right in pairwise(word):
                self._candidate_counts[left + right] += count
                self._words_with[left + right].add(len(self._words))
            self._words.append(word)
            self._word_counts.append(count)
        self._heap = [(-count, token) for token, count in self._candidate_counts.items()]
        heapq.heapify(self._heap)

    def most_frequent(self) -> bytes | None:
        """Return the candidate to merge next; None when none occurs twice."""
        while self._heap:
            count, token = heapq.heappop(self._heap)
            if -count == self._candidate_counts[token] and -count >= 2:
                return token
        return None

    def add(self, token: bytes) -> None:
        """Merge `token` in every piece."""
        changed: set[bytes] = set()
        for index in sorted(self._words_with.pop(token)):
            changed |= self._rewrite(index, token)
        for candidate in changed:
            count = self._candidate_counts[candidate]
            if count >= 2:
                heapq.heappush(self._heap, (-count, candidate))

    def _rewrite(self, index: int, token: bytes) -> set[bytes]:
        """Merge `token` in one piece; return the candidates whose counts it changed."""
        before = self._words[index]
        after = merge_token(before, token)
        self._words[index] = after
        change: Counter[bytes] = Counter(left + right for left, right in pairwise(after))
        present = set(change)
        change.subtract(left + right for left, right in pairwise(before))
        for candidate, difference in change.items():
            self._candidate_counts[candidate] += difference * self._word_counts[index]
            if candidate in present:
                self._words_with[candidate].add(index)
            else:
                self._words_with[candidate].discard(index)
        return {candidate for candidate, difference in change.items() if difference != 0}


def merge_token(word: Sequence[bytes], token: bytes) -> list[bytes]:
    """Return `word` with every pair of neighbours that spells `token` joined, from left to right."""
    merged: list[bytes] = []
    index = 0
    while index < len(word):
        if index + 1 < len(word) and word[index] + word[index + 1] == token:
            merged.append(token)
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return merged


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tuple[list[bytes], Tokenizer]:
    """Return the ranks and the tokenizer of `vocab_size` ids, of which the last is "<|endoftext|>".

    Raises:
        ValueError: `vocab_size` is below 257 or too large for this text.
    """
    if vocab_size < NUM_BYTES + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}: give at least 257, {NUM_BYTES} bytes and {END_OF_TEXT}"
        )
    ranks = train_ranks(count_pieces(documents), vocab_size - 1)
    return ranks, Tokenizer(ranks, {END_OF_TEXT: vocab_size - 1})


def main(argv: list[str] | None = None) -> int:
    """Command line: see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m training.data.bpe", description="train a byte-level BPE tokenizer (.tiktoken)"
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="corpus files or folders")
    parser.add_argument("--vocab-size", type=int, required=True, help="bytes + merges + the end of text")
    parser.add_argument("--output", type=Path, required=True, help="rank file to write")
    parser.add_argument("--document-separator", choices=("blank_line", "file"), default="blank_line")
    parser.add_argument("--text-key", default="text", help="key of the text in .jsonl files")
    arguments = parser.parse_args(argv)
    try:
        options = CorpusOptions(arguments.document_separator, arguments.text_key)
        ranks, tokenizer = train_tokenizer(iter_corpus(arguments.input, options), arguments.vocab_size)
        num_bytes = num_tokens = 0
        for document in iter_corpus(arguments.input, options):
            ids = tokenizer.encode(document)
            if tokenizer.decode(ids) != document:
                raise ValueError(f"round trip failed for a document that starts {document[:40]!r}")
            num_bytes += len(document.encode("utf-8"))
            num_tokens += len(ids)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_rank_file(arguments.output, ranks)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    print(
        f"{arguments.output}: vocab_size {tokenizer.vocab_size}, {END_OF_TEXT} = {tokenizer.eos_id}, "
        f"{num_bytes / num_tokens:.2f} bytes per token on the input"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
