"""Every path through the core gives on a GPU what it gives on a CPU, and waits for the GPU only where it must.

Without a GPU it is a pretended one (`tests.pretend_gpu`): its operations refuse tensors of two devices, and the code is
that of a GPU, with the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from kernels import linear_nll as linear_nll_module
from prime_core.codec import SubtokenCodec
from prime_core.config import CodecConfig, DiTConfig, UNetConfig
from prime_core.likelihood import estimate_grid_nelbo, estimate_likelihood
from prime_core.models import unet as unet_module
from prime_core.models.dit import DiT
from prime_core.models.unet import UNet
from prime_core.objectives import Objective, training_loss
from prime_core.sampling.canvas import digits_canvas
from prime_core.sampling.correctors import Corrector
from prime_core.sampling.dense import sample_dense
from prime_core.sampling.row import Row, new_row
from prime_core.sampling.sample import run_rows
from prime_core.sampling.settings import SamplingSettings
from prime_core.sampling.stepper import QueuedCall, Stepper
from prime_core.schedule import LinearSchedule
from prime_core.scoring.score_row import ScoreRow, draw_states, new_score_rows
from tests import pretend_gpu as pretending
from tests.pretend_gpu import GPU, pretend_gpu

pytest.importorskip("triton")

SCHEDULE = LinearSchedule()
TEXT, IMAGES = SubtokenCodec(20, 2), SubtokenCodec(16, 2)
CPU = torch.device("cpu")

Network = DiT | UNet
Run = Callable[[Network, SubtokenCodec, torch.device], Sequence[Tensor]]


only_pretended = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not tell what waits for it")


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torch rounds the factors of float32 convolutions to TF32 (11 bits), unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def gpu() -> Iterator[list[str] | None]:
    """A GPU, with what it is waited for if it is pretended."""
    if torch.cuda.is_available():
        yield None
    else:
        with pretend_gpu() as waits:
            yield waits


def text_network(*, time_conditioned: bool = False) -> tuple[Network, SubtokenCodec]:
    config = DiTConfig(
        hidden_size=32, num_blocks=2, num_heads=2, cond_dim=16, length=8, dropout=0.0,
        time_conditioned=time_conditioned,
    )  # fmt: skip
    return _random(DiT(config, CodecConfig(vocab_size=20, target_length=2), SCHEDULE)), TEXT


def image_network(**changes: object) -> tuple[Network, SubtokenCodec]:
    config = UNetConfig.model_validate(
        {
            "channels": 1, "height": 4, "width": 4, "model_channels": 32, "channel_mult": (1, 2),
            "num_res_blocks": 1, "attention_rates": (2,), "head_channels": 32, "dropout": 0.0, **changes,
        }
    )  # fmt: skip
    return _random(UNet(config, CodecConfig(vocab_size=16, target_length=2), SCHEDULE)), IMAGES


def _random(network: Network) -> Network:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def new_rows(
    codec: SubtokenCodec, lengths: Sequence[int], draw: str, corrector: Corrector | None, label: int | None
) -> list[Row]:
    settings = [SamplingSettings(draw=draw), SamplingSettings(0.7, 0.9, 5, draw=draw)]  # type: ignore[arg-type]
    rows = []
    for seed, length in enumerate(lengths):
        y = torch.full((length, codec.target_length), codec.mask_index)
        y[1, 0] = 1
        canvas = digits_canvas(codec, y)
        rows.append(new_row(canvas, SCHEDULE, settings[seed % 2], 3, seed, corrector=corrector, label=label))
    return rows


def sampled(
    *lengths: int, draw: str = "joint", corrector: Corrector | None = None, label: int | None = None
) -> Run:
    def run(network: Network, codec: SubtokenCodec, device: torch.device) -> list[Tensor]:
        rows = new_rows(codec, lengths, draw, corrector, label)
        run_rows(Stepper(network, codec, device), rows, max_rows=2)
        assert all(row.done and not row.failed for row in rows)
        return [row.y for row in rows]

    return run


def dense(network: Network, codec: SubtokenCodec, device: torch.device) -> list[Tensor]:
    y = torch.full((2, network.config.length, codec.target_length), codec.mask_index)
    settings = SamplingSettings(0.7, 0.9, 5)
    samples = sample_dense(network, codec, SCHEDULE, y, [1, 2], 2, settings, eps=0.01)
    return [samples.y, samples.ok]


def scored(network: Network, codec: SubtokenCodec, device: torch.device) -> list[Tensor]:
    x_0 = tokens(network, codec, num_rows=1)[0]
    states = draw_states((len(x_0), codec.target_length), 4, SCHEDULE, 0)
    rows = new_score_rows(codec.encode(x_0), x_0, states, 2, per_token=True)
    run_rows(Stepper(network, codec, device), rows)
    return [row.nats for row in rows]


def likelihoods(network: Network, codec: SubtokenCodec, device: torch.device) -> list[Tensor]:
    x_0 = tokens(network, codec).to(device)
    both = estimate_likelihood(
        network, codec, SCHEDULE, x_0, generator=torch.Generator().manual_seed(2), num_draws=1
    )
    grid = estimate_grid_nelbo(network, codec, SCHEDULE, x_0, 3, generator=torch.Generator().manual_seed(2))
    return [*both, grid]


def loss_of(objective: Objective) -> Run:
    def run(network: Network, codec: SubtokenCodec, device: torch.device) -> list[Tensor]:
        network.train().requires_grad_(True)
        x_0 = tokens(network, codec)
        uniforms = torch.rand(*x_0.shape, codec.target_length, generator=torch.Generator().manual_seed(3))
        t = torch.linspace(0.1, 0.9, len(x_0))
        loss = training_loss(
            network, codec, SCHEDULE, x_0.to(device), t.to(device), uniforms.to(device), objective=objective
        )
        loss.backward()
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        assert len(gradients) > 10
        return [loss.detach(), *gradients]

    return run


def tokens(network: Network, codec: SubtokenCodec, num_rows: int = 3) -> Tensor:
    shape = (num_rows, network.config.length)
    return torch.randint(codec.vocab_size, shape, generator=torch.Generator().manual_seed(1))


CORRECTOR = Corrector("corrected", 30, 1.0, 0.5)
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, SubtokenCodec]], Run]] = {
    "text": (text_network, sampled(8, 3, 8)),
    "text, time": (lambda: text_network(time_conditioned=True), sampled(8, 3)),
    "images": (image_network, sampled(16)),
    "images, digits alone": (image_network, sampled(16, draw="marginal", corrector=CORRECTOR)),
    "images, label and time": (
        lambda: image_network(labels="class", num_labels=3, time_conditioned=True),
        sampled(16, label=1),
    ),
    "dense text": (text_network, dense),
    "dense images": (image_network, dense),
    "scores": (text_network, scored),
    "likelihoods of text": (lambda: text_network(time_conditioned=True), likelihoods),
    "likelihoods of images": (image_network, likelihoods),
    "coded loss of text": (text_network, loss_of("coded")),
    "nelbo loss of text": (text_network, loss_of("nelbo")),
    "coded loss of images": (image_network, loss_of("coded")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_what_a_cpu_gives(name: str) -> None:
    build, run = CASES[name]
    want = run(*build(), CPU)  # type: ignore[arg-type]
    with gpu():
        network, codec = build()
        got = [part.cpu() for part in run(network.to(GPU), codec, GPU)]  # type: ignore[arg-type]
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        scale = max(float(other.double().abs().max()), 1.0)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * scale)


def test_a_network_can_be_moved_when_it_is_prepared() -> None:
    network, codec = text_network()
    assert isinstance(network, DiT)
    y = torch.full((8, codec.target_length), codec.mask_index)
    with torch.inference_mode():
        network.prepare()
        want = network.head(network.features(y, [8]))
        with gpu():
            got = network.to(GPU).head(network.features(y.to(GPU), [8])).cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@only_pretended
def test_products_of_the_head_have_aligned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores want rows of a multiple of 16 bytes, which 50257 logits are not."""
    shapes: list[tuple[int, ...]] = []

    def noting(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        shapes.append((*left.shape, *right.shape))
        return addmm(bias, left, right)

    addmm = torch.addmm
    monkeypatch.setattr(linear_nll_module.torch, "addmm", noting)
    network, codec = text_network()
    loss_of("coded")(network, codec, CPU)
    with pretend_gpu():
        network, codec = text_network()
        loss_of("coded")(network.to(GPU), codec, GPU)
    assert {shape[-1] for shape in shapes[:-1]} <= set(range(21)) and shapes[-1][-1] == 64


@only_pretended
def test_a_training_step_does_not_copy_the_digits_of_all_tokens() -> None:
    """Such a copy would be waited for behind the trunk."""
    copies = []
    network, _ = text_network()
    codec = SubtokenCodec(20, 2)
    with pretend_gpu() as waits:
        network.to(GPU)
        for _ in range(2):
            waits.clear()
            loss_of("coded")(network, codec, GPU)
            copies.append(waits.count("copy to the GPU"))
    num_inputs = 4  # tokens, times, uniform numbers, and the lengths of the rows
    assert copies == [num_inputs + 1, num_inputs]


@only_pretended
@pytest.mark.parametrize("time_conditioned", [False, True])
@pytest.mark.parametrize("lengths", [[8, 8], [8, 3, 5, 3]], ids=["even", "uneven"])
def test_nothing_is_waited_for_in_a_trunk(lengths: list[int], time_conditioned: bool) -> None:
    """A copy that is waited for behind the first blocks is a gap in which the GPU idles."""
    network, codec = text_network(time_conditioned=time_conditioned)
    assert isinstance(network, DiT)
    y = torch.full((sum(lengths), codec.target_length), codec.mask_index)
    t = torch.full((len(lengths),), 0.5, dtype=torch.float64)
    positions = torch.tensor([0, 2, 9, 10])
    with torch.inference_mode():
        want = network.head(network.features(y, lengths, t, positions))
    with pretend_gpu() as waits, torch.inference_mode():
        network.to(GPU)
        network.prepare()
        y, t = y.to(GPU), t.to(GPU)
        waits.clear()
        logits = network.head(network.features(y, lengths, t, positions))
        assert not waits
        torch.testing.assert_close(logits.cpu(), want)


@only_pretended
@pytest.mark.parametrize(("lengths", "planned"), [([8, 8], [True, False]), ([8, 3], [False] * 4)])
def test_cudnn_attends_only_where_shapes_come_again(
    lengths: list[int], planned: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It builds a plan for each shape, for tens of milliseconds: queries and rows of several lengths have too many."""
    network, codec = text_network()
    seen: list[bool] = []

    def noting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(q, k, v)

    attention = pretending._attention
    monkeypatch.setattr(pretending, "_attention", noting)
    y = torch.full((sum(lengths), codec.target_length), codec.mask_index)
    with pretend_gpu(), torch.inference_mode():
        network.to(GPU).features(y.to(GPU), lengths, positions=torch.tensor([0, 9]))
    assert seen == planned
    assert torch.backends.cuda.cudnn_sdp_enabled()


@only_pretended
def test_nothing_is_waited_for_in_the_head_of_images() -> None:
    network, codec = image_network(channels=2)
    assert isinstance(network, UNet)
    y = torch.full((2 * 32, codec.target_length), codec.mask_index)
    positions = torch.arange(0, 64, 5)
    with pretend_gpu() as waits, torch.inference_mode():
        network.to(GPU)
        features = network.features(y.to(GPU), [32, 32], positions=positions)
        waits.clear()
        network.head(features)
        assert not waits


def text_rows(codec: SubtokenCodec) -> list[Row | ScoreRow]:
    """Rows that are drawn, one of them masked again on the way, and one that is scored."""
    corrected = new_rows(codec, [8, 5], "joint", CORRECTOR, None)
    x_0 = torch.arange(6)
    states = draw_states((6, codec.target_length), 4, SCHEDULE, 0)
    return [*corrected, *new_score_rows(codec.encode(x_0), x_0, states, 1)]


def image_rows(codec: SubtokenCodec) -> list[Row | ScoreRow]:
    return [*new_rows(codec, [16], "joint", None, 1), *new_rows(codec, [16], "marginal", CORRECTOR, 2)]


@only_pretended
def test_the_head_of_images_is_one_product_a_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """To launch a block costs a GPU more than the product of a small one."""
    products: list[int] = []

    def noting(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        products.append(len(x))
        return linear(x, weight, bias)

    linear = nn.functional.linear
    monkeypatch.setattr(unet_module, "HEAD_BLOCK", 4)
    network, codec = image_network(channels=2)
    assert isinstance(network, UNet)
    y = torch.full((2 * 32, codec.target_length), codec.mask_index)
    positions = torch.arange(0, 64, 5)  # 7 of the first plane, 6 of the second
    with pretend_gpu(), torch.inference_mode():
        network.to(GPU)
        features = network.features(y.to(GPU), [32, 32], positions=positions)
        monkeypatch.setattr(unet_module.F, "linear", noting)
        network.head(features)
    assert products == [8, 8]


@only_pretended
@pytest.mark.parametrize("kind", ["text", "images"])
def test_a_step_waits_for_nothing_but_its_results(kind: str) -> None:
    """Everything goes to the GPU without waiting, and what comes back of rows of one kind is one copy."""
    if kind == "text":
        (network, codec), rows_of = text_network(time_conditioned=True), text_rows
    else:
        (network, codec), rows_of = image_network(labels="class", num_labels=3), image_rows
    with pretend_gpu() as waits:
        stepper = Stepper(network.to(GPU), codec, GPU)
        rows = rows_of(codec)
        stepper.step(rows)  # lays out tables
        rows += rows_of(codec)[:1]  # one that is new there
        waits.clear()
        call = stepper.queue(rows)
        assert not waits
        call.results()
        assert waits == ["event", "event"]


@only_pretended
def test_a_loop_waits_for_no_call_before_the_next_ones_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    network, codec = text_network()
    numbers = iter(range(100))

    def noting(stepper: Stepper, rows: Sequence[Row]) -> QueuedCall:
        call = queue(stepper, rows)
        results, number = call.results, next(numbers)
        order.append(f"queue {number}")
        monkeypatch.setattr(call, "results", lambda: (order.append(f"wait {number}"), results())[1])
        return call

    order: list[str] = []
    queue = Stepper.queue
    monkeypatch.setattr(Stepper, "queue", noting)
    canvas = digits_canvas(codec, torch.full((3, 2), codec.mask_index))
    row = new_row(canvas, SCHEDULE, SamplingSettings(), "exact", 1)
    with pretend_gpu():
        run_rows(Stepper(network.to(GPU), codec, GPU), [row])
    last = row.plan.nfe - 1
    assert last == 5
    assert order[:5] == ["queue 0", "queue 1", "queue 2", "wait 0", "queue 3"]
    assert order[-3:] == [f"wait {last - 2}", f"wait {last - 1}", f"wait {last}"]
    assert len(order) == 2 * row.plan.nfe


@only_pretended
def test_a_step_of_the_dense_sampler_copies_nothing_to_the_gpu() -> None:
    copies = []
    for num_steps in (1, 4):
        network, codec = text_network()
        y = torch.full((1, 4, codec.target_length), codec.mask_index)
        with pretend_gpu() as waits:
            network.to(GPU)
            waits.clear()
            sample_dense(network, codec, SCHEDULE, y, [1], num_steps, SamplingSettings())
            copies.append(waits.count("copy to the GPU"))
    assert copies[0] == copies[1]


@only_pretended
def test_the_pretended_gpu_refuses_what_a_gpu_refuses() -> None:
    with pretend_gpu() as waits:
        here, there = torch.ones(3), torch.ones(3).to(GPU)
        assert there.is_cuda and there.device == GPU and not (there + 1).is_cpu
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: there.copy_(there) @ here,
        ):
            with pytest.raises(RuntimeError, match="on the same device"):
                mixed()
        waits.clear()
        assert (there * torch.tensor(2.0)).sum().item() == 6
        assert there[torch.tensor([0, 1])].tolist() == [1, 1]
        assert len(there[there > 0]) == 3
        here.to(GPU, non_blocking=True)
        assert Counter(waits) == {
            "aten::_local_scalar_dense": 1,
            "aten::index by an index on the CPU": 1,
            "copy to the CPU": 1,
            "aten::index by a mask": 1,
        }
