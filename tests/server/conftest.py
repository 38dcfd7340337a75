"""One small model on disk, and one server of it that tests share when they leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.running import Running, serving, write_checkpoint


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path) as running:
        yield running
