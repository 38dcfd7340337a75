"""Two small models on disk, servers of them that tests share when they leave them as they were, and a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.background import Background
from tests.server.browser import INSTALLED, MISSING, Browser, browsing
from tests.server.image_model import write_image_checkpoint
from tests.server.playground_page import opened
from tests.server.running import Running, serving, write_checkpoint


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def images_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_checkpoint(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def server(model_path: Path) -> Iterator[Running]:
    with serving(model_path) as running:
        yield running


@pytest.fixture(scope="module")
def both(model_path: Path, images_path: Path) -> Iterator[Running]:
    """A server of a text model and an image model."""
    with serving(model_path, images_path) as running:
        yield running


@pytest.fixture
def background(server: Running) -> Iterator[Background]:
    """Requests to the server of the test, in threads of their own."""
    made = Background(server)
    yield made
    made.pool.shutdown()


@pytest.fixture(scope="session")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser; tests that need it are skipped where none is installed."""
    if not INSTALLED:
        pytest.skip(MISSING)
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1400)
        yield browser


@pytest.fixture
def page(window: Browser, both: Running) -> Browser:
    """The playground of both models, just loaded."""
    return opened(window, both)
