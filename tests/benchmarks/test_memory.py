"""The memory benchmark sees what it is for."""

import pytest
import torch
from pydantic import ValidationError

from benchmarks import memory
from benchmarks.memory import TASKS, LargestTensor, MemoryBenchSettings, Need, measure, run_memory
from benchmarks.report import memory_table

SETTINGS = MemoryBenchSettings(model="tiny", vocab_size=3000, length=32, batch_size=48, steps=2, device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_no_task_has_all_logits(task: str) -> None:
    need = measure(task, SETTINGS)  # type: ignore[arg-type]
    assert 0 < need.largest_tensor_bytes < SETTINGS.logits_bytes
    assert need.peak_bytes is None or need.peak_bytes >= 0


def test_a_large_tensor_is_noticed_and_an_expanded_one_counts_what_it_holds() -> None:
    with LargestTensor() as seen:
        torch.zeros(3, 1).expand(3, 1000)
    assert seen.num_bytes == 12
    with LargestTensor() as seen:
        torch.zeros(7) + torch.zeros(5, 1)
    assert (seen.num_bytes, seen.shape) == (140, (5, 7))


def test_document_and_table() -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 2, "length": 8, "task": "nelbo"})
    document = run_memory(settings, lambda line: None)
    assert document["logits_bytes"] == 2 * 8 * 3000 * 4
    (entry,) = document["tasks"]
    assert entry["task"] == "nelbo"
    assert entry["largest_tensor_bytes"] > 0
    assert "nelbo" in memory_table(document)


def test_on_a_gpu_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBenchSettings, "torch_device", torch.device("cuda", 0))
    monkeypatch.setattr(memory, "document_head", lambda name, settings: {"benchmark": name})
    monkeypatch.setattr(memory, "in_own_process", None)
    monkeypatch.setattr(memory, "measure", lambda task, settings: Need(12, (3,), len(task)))
    document = run_memory(SETTINGS, lambda line: None)
    assert [entry["peak_bytes"] for entry in document["tasks"]] == [len(task) for task in TASKS]


def test_network_and_digits_must_fit() -> None:
    with pytest.raises(ValidationError, match="must divide the network's width 192"):
        MemoryBenchSettings(model="tiny", target_length=5)
