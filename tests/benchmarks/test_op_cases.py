"""Bytes and FLOPs of ops by hand; input sets that outgrow the cache; every op runs as it is registered."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

import kernels
from benchmarks import ops
from benchmarks.op_cases import OPS, describe_size, num_input_sets
from benchmarks.op_inputs import tensors_of
from benchmarks.ops import OpsSettings, run_ops
from benchmarks.report import headlines, milliseconds, ops_table
from kernels.linear import pack_weight, packed_linear
from kernels.token_digits import TokenDigits

TEXT = {"R": 3, "V": 300, "S": 2}  # base 18
HEAD = {"R": 3, "D": 4, "V": 300, "S": 2}
TOKENS = {"T": 5, "D": 128}


def public_ops() -> Iterator[Callable[..., Any]]:
    """Every public function of `kernels` that chooses between implementations, and the product for CPUs alone.

    Not the in-place forms of other ops, whose names end in "_".
    """
    yield packed_linear
    for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
        if module.ispkg:
            continue
        for name, function in vars(importlib.import_module(module.name)).items():
            if not inspect.isfunction(function) or function.__module__ != module.name:
                continue
            backend = inspect.signature(function).parameters.get("backend")
            if backend is not None and backend.default == "auto" and not name.endswith("_"):
                yield function


def test_every_public_op_is_measured() -> None:
    there = {function.__name__ for function in public_ops()}
    assert len(there) > 15
    assert {op.function.__name__ for op in OPS.values()} == there


@pytest.mark.parametrize(
    ("name", "size", "num_bytes", "num_flops"),
    [
        # 4 tokens: 2 int64 digits in, 6 bfloat16 features out; a table of 19 rows of 3 bfloat16.
        ("embed_subtokens", {"T": 4, "D": 6, "V": 300, "S": 2}, 4 * 16 + 19 * 3 * 2 + 4 * 6 * 2, 0),
        # 1200 logit bytes a row, y in and out 32, due 2, u 8, finite 1; 16 bits of every token's digits.
        ("reveal_tokens", TEXT, 3 * (1200 + 32 + 2 + 9) + 300 * 2, 5 * 900),
        # The same, temperature 4, top k 8, top p 4.
        ("reveal_tokens, top k and p", TEXT, 3 * (1200 + 32 + 2 + 9 + 16) + 300 * 2, 5 * 900),
        ("reveal_digits", TEXT, 3 * (1200 + 32 + 2 + 9 + 8) + 300 * 2, 5 * 900),
        # The same, 48 more bytes of the features' gradient and 114 of the table's; each feature is added once.
        ("embed_subtokens and gradient", {"T": 4, "D": 6, "V": 300, "S": 2}, 64 + 114 + 48 + 48 + 114, 24),
        # 2 images of 3 planes of 4 x 4 pixels of 2 digits, 5 features each; a table of 5 rows (base 4).
        ("embed_planes", {"B": 2, "C": 3, "H": 4, "E": 5, "V": 16, "S": 2}, 192 * 8 + 25 * 2 + 192 * 10, 0),
        # 2 x 64 x 16 bfloat16 in and out; 64 weights, biases; 128 scales, shifts.
        ("group_norm_silu", {"B": 2, "C": 64, "H": 4}, 2048 * 4 + 64 * 4 + 128 * 4, 9 * 2048),
        # 640 features of 4 bytes in, 2 out; 3 vectors of 128 float32.
        ("norm_modulate", TOKENS, 640 * 6 + 3 * 512, 7 * 640),
        ("gated_residual", TOKENS, 640 * 10 + 512, 2 * 640),
        ("residual_norm_modulate", TOKENS, 640 * 12 + 4 * 512, 9 * 640),
        # 1280 queries and keys in and out; cos and sin of 32 angles a token; 6 FLOPs a pair of features.
        ("rotate_qk", TOKENS, 1280 * 4 + 5 * 2 * 32 * 4, 6 * 640),
        ("packed_linear", {"R": 3, "K": 4, "N": 5}, 2 * (12 + 15 + 20 + 5), 2 * 60 + 15),
        ("compact_rows", {"R": 5}, 5 + 40 + 8, 0),
        ("gather_rows", {"R": 5, "D": 3}, 2 * 120 + 40 + 8, 0),
        ("scatter_rows", {"R": 5, "D": 3}, 2 * 120 + 40 + 8, 0),
        ("coded_nll", TEXT, 3 * (1200 + 16 + 8 + 4) + 300 * 16, 4 * 900),
        ("coded_nll and gradient", TEXT, 3 * (3 * 1200 + 16 + 8 + 4) + 300 * 16, 8 * 900),
        ("subtoken_nll", TEXT, 3 * (1200 + 16 + 8 + 8) + 300 * 16, 6 * 900),
        # Two states a row; a second set of tokens.
        ("revealed_nll", TEXT, 3 * (1200 + 32 + 4) + 300 * 16, 5 * 900),
        # 12 features, 1200 weights, 300 biases; y_t 16, x_0 8, weight 4 a row; one loss.
        ("linear_nll", HEAD, 4 * 1512 + 3 * 28 + 300 * 16 + 4, 2 * 3600 + 5 * 900),
        ("linear_nll and gradient", HEAD, 8 * 1512 + 3 * 28 + 300 * 16 + 4, 6 * 3600 + 10 * 900),
        # Two results a row in the place of its weight.
        ("linear_subtoken_nll", HEAD, 4 * 1512 + 3 * 32 + 300 * 16, 2 * 3600 + 7 * 900),
        ("uniform", {"R": 5}, 5 * 40, 10),
    ],
)
def test_work_by_hand(name: str, size: dict[str, int], num_bytes: int, num_flops: int) -> None:
    op = OPS[name]
    assert (op.num_bytes(size), op.num_flops(size)) == (num_bytes, num_flops)


@pytest.mark.parametrize("name", [name for name in OPS if name not in ("uniform", "compact_rows")])
def test_bytes_are_those_of_the_inputs(name: str) -> None:
    """What is read is in the inputs: no tensor is forgotten, none is counted twice."""
    op = OPS[name]
    (size,) = op.sizes["smoke"]
    try:
        inputs = op.inputs(size, torch.Generator().manual_seed(0), torch.device("cpu"))
    except NotImplementedError:
        pytest.skip("weights cannot be packed here")
    held = sum(tensor.nbytes for tensor in tensors_of(inputs))
    assert held <= op.num_bytes(size) <= 3 * held


def test_inputs_fit_the_signature_and_differ() -> None:
    for name, op in OPS.items():
        if name == "packed_linear" and pack_weight(torch.ones(8, 16, dtype=torch.bfloat16)) is None:
            continue
        generator = torch.Generator().manual_seed(0)
        sets = [op.inputs(op.sizes["smoke"][0], generator, torch.device("cpu")) for _ in range(2)]
        inspect.signature(op.function).bind(**sets[0])
        first, other = (next(tensors_of(inputs)) for inputs in sets)
        assert not torch.equal(first, other), name


def test_draws_are_asked_for_as_the_samplers_ask() -> None:
    """Digits packed once, and no truncation where there is none: an op takes other kernels for either."""
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    for name in ("reveal_tokens", "reveal_digits"):
        inputs = OPS[name].inputs(OPS[name].sizes["smoke"][0], generator, device)
        assert isinstance(inputs["digits"], TokenDigits)
        assert inputs["temperature"] is inputs["top_k"] is inputs["top_p"] is None
    truncated = OPS["reveal_tokens, top k and p"]
    inputs = truncated.inputs(truncated.sizes["smoke"][0], generator, device)
    assert all(isinstance(inputs[key], torch.Tensor) for key in ("temperature", "top_k", "top_p"))


def test_gradients_are_taken_of_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of an embedding, and both tensors of a head."""
    taken: list[list[tuple[int, ...]]] = []
    grad = torch.autograd.grad

    def spy(result: Any, leaves: Any, *others: Any, **named: Any) -> Any:
        taken.append([tuple(leaf.shape) for leaf in leaves])
        return grad(result, leaves, *others, **named)

    monkeypatch.setattr(torch.autograd, "grad", spy)
    for only, shapes in {
        "embed_subtokens and": [(19, 4)],
        "linear_nll and": [(4, 8), (300, 8), (300,)],
    }.items():
        taken.clear()
        run_ops(OpsSettings(only=only, scale="smoke", repeats=1, device="cpu"), lambda line: None)
        assert shapes in taken


def test_an_op_that_cannot_run_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.op_inputs.pack_weight", lambda weight: None)
    settings = OpsSettings(only="packed_linear", scale="smoke", repeats=1, device="cpu")
    (entry,) = run_ops(settings, lambda line: None)["ops"]
    assert entry["seconds"] is None and "cannot be packed" in entry["error"]


def test_a_kernel_that_fails_does_not_take_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such errors are of `triton.runtime.errors` or CUDA's own: RuntimeErrors."""

    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(OPS, "gather_rows", replace(OPS["gather_rows"], function=fail))
    only = {name: OPS[name] for name in ("gather_rows", "scatter_rows")}
    monkeypatch.setattr("benchmarks.ops.OPS", only)
    settings = OpsSettings(scale="smoke", repeats=1, device="cpu")
    failed, other = run_ops(settings, lambda line: None)["ops"]
    assert failed["seconds"] is None and failed["error"] == "OutOfMemoryError: CUDA out of memory"
    assert other["seconds"] > 0


def test_input_sets_outgrow_the_cache() -> None:
    assert num_input_sets(set_bytes=10, cache_bytes=50) == 11
    assert num_input_sets(set_bytes=1000, cache_bytes=50) == 2
    assert num_input_sets(set_bytes=1, cache_bytes=10**9) == 16
    assert num_input_sets(set_bytes=600, cache_bytes=2000, limit_bytes=1800) == 3


def test_a_backend_that_is_not_there_is_reported_and_not_hidden() -> None:
    settings = OpsSettings(backend="triton", only="reveal_digits", scale="smoke", repeats=1, device="cpu")
    (entry,) = run_ops(settings, lambda line: None)["ops"]
    assert entry["backend"] == "triton"
    # Its kernel runs in the interpreter, or the entry says why there is no time.
    assert (entry["seconds"] is None) == ("error" in entry)
    assert entry["seconds"] is None or entry["seconds"] > 0


def test_ops_are_chosen_by_name() -> None:
    with pytest.raises(ValueError, match="no op starts with"):
        OpsSettings(only="nothing")
    assert describe_size({"R": 5, "V": 7}) == "R=5, V=7"


def test_a_gpu_is_timed_when_the_calls_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a head start the time of small kernels would be that of the host, which queues them more slowly."""
    seen: list[object] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            seen.append(f"event in {stream}")

        def synchronize(self) -> None:
            seen.append("waits")

        def elapsed_time(self, stop: object) -> float:
            return 3.0

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(cycles))
    calls: list[Any] = [{"call": 1}, {"call": 2}]
    assert ops._series_seconds(seen.append, calls, device, 0.01) == 3e-3
    assert seen == [20_000_000, "event in main", *calls, "event in main", "waits"]


def test_units_of_the_table_by_hand() -> None:
    rates = {"product_shape": [2, 3, 4], "product_flops_per_s": {"float32": 2.5e12}, "copy_bytes_per_s": 5e9}
    figures = {"seconds": 0.0125, "bytes": 3_000_000, "flops": 4_500_000, "bytes_per_s": 2.4e8}
    shares = {"share_of_copy_bandwidth": 0.048, "share_of_product_rate": 0.001}
    op = {"op": "reveal", "size": "R=1", "backend": "torch", **figures, **shares}
    machine = {"gpu": None, "cpu": "a processor", "num_threads": 2}
    document = {"machine": machine, "versions": {"torch": "2"}, "commit": None, "rates": rates, "ops": [op]}
    first, ceilings, _, _, row = ops_table(document).splitlines()
    assert first == "a processor, 2 threads, torch 2, commit unknown"
    assert ceilings == "product 2x3x4: float32 2.500 TFLOP/s; copy 5.0 GB/s"
    assert row.split() == ["reveal", "R=1", "torch", "12.5", "ms", "3", "4.5", "0.24", "4.8%", "0.1%"]
    assert [milliseconds(seconds) for seconds in (2.5, 1.0, 0.5, 1e-3, 2e-5)] == [
        "2.5 s", "1 s", "500 ms", "1 ms", "20 us"
    ]  # fmt: skip


def test_memory_is_shown_in_megabytes() -> None:
    task = {"task": "nelbo", "largest_tensor_shape": [2, 3], "largest_tensor_bytes": 24_000_000}
    document = {
        "benchmark": "memory", "logits_bytes": 5_000_000_000, "tasks": [{**task, "peak_bytes": None}]
    }  # fmt: skip
    assert headlines(document) == ["nelbo: largest tensor 24 MB, peak - MB; all logits 5000 MB"]
