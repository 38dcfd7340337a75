"""What a model is: the frozen, JSON-serialisable configuration stored beside the weights of a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prime_core.codec import SubtokenCodec, smallest_base
from prime_core.labels import check_label_name, check_label_names
from prime_core.schedule import CosineSchedule, LinearSchedule, PolynomialSchedule, Schedule
from prime_core.tokenizer import TokenizerSpec

_KINDS = {"dit", "unet", "linear", "polynomial", "cosine"}


class Frozen(BaseModel):
    """A frozen model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def explain(error: ValidationError) -> str:
    """Return the first fault that pydantic found in a `Config` in one line: the field as users write it, and why."""
    first = error.errors(include_url=False, include_input=False)[0]
    names = [str(part) for part in first["loc"]]
    # The kind of network or schedule is part of pydantic's path, but of no name.
    if len(names) > 1 and names[0] in {"model", "schedule"} and names[1] in _KINDS:
        del names[1]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:500]
    return f"{'.'.join(names)[:200]}: {message}{more}" if names else f"{message}{more}"


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


class UNetConfig(Frozen):
    """U-Net in the published image layout; the defaults are the published CIFAR-10 model.

    ``channels`` counts the planes of tokens. With ``packing`` "none" they are the channels of the picture. With
    "rgb24" (super-tokens, target_length = 2/3 of the paper) an RGB pixel is one number of 24 bits, written as two
    digits of base 4096: two planes of tokens with vocab_size 4096 and target_length 1.

    ``labels`` says what conditions the network beside the digits: "class" a label of the data, "uniform" a label
    that is drawn uniformly for every sample and carries no meaning (a mixture), "none" nothing.
    """

    kind: Literal["unet"] = "unet"
    channels: int = Field(default=3, ge=1, le=64)
    height: int = Field(default=32, ge=1, le=1024)
    width: int = Field(default=32, ge=1, le=1024)
    packing: Literal["none", "rgb24"] = "none"
    model_channels: int = Field(default=96, ge=32)
    channel_mult: tuple[int, ...] = Field(default=(3, 4, 4), min_length=1, max_length=8)
    num_res_blocks: int = Field(default=5, ge=1, le=64)
    attention_rates: tuple[int, ...] = Field(default=(2,), max_length=8)
    head_channels: int = Field(default=64, ge=1)
    dropout: float = Field(default=0.4, ge=0, lt=1)
    labels: Literal["none", "class", "uniform"] = "none"
    num_labels: int = Field(default=1, ge=1, le=2**16)
    time_conditioned: bool = False

    @property
    def length(self) -> int:
        """Tokens of an image: channels * height * width."""
        return self.channels * self.height * self.width

    @property
    def num_choosable_labels(self) -> int:
        """Labels that a request can ask for; 0 where the network has none, or draws one that carries no meaning."""
        return self.num_labels if self.labels == "class" else 0

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        last = len(self.channel_mult) - 1
        reached = [2**level for level in range(last + 1)]
        if unknown := [rate for rate in self.attention_rates if rate not in reached]:
            raise ValueError(
                f"attention_rates names {unknown[0]}, but the levels of channel_mult have the rates {reached}"
            )
        for level, mult in enumerate(self.channel_mult):
            width = self.model_channels * mult
            if mult < 1 or width % 32:
                raise ValueError(
                    f"model_channels * channel_mult ({self.model_channels} * {mult}) must be a multiple of 32: the "
                    "norms have 32 groups"
                )
            # The middle of the network attends at the lowest resolution, whatever the rates are.
            if (level == last or 2**level in self.attention_rates) and width % self.head_channels:
                raise ValueError(
                    f"model_channels * channel_mult ({self.model_channels} * {mult}) must be a multiple of "
                    f"head_channels ({self.head_channels}) where there is attention: at attention_rates and at the "
                    f"lowest resolution (rate {2**last})"
                )
        return self

    @model_validator(mode="after")
    def _check_picture(self) -> Self:
        rate = 2 ** (len(self.channel_mult) - 1)
        if self.height % rate or self.width % rate:
            raise ValueError(
                f"height ({self.height}) and width ({self.width}) must be multiples of {rate}: the picture is halved "
                f"{len(self.channel_mult) - 1} times"
            )
        if self.packing == "rgb24" and self.channels != 2:
            raise ValueError(
                f"packing 'rgb24' writes a pixel as 2 tokens: channels must be 2, not {self.channels}"
            )
        if self.labels == "none" and self.num_labels != 1:
            raise ValueError(f"num_labels ({self.num_labels}) must be 1 when labels is 'none'")
        return self


ModelConfig = Annotated[DiTConfig | UNetConfig, Field(discriminator="kind")]


class Config(Frozen):
    """Everything but the weights: network, codec, schedule, tokenizer and where the weights come from.

    ``label_names`` names the labels of a class-conditional model, in their order; empty if they have no names. Each
    name is that of one label, printable and no number (`prime_core.labels`).
    """

    format_version: Literal[1] = 1
    model: ModelConfig
    codec: CodecConfig
    schedule: ScheduleConfig = LinearConfig()
    tokenizer: TokenizerSpec = TokenizerSpec(kind="none")
    label_names: tuple[Annotated[str, Field(max_length=256), AfterValidator(check_label_name)], ...] = ()
    provenance: dict[str, Any] = Field(default_factory=dict)

    @property
    def image_model(self) -> UNetConfig:
        """The network of an image model; to be asked for only of one."""
        assert isinstance(self.model, UNetConfig), "an image model"
        return self.model

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        digits = self.codec.target_length
        if isinstance(self.model, DiTConfig):
            if self.model.hidden_size % digits:
                raise ValueError(
                    f"model.hidden_size ({self.model.hidden_size}) must be a multiple of codec.target_length "
                    f"({digits}): the digit embeddings of a token are concatenated to its width"
                )
            return self
        width = self.model.model_channels * self.model.channel_mult[0]
        if width % (self.model.channels * digits):
            raise ValueError(
                f"model.model_channels * model.channel_mult[0] ({width}) must be a multiple of model.channels * "
                f"codec.target_length ({self.model.channels} * {digits}): the embeddings of all digit planes are "
                "concatenated to that width"
            )
        return self

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if isinstance(self.model, DiTConfig):
            if self.label_names:
                raise ValueError("label_names are for image models with labels")
            return self
        want = 4096 if self.model.packing == "rgb24" else 256
        if self.model.packing == "rgb24" and (self.codec.vocab_size, self.codec.target_length) != (want, 1):
            raise ValueError("packing 'rgb24' needs codec.vocab_size 4096 and codec.target_length 1")
        if self.codec.vocab_size > want:
            raise ValueError(f"codec.vocab_size of pixels is at most 256, got {self.codec.vocab_size}")
        if self.tokenizer.kind != "none":
            raise ValueError("an image model has no tokenizer")
        if self.label_names and (
            self.model.labels != "class" or len(self.label_names) != self.model.num_labels
        ):
            raise ValueError(
                f"there are {len(self.label_names)} label_names for {self.model.num_labels} labels of kind "
                f"{self.model.labels!r}; names go with labels 'class', one each"
            )
        check_label_names(self.label_names)
        return self
