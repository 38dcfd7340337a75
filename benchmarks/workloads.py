"""What both samplers are given to do: networks by name, and rows, lengths and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prime_core.config import CodecConfig, Config, DiTConfig, LinearConfig, PolynomialConfig, UNetConfig

ModelName = Literal["small", "tiny", "images", "images-demo", "images-cifar10", "images-tiny"]

MODELS: dict[str, DiTConfig | UNetConfig] = {
    "small": DiTConfig(),
    "tiny": DiTConfig(hidden_size=192, num_blocks=2, num_heads=4, cond_dim=32),
    "images": UNetConfig(
        model_channels=32,
        channel_mult=(3, 4, 4),
        num_res_blocks=1,
        attention_rates=(2,),
        head_channels=32,
        dropout=0.0,
    ),
    "images-demo": UNetConfig(
        channels=1,
        height=28,
        width=28,
        model_channels=32,
        channel_mult=(2, 3, 4),
        num_res_blocks=1,
        attention_rates=(4,),
        head_channels=32,
        dropout=0.0,
        labels="class",
        num_labels=10,
    ),
    "images-cifar10": UNetConfig(),
    "images-tiny": UNetConfig(
        channels=1,
        height=4,
        width=4,
        model_channels=32,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_rates=(),
        head_channels=32,
        dropout=0.0,
    ),
}
"""Networks by name.

Text: the published small model, and one whose trunk costs next to nothing. Images: a CIFAR-10 shaped small network,
the network of the bundled demo, the published CIFAR-10 network, and one for tests.
"""

VOCAB_SIZES = {"dit": 50257, "unet": 256}


@dataclass(frozen=True)
class Workload:
    """What both samplers do: ``num_rows`` unconditional rows of ``length`` tokens, on ``num_steps`` steps."""

    model: ModelName
    vocab_size: int
    target_length: int
    length: int
    num_rows: int
    num_steps: int
    seed: int

    @property
    def config(self) -> Config:
        """The model's configuration."""
        network = self.network
        is_text = isinstance(network, DiTConfig)
        return Config(
            model=network,
            codec=CodecConfig(vocab_size=self.vocab_size, target_length=self.target_length),
            schedule=LinearConfig() if is_text else PolynomialConfig(power=3.0),
        )

    @property
    def network(self) -> DiTConfig | UNetConfig:
        """The configuration of the network alone."""
        return MODELS[self.model]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return self.num_rows * self.length

    @property
    def shape(self) -> str:
        """The sizes, for a table."""
        return (
            f"{self.model} model, V={self.vocab_size}, S={self.target_length}, L={self.length}, "
            f"N={self.num_steps}, B={self.num_rows}"
        )
