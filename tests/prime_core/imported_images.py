"""Imports of published image networks, as the tests make them."""

from pathlib import Path
from typing import Any

import torch

from prime_core.config import UNetConfig
from prime_core.published.importer import Imported, ImportOptions, import_published
from tests.reference_unet import Net

SMALL = Net(1, 2, 4, 16, (32,), rates=(1,))


def imported(tmp_path: Path, content: Any, **options: Any) -> Imported:
    torch.save(content, tmp_path / "a.pth")
    return import_published(tmp_path / "a.pth", tmp_path / "out", ImportOptions(**options))


def model_of(found: Imported) -> UNetConfig:
    assert isinstance(found.config.model, UNetConfig)
    return found.config.model
