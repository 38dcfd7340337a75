"""What a training run is: a TOML file, overridden by PRIME_TRAIN_* variables and then by flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from prime_core.config import CodecConfig, LinearConfig, ModelConfig, ScheduleConfig
from prime_core.device import DEVICE_PATTERN
from prime_core.objectives import Objective
from training.command_line import load_settings
from training.data_config import DataConfig

# What the fields of a model's own configuration mean on this command line.
_MODEL_DESCRIPTIONS = {
    "model.kind": "network: dit, the diffusion transformer, or unet for images; without it: dit",
    "model.hidden_size": "width D: a multiple of 2 model.num_heads and of codec.target_length",
    "model.num_blocks": "transformer blocks",
    "model.num_heads": "attention heads",
    "model.cond_dim": "width of the noise-level conditioning",
    "model.length": "tokens of a row, in training and at most in use",
    "model.dropout": "dropout probability",
    "model.time_conditioned": "whether the network sees the noise time",
    "model.channels": "planes of tokens: 1 grey, 3 RGB, 2 with packing rgb24",
    "model.height": "pixels; a multiple of 2 for every level of channel_mult but one",
    "model.width": "pixels; likewise",
    "model.packing": "rgb24: super-tokens, an RGB pixel is two numbers of 12 bits; needs codec.vocab_size 4096",
    "model.model_channels": "the unit of width: times each of channel_mult a multiple of 32, times the first of "
    "them also a multiple of channels x codec.target_length",
    "model.channel_mult": "width of each level in model_channels, from full resolution down",
    "model.num_res_blocks": "residual blocks of a level on the way down",
    "model.attention_rates": "down-sampling rates with attention",
    "model.head_channels": "width of an attention head",
    "model.labels": "class: the data's labels; uniform: drawn for every row and step, a mixture; none",
    "model.num_labels": "number of labels: that of the data for class, 1 for none",
    "codec.vocab_size": "tokens V: at least what the tokenizer has, 256 for pixels, cells of a side for toy2d",
    "codec.target_length": "digits per token; 1 is a plain masked diffusion model",
    "codec.permuted": "shuffle the token ids before the digits are taken, by the seed",
    "schedule.kind": "noise schedule: linear, polynomial or cosine",
    "schedule.eps": "alpha_t = 1 - (1 - eps) t",
    "schedule.power": "alpha_t = (1 - t)^power",
    "data.kind": "what is learned: text, images, or toy2d, a distribution over a picture's cells; without it: text",
    "data.tokenizer.kind": "tiktoken_file, or gpt2 (its files in the folder or in tiktoken's cache)",
    "data.tokenizer.file": "tiktoken_file: name of the rank file in data.tokenizer_folder",
    "data.tokenizer.pattern": "tiktoken_file: expression that splits text into pieces; default: GPT-2's",
    "data.tokenizer.special_tokens": 'name to id, "<|endoftext|>" among them',
}


class TrainConfig(BaseSettings):
    """Train a masked diffusion model on text or images and write a checkpoint that prime-serve loads."""

    model_config = SettingsConfigDict(
        env_prefix="PRIME_TRAIN_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
    )

    output: Path = Field(description="folder of the run: state, metrics.jsonl and checkpoint/")
    model: ModelConfig
    codec: CodecConfig
    schedule: ScheduleConfig = LinearConfig()
    data: DataConfig

    objective: Objective = Field(
        default="coded", description="coded: the published loss; nelbo: the likelihood bound"
    )
    carry_over: bool = Field(
        default=True, description="coded: rule out tokens that contradict visible digits (nelbo always does)"
    )
    weighted: bool = Field(
        default=True,
        description="coded: weight noise times as the loss does; false: all alike, as published for images",
    )
    steps: int = Field(
        default=1_000_000, ge=1, description="optimiser steps in all; a run can be resumed with more"
    )
    batch_size: int = Field(default=512, ge=1, description="rows of a step: a multiple of micro_batch_size")
    micro_batch_size: int = Field(default=32, ge=1, description="rows in memory at a time")
    chunk_rows: int = Field(default=1024, ge=1, description="tokens whose logits are in memory at a time")
    learning_rate: float = Field(default=3e-4, gt=0, description="of AdamW, after the warm-up")
    warmup_steps: int = Field(default=2500, ge=0, description="steps of linear warm-up")
    decay_steps: int = Field(
        default=0, ge=0, description="last steps, over which the learning rate falls to zero; published: none"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    grad_clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(
        default=0.9999, ge=0, lt=1, description="decay of the averaged weights, which are served"
    )
    ema_warmup: bool = Field(
        default=True, description="after n updates the decay is at most (1 + n) / (10 + n)"
    )
    eps: float = Field(default=1e-3, ge=0, lt=1, description="smallest noise time that is drawn")
    seed: int = Field(
        default=1, ge=0, lt=2**63, description="of weights, data order, masks, times and dropout"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of matrix products (autocast); weights are float32"
    )
    device: str = Field(default="auto", pattern=DEVICE_PATTERN, description="auto, cpu, cuda or cuda:N")
    num_threads: int = Field(default=0, ge=0, description="CPU threads of torch; 0 keeps torch's choice")
    log_every: int = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    eval_every: int = Field(default=1000, ge=1, description="steps between held-out evaluations")
    eval_rows: int = Field(default=64, ge=1, description="held-out rows that are evaluated")
    preview: int = Field(
        default=16,
        ge=0,
        description="images: samples in preview.png, drawn at each evaluation; 0: no preview",
    )
    preview_steps: int = Field(default=64, ge=1, description="steps of the sampler that draws preview.png")
    save_every: int = Field(default=500, ge=1, description="steps between saves")
    save_every_s: float = Field(default=600.0, gt=0, description="and at least this often, in seconds")
    checkpoint_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in checkpoint/"
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_kinds(cls, values: Any) -> Any:
        """Files and flags that name no kind mean a text model."""
        if not isinstance(values, dict):
            return values
        kinds = {"model": "dit", "data": "text"}
        groups = {
            name: {"kind": kind} | values[name] for name, kind in kinds.items() if _is_group(values, name)
        }
        return values | groups

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        if self.objective == "nelbo" and not self.weighted:
            raise ValueError("objective 'nelbo' is a bound only with its weights: set weighted to true")
        return self

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        needed = {"text": "dit", "images": "unet", "toy2d": "dit"}[self.data.kind]
        if self.model.kind != needed:
            raise ValueError(
                f"model.kind is {self.model.kind!r}, but data.kind {self.data.kind!r} needs {needed!r}"
            )
        if self.data.kind == "toy2d" and self.model.length != 2:
            raise ValueError(f"model.length is {self.model.length}: a row of data.kind 'toy2d' has 2 tokens")
        return self


def _is_group(values: dict[str, Any], name: str) -> bool:
    return isinstance(values.get(name), dict)


def load_train_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Read ``--config FILE.toml [--key value ...]``; nested keys are dotted: ``--model.num-blocks 4``.

    Args:
        arguments: the command line without the program's name; None takes ``sys.argv``.

    Raises:
        SettingsError: an unreadable config file, unknown or missing keys, values out of range.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return load_settings(TrainConfig, "prime-train", arguments, _MODEL_DESCRIPTIONS)
