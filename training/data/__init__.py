"""Corpora, tokenizer training and token shards."""
