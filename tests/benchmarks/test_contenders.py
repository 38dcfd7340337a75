"""Both samplers do the same workload, on the same weights, the same way at every call."""

from unittest.mock import Mock

import pytest
import torch

from benchmarks import contenders
from benchmarks.contenders import SamplerName, build_checkpoint, build_dense, build_sampler
from benchmarks.dense_images import DenseImages
from benchmarks.workloads import ModelName, Workload
from prime_core.config import Config
from prime_core.models.dit import ScaleNorm
from prime_core.models.graphs import TrunkGraphs
from prime_core.models.unet import UNet
from tests.recorder import RerunRecorder

WORKLOAD = Workload("tiny", vocab_size=300, target_length=2, length=6, num_rows=3, num_steps=5, seed=7)


def test_weights_are_seeded_and_none_is_zero() -> None:
    states = [build_checkpoint(WORKLOAD, "float32").denoiser.state_dict() for _ in range(2)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name])
        assert (tensor != 0).any(), name
    before = torch.random.get_rng_state()
    build_checkpoint(WORKLOAD, "float32")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_of_norms_are_about_one_and_rows_of_images_have_labels_in_turn() -> None:
    norms = [m for m in build_checkpoint(WORKLOAD, "float32").denoiser.modules() if isinstance(m, ScaleNorm)]
    assert norms and all(0.8 < float(norm.weight.mean()) < 1.2 for norm in norms)
    workload = Workload("images-tiny", 256, target_length=2, length=16, num_rows=5, num_steps=3, seed=1)
    checkpoint = build_checkpoint(workload, "float32")
    assert isinstance(checkpoint.denoiser, UNet)
    checkpoint.denoiser.config = checkpoint.denoiser.config.model_copy(
        update={"labels": "class", "num_labels": 3}
    )
    dense = build_dense(checkpoint, workload)
    assert isinstance(dense, DenseImages) and dense.labels is not None
    assert dense.labels.tolist() == [0, 1, 2, 0, 1]


def test_bfloat16_weights_are_those_of_float32() -> None:
    full = dict(build_checkpoint(WORKLOAD, "float32").denoiser.named_parameters())
    for name, parameter in build_checkpoint(WORKLOAD, "bfloat16").denoiser.named_parameters():
        assert torch.equal(parameter, full[name].bfloat16())


def test_weights_are_drawn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor takes seconds for those of a published network, and they would have to be copied."""
    devices: list[torch.device] = []

    class Enough(Exception):
        pass

    def build(config: Config) -> None:
        devices.append(torch.empty(0).device)
        raise Enough

    monkeypatch.setattr(torch, "Generator", lambda device: devices.append(device) or Mock())
    monkeypatch.setattr(contenders, "build_denoiser", build)
    with pytest.raises(Enough):
        build_checkpoint(WORKLOAD, "bfloat16", "meta")
    assert devices == [torch.device("meta")] * 2


def test_logits_are_not_flat_and_depend_on_the_digits() -> None:
    checkpoint = build_checkpoint(WORKLOAD, "float32")
    y_t = torch.full((2, 6, 2), checkpoint.codec.mask_index)
    y_t[1, 0] = torch.tensor([3, 4])
    logits = checkpoint.denoiser(y_t)
    assert logits.std(-1).min() > 0.1
    assert (logits[0, 1:] - logits[1, 1:]).abs().max() > 0.01  # through attention


@pytest.mark.parametrize("name", ["planned", "dense_published"])
def test_sampler_fills_all_rows_and_repeats_itself(name: SamplerName) -> None:
    run = build_sampler(name, build_checkpoint(WORKLOAD, "float32"), WORKLOAD)
    outcome = run()
    assert outcome.tokens.shape == (3, 6)
    assert 0 <= int(outcome.tokens.min()) and int(outcome.tokens.max()) < 300
    assert torch.equal(run().tokens, outcome.tokens)
    assert 1 <= outcome.num_calls <= outcome.num_row_steps <= 3 * outcome.num_calls


def test_dense_rows_run_in_lockstep_and_planned_rows_do_not() -> None:
    workload = Workload("tiny", vocab_size=300, target_length=1, length=4, num_rows=2, num_steps=40, seed=0)
    checkpoint = build_checkpoint(workload, "float32")
    planned = build_sampler("planned", checkpoint, workload)()
    dense = build_sampler("dense_published", checkpoint, workload)()
    assert dense.num_row_steps == 2 * dense.num_calls
    assert planned.num_row_steps <= 2 * 4 < dense.num_row_steps  # a row needs a call for each token at most


@pytest.mark.parametrize("model", ["tiny", "images-tiny"])
def test_graphs_give_the_same_samples_and_are_of_their_own_runs_alone(
    model: ModelName, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, vocab_size = (12, 300) if model == "tiny" else (16, 256)
    workload = Workload(model, vocab_size, target_length=2, length=length, num_rows=3, num_steps=30, seed=7)
    checkpoint = build_checkpoint(workload, "float32")
    with pytest.raises(ValueError, match="need a CUDA device"):
        build_sampler("planned_graphs", checkpoint, workload, max_graphs=4)
    monkeypatch.setattr(contenders, "cuda_graphs", lambda most, device: TrunkGraphs(most, RerunRecorder()))
    planned = build_sampler("planned", checkpoint, workload)
    with_graphs = build_sampler("planned_graphs", checkpoint, workload, max_graphs=4)
    first, again = with_graphs(), with_graphs()
    assert checkpoint.denoiser.graphs is None
    expected = planned()
    assert expected.num_replays is None
    assert torch.equal(first.tokens, expected.tokens) and torch.equal(again.tokens, expected.tokens)
    assert first.num_replays is not None and again.num_replays is not None
    assert 0 < first.num_replays < again.num_replays <= again.num_calls == expected.num_calls
