"""What a model is: the frozen, JSON-serialisable configuration stored beside the weights of a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from prime_core.codec import SubtokenCodec, smallest_base
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from prime_core.tokenizer import TokenizerSpec


class Frozen(BaseModel):
    """A frozen model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CodecConfig(Frozen):
    """Token codec: V tokens, each written as ``target_length`` digits.

    ``permuted`` says that a permutation of the token ids travels with the weights (tensor ``codec.permutation``).
    """

    vocab_size: int = Field(ge=2, le=2**24)
    target_length: int = Field(ge=1, le=24)
    permuted: bool = False

    @property
    def base(self) -> int:
        """The smallest b with b**target_length >= vocab_size."""
        return smallest_base(self.vocab_size, self.target_length)

    def build(self, permutation: torch.Tensor | None = None) -> SubtokenCodec:
        """Return the codec; ``permutation`` must be given exactly when ``permuted`` is set."""
        if self.permuted != (permutation is not None):
            raise ValueError("a codec permutation must be given exactly when the config says `permuted`")
        return SubtokenCodec(self.vocab_size, self.target_length, permutation)


class LinearConfig(Frozen):
    """alpha_t = 1 - (1 - eps) t; published text models use eps = 1e-3."""

    kind: Literal["linear"] = "linear"
    eps: float = Field(default=1e-3, ge=0, lt=1)

    def build(self) -> Schedule:
        """Return the schedule."""
        return LinearSchedule(self.eps)


class PolynomialConfig(Frozen):
    """alpha_t = (1 - t)^power."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(default=3.0, gt=0, le=100)

    def build(self) -> Schedule:
        """Return the schedule."""
        return PolynomialSchedule(self.power)


class CosineConfig(Frozen):
    """alpha_t = 1 - cos(pi (1 - t) / 2)."""

    kind: Literal["cosine"] = "cosine"

    def build(self) -> Schedule:
        """Return the schedule."""
        return CosineSchedule()


ScheduleConfig = Annotated[LinearConfig | PolynomialConfig | CosineConfig, Field(discriminator="kind")]


class DiTConfig(Frozen):
    """Diffusion transformer in the published text layout; the defaults are the published small model.

    ``length`` is the context: the largest number of tokens of a row. ``time_conditioned`` models see
    sigma = -log(alpha_t); the published ones see sigma = 0 (time-free).
    """

    kind: Literal["dit"] = "dit"
    hidden_size: int = Field(default=768, ge=2)
    num_blocks: int = Field(default=12, ge=1)
    num_heads: int = Field(default=12, ge=1)
    cond_dim: int = Field(default=128, ge=1)
    length: int = Field(default=1024, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    time_conditioned: bool = False

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 2:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be an even multiple of num_heads ({self.num_heads}): "
                "rotary embedding turns pairs of features"
            )
        return self


class Config(Frozen):
    """Everything but the weights: network, codec, schedule, tokenizer and where the weights come from."""

    format_version: Literal[1] = 1
    model: DiTConfig
    codec: CodecConfig
    schedule: ScheduleConfig = LinearConfig()
    tokenizer: TokenizerSpec = TokenizerSpec(kind="none")
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.model.hidden_size % self.codec.target_length:
            raise ValueError(
                f"model.hidden_size ({self.model.hidden_size}) must be a multiple of codec.target_length "
                f"({self.codec.target_length}): the digit embeddings of a token are concatenated to its width"
            )
        return self
