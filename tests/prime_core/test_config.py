"""Configurations of image models: the published one is the default, and every wrong field is named."""

from typing import Any

import pytest
from pydantic import ValidationError

from prime_core.config import CodecConfig, Config, UNetConfig
from prime_core.tokenizer import TokenizerSpec

SMALL: dict[str, Any] = {
    "height": 8,
    "width": 8,
    "model_channels": 32,
    "channel_mult": (3, 3),
    "num_res_blocks": 1,
    "head_channels": 32,
}
CODEC = CodecConfig(vocab_size=256, target_length=2)


def test_the_published_network_is_the_default() -> None:
    model = UNetConfig()
    assert (model.model_channels, model.channel_mult, model.num_res_blocks) == (96, (3, 4, 4), 5)
    assert (model.attention_rates, model.head_channels, model.dropout) == ((2,), 64, 0.4)
    assert model.length == 3072
    assert Config(model=model, codec=CODEC).model.kind == "unet"


def test_json_round_trip() -> None:
    config = Config(
        model=UNetConfig(**SMALL, labels="class", num_labels=2), codec=CODEC, label_names=("cat", "dog")
    )
    assert Config.model_validate_json(config.model_dump_json(), strict=True) == config


@pytest.mark.parametrize(("labels", "chosen"), [("class", 3), ("uniform", 0), ("none", 0)])
def test_labels_without_meaning_cannot_be_chosen(labels: str, chosen: int) -> None:
    model = UNetConfig(**SMALL, labels=labels, num_labels=1 if labels == "none" else 3)
    assert model.num_choosable_labels == chosen
    assert Config(model=model, codec=CODEC).image_model is model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 4}, "hidden_size"),
        ({"model_channels": 31}, "model_channels"),
        ({"model_channels": 40}, r"40 \* 3\) must be a multiple of 32"),
        ({"channel_mult": (3, 0)}, r"32 \* 0"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"head_channels": 64}, r"multiple of head_channels \(64\)"),
        ({"attention_rates": (3,)}, r"attention_rates names 3, but .* \[1, 2\]"),
        ({"attention_rates": (2, 4)}, "attention_rates names 4"),
        ({"height": 9}, r"height \(9\) and width \(8\) must be multiples of 2"),
        ({"width": 7}, r"width \(7\)"),
        ({"width": 0}, "width"),
        ({"height": 2000}, "height"),
        ({"channels": 3, "packing": "rgb24"}, "channels must be 2, not 3"),
        ({"packing": "rgb"}, "packing"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"labels": "none", "num_labels": 2}, r"num_labels \(2\) must be 1"),
        ({"labels": "names"}, "labels"),
        ({"labels": "class", "num_labels": 0}, "num_labels"),
    ],
)
def test_faults_of_the_network(change: dict[str, Any], message: str) -> None:
    assert UNetConfig(**SMALL).num_labels == 1
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**{**SMALL, **change})


def test_heads_count_only_where_there_is_attention() -> None:
    widths = {**SMALL, "channel_mult": (3, 2, 4), "head_channels": 64}
    assert UNetConfig(**widths, attention_rates=()).head_channels == 64
    assert UNetConfig(**widths, attention_rates=(2, 4)).head_channels == 64
    with pytest.raises(ValidationError, match=r"32 \* 3\) must be a multiple of head_channels"):
        UNetConfig(**widths, attention_rates=(1,))
    with pytest.raises(ValidationError, match=r"lowest resolution \(rate 2\)"):
        UNetConfig(**{**widths, "channel_mult": (2, 3)}, attention_rates=())


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (
            {},
            {"codec": CodecConfig(vocab_size=256, target_length=5)},
            r"\(96\) must be a multiple of .*\(3 \* 5\)",
        ),
        ({}, {"codec": CodecConfig(vocab_size=257, target_length=2)}, "at most 256, got 257"),
        ({"channels": 2, "packing": "rgb24"}, {}, "needs codec.vocab_size 4096 and codec.target_length 1"),
        ({}, {"tokenizer": TokenizerSpec(kind="gpt2")}, "no tokenizer"),
        ({}, {"label_names": ("a",)}, "1 label_names for 1 labels of kind 'none'"),
        ({"labels": "class", "num_labels": 3}, {"label_names": ("a", "b")}, "2 label_names for 3 labels"),
        ({"labels": "uniform", "num_labels": 2}, {"label_names": ("a", "b")}, "kind 'uniform'"),
        ({"labels": "class"}, {"label_names": ("a" * 257,)}, "label_names"),
        (
            {"labels": "class", "num_labels": 2},
            {"label_names": ("a", "7")},
            "'7' is a number.*name it 'class 7'",
        ),
    ],
)
def test_faults_of_the_whole(model: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**{"model": UNetConfig(**{**SMALL, **model}), "codec": CODEC, **fields})


def test_super_tokens() -> None:
    model = UNetConfig(**SMALL, channels=2, packing="rgb24")
    config = Config(model=model, codec=CodecConfig(vocab_size=4096, target_length=1))
    assert config.model.length == 128
