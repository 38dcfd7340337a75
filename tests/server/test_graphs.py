"""The server's CUDA graphs: off by default, refused without a GPU, and of one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prime_core.models.graphs import RECORD_AFTER, TrunkGraphs
from server import main as main_module
from server.main import build_engine, load_model, main
from server.settings import Settings
from tests.recorder import RerunRecorder
from tests.server.running import NAME, submit


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as on a GPU, but for the recorder."""
    monkeypatch.setattr(main_module, "cuda_graphs", lambda most, device: TrunkGraphs(most, RerunRecorder()))


def settings_of(model_path: Path, **changes: Any) -> Settings:
    return Settings.model_validate({"model": model_path, "device": "cpu", "dtype": "float32", **changes})


def test_graphs_without_a_gpu_are_refused_in_one_line(
    model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model_path), "--device", "cpu", "--cuda-graphs", "4"]) == 2
    assert capsys.readouterr().err == (
        "prime-serve: --cuda-graphs (PRIME_CUDA_GRAPHS): CUDA graphs need a CUDA device, and this one is 'cpu'; "
        "leave it out, or 0\n"
    )


@pytest.mark.usefixtures("without_gpu")
def test_every_set_of_weights_has_its_own(model_path: Path) -> None:
    assert load_model(settings_of(model_path), NAME).checkpoint.denoiser.graphs is None
    settings = settings_of(model_path, cuda_graphs=3)
    first, again = (load_model(settings, NAME).checkpoint.denoiser.graphs for _ in range(2))
    assert first is not None and first is not again
    assert first.max_graphs == 3


@pytest.mark.usefixtures("without_gpu")
def test_an_engine_gives_the_same_with_graphs(model_path: Path) -> None:
    states: list[list[torch.Tensor]] = []
    for cuda_graphs in (0, 2):
        engine = build_engine(settings_of(model_path, cuda_graphs=cuda_graphs))
        engine.start()
        try:
            states.append([])
            for _ in range(4):
                for num_tokens in (20, 33):
                    job = submit(engine, num_tokens)
                    job.done.result(60)
                    states[-1] += [row.y for row in job.rows]
        finally:
            engine.stop()
    graphs = engine.queues[NAME].checkpoint.denoiser.graphs
    assert graphs is not None
    assert graphs.num_replays == 2 * (4 * 3 - RECORD_AFTER)  # three calls a row
    assert all(map(torch.equal, *states))
