"""Networks in the published layouts, made from seeds, and archives around any pickle program."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.dit import DiT
from prime_core.published.archive import open_archive
from prime_core.schedule import LinearSchedule

DATA = Path(__file__).parent / "data"


def random_backbone(
    vocab_size: int,
    target_length: int,
    *,
    head_dim: int,
    num_heads: int = 2,
    num_blocks: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`backbone.*` tensors in the order of a published `state_dict`, buffers included."""
    width = head_dim * num_heads
    config = DiTConfig(hidden_size=width, num_blocks=num_blocks, num_heads=num_heads, cond_dim=8, length=8)
    codec = CodecConfig(vocab_size=vocab_size, target_length=target_length)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in DiT(config, codec, LinearSchedule()).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        rows = shape[0] + (1 if target_length == 1 and name.startswith("output_layer.linear") else 0)
        tensors[f"backbone.{name}"] = 0.3 * torch.randn((rows, *shape[1:]), generator=generator)
        if name == "sigma_map.mlp.2.bias":
            frequencies = 1e4 ** -(torch.arange(0, head_dim, 2).float() / head_dim)
            tensors["backbone.rotary_emb.inv_freq"] = frequencies
    return tensors


def network_of(tensors: dict[str, Tensor], vocab_size: int, target_length: int, num_heads: int) -> DiT:
    """The network that `tensors` describe, without any importer."""
    state = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}
    del state["rotary_emb.inv_freq"]
    for name in ("output_layer.linear.weight", "output_layer.linear.bias"):
        state[name] = state[name][:vocab_size]
    width = state["norm"].shape[0] if "norm" in state else state["blocks.0.norm1.weight"].shape[0]
    config = DiTConfig(
        hidden_size=width,
        num_blocks=len({n.split(".")[1] for n in state if n.startswith("blocks.")}),
        num_heads=num_heads,
        cond_dim=8,
        length=8,
    )
    with torch.random.fork_rng(devices=[]):
        network = DiT(
            config, CodecConfig(vocab_size=vocab_size, target_length=target_length), LinearSchedule()
        )
    network.load_state_dict(state)
    return network.eval()


def training_checkpoint(raw: dict[str, Tensor], averaged: dict[str, Tensor], **others: Any) -> dict[str, Any]:
    """A published training checkpoint; `others` replace top-level keys."""
    shadow = [tensor for name, tensor in averaged.items() if "inv_freq" not in name]
    content = {
        "epoch": 0,
        "global_step": 7,
        "state_dict": raw,
        "hyper_parameters": {
            "config": {
                "parameterization": "subs",
                "time_conditioning": False,
                "model": {"length": 8, "dropout": 0.1},
                "noise": {"type": "loglinear"},
            }
        },
        "ema": {"decay": 0.99, "num_updates": 7, "shadow_params": shadow},
    }
    return {**content, **others}


def image_checkpoint(
    raw: dict[str, Tensor], averaged: dict[str, Tensor], *, prefix: str = "", **arguments: Any
) -> dict[str, Any]:
    """A published image checkpoint: `raw` and `averaged` are `model.*` tensors, `arguments` its namespace."""
    state = {"num_updates": torch.tensor(9), **raw}
    state |= {f"shadow_params.{index}": tensor for index, tensor in enumerate(averaged.values())}
    return {
        "model": {f"{prefix}{name}": tensor for name, tensor in state.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "lr_schedule": {},
        "epoch": 4,
        "scaler": {},
        "args": argparse.Namespace(**arguments),
    }


def write_archive(path: Path, program: bytes, entries: dict[str, bytes] | None = None) -> Path:
    """A PyTorch zip archive around any pickle program."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", b"3\n")
        for name, content in (entries or {}).items():
            archive.writestr(name, content)
    return path


def assemble(*opcodes: bytes, protocol: int = 2) -> bytes:
    """A pickle program that returns {"x": what the opcodes leave}."""
    return pickle.PROTO + bytes([protocol]) + b"}X\x01\0\0\0x" + b"".join(opcodes) + b"s."


def read(path: Path) -> dict[Any, Any]:
    """What the program of an archive leaves; its tensors cannot be read any more."""
    with open_archive(path) as content:
        return content


def text(value: str) -> bytes:
    """The opcode of a string."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
