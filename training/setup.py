"""What a run is set up from: its tokenizer, token shards and codec permutation."""

from __future__ import annotations

import torch
from torch import Tensor

from prime_core.tokenizer import Tokenizer, load_tokenizer
from training.config import TrainConfig
from training.data.corpus import CorpusOptions, list_sources
from training.data.dataset import TokenDataset
from training.data.shards import build_shards


def text_tokenizer(config: TrainConfig) -> Tokenizer:
    """Load the tokenizer of a run.

    Raises:
        ValueError: there is none, a file is broken, or it has more tokens than the codec.
        FileNotFoundError: a file is missing.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.tokenizer_folder)
    if tokenizer is None:
        raise ValueError("data.tokenizer.kind is 'none': text needs a tokenizer")
    if tokenizer.vocab_size > config.codec.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but codec.vocab_size is "
            f"{config.codec.vocab_size}; set codec.vocab_size to {tokenizer.vocab_size}"
        )
    return tokenizer


def open_datasets(
    config: TrainConfig, tokenizer: Tokenizer, *, progress: bool = True
) -> tuple[TokenDataset, TokenDataset | None]:
    """Build the token shards if need be and open them: training text, and held-out text if there is any.

    Raises:
        ValueError: the corpus cannot be read, holds less than one row, or held-out files are trained on.
    """
    data = config.data
    if data.heldout:
        trained = {source.resolve() for source in list_sources(data.train)}
        for source in list_sources(data.heldout):
            if source.resolve() in trained:
                raise ValueError(f"{source} is in data.train and in data.heldout; hold other files out")
    options = CorpusOptions(document_separator=data.document_separator, text_key=data.text_key)
    datasets = []
    for name, paths in (("train", data.train), ("heldout", data.heldout)):
        if not paths:
            continue
        build_shards(paths, tokenizer, data.cache / name, options=options, progress=progress)
        dataset = TokenDataset(data.cache / name)
        if dataset.num_blocks(config.model.length) == 0:
            raise ValueError(
                f"data.{name} has {dataset.num_tokens} tokens, less than one row (model.length = "
                f"{config.model.length}); use more text or a shorter length"
            )
        datasets.append(dataset)
    return datasets[0], datasets[1] if len(datasets) > 1 else None


def codec_permutation(config: TrainConfig) -> Tensor | None:
    """Return the codec's shuffling of token ids (V,) int64, a function of the seed; None without one."""
    if not config.codec.permuted:
        return None
    return torch.randperm(config.codec.vocab_size, generator=torch.Generator().manual_seed(config.seed))
