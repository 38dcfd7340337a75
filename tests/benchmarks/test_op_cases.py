"""Bytes and FLOPs of ops by hand; input sets that outgrow the cache; every op runs as it is registered."""

import inspect

import pytest
import torch

from benchmarks.op_cases import OPS, describe_size, num_input_sets
from benchmarks.ops import OpsSettings, run_ops

TEXT = {"R": 3, "V": 300, "S": 2}  # base 18


@pytest.mark.parametrize(
    ("name", "size", "num_bytes", "num_flops"),
    [
        # 4 tokens: 2 int64 digits in, 6 bfloat16 features out; a table of 19 rows of 3 bfloat16.
        ("embed_subtokens", {"T": 4, "D": 6, "V": 300, "S": 2}, 4 * 16 + 19 * 3 * 2 + 4 * 6 * 2, 0),
        # 1200 logit bytes a row, y in and out 32, due 2, u 8, temperature 4, top k 8, top p 4, finite 1.
        ("reveal_tokens", TEXT, 3 * (1200 + 32 + 2 + 25) + 300 * 16, 5 * 900),
        ("reveal_digits", TEXT, 3 * (1200 + 32 + 2 + 25 + 8) + 300 * 16, 5 * 900),
        ("coded_nll", TEXT, 3 * (1200 + 16 + 8 + 4) + 300 * 16, 4 * 900),
        ("coded_nll and gradient", TEXT, 3 * (3 * 1200 + 16 + 8 + 4) + 300 * 16, 8 * 900),
        ("subtoken_nll", TEXT, 3 * (1200 + 16 + 8 + 8) + 300 * 16, 6 * 900),
        ("uniform", {"R": 5}, 5 * 40, 10),
    ],
)
def test_work_by_hand(name: str, size: dict[str, int], num_bytes: int, num_flops: int) -> None:
    op = OPS[name]
    assert (op.num_bytes(size), op.num_flops(size)) == (num_bytes, num_flops)


@pytest.mark.parametrize("name", [name for name in OPS if not name.startswith("uniform")])
def test_bytes_are_those_of_the_inputs(name: str) -> None:
    """What is read is in the inputs: no tensor is forgotten, none is counted twice."""
    op = OPS[name]
    (size,) = op.sizes["smoke"]
    inputs = op.inputs(size, torch.Generator().manual_seed(0), torch.device("cpu"))
    held = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))
    assert held <= op.num_bytes(size) <= 3 * held


def test_inputs_fit_the_signature_and_differ() -> None:
    for name, op in OPS.items():
        generator = torch.Generator().manual_seed(0)
        sets = [op.inputs(op.sizes["smoke"][0], generator, torch.device("cpu")) for _ in range(2)]
        inspect.signature(op.function).bind(**sets[0])
        first = next(key for key, value in sets[0].items() if isinstance(value, torch.Tensor))
        assert not torch.equal(sets[0][first], sets[1][first]), name


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
