"""Digit embedding: order, layouts, number types, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.embed import embed_planes, embed_subtokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param  # type: ignore[no-any-return]


def random_digits(generator: torch.Generator, num_values: int, *shape: int) -> Tensor:
    return torch.randint(0, num_values, shape, generator=generator).to(DEVICE)


def random_table(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def test_digit_embeddings_are_concatenated_in_order(backend: Backend) -> None:
    table = torch.arange(12.0, device=DEVICE).reshape(4, 3)  # b = 3, the last row is the mask's
    y_t = torch.tensor([[[0, 3], [2, 1]]], device=DEVICE)
    expected = torch.tensor([[[0.0, 1, 2, 9, 10, 11], [6, 7, 8, 3, 4, 5]]], device=DEVICE)
    assert torch.equal(embed_subtokens(y_t, table, backend=backend), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_planes_are_channels_then_digits_then_columns(
    backend: Backend, memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    y_t = random_digits(generator, 5, 2, 3, 3, 5, 2)
    table = random_table(generator, 5, 4)
    out = embed_planes(y_t, table, memory_format=memory_format, backend=backend)
    assert out.shape == (2, 24, 3, 5) and out.is_contiguous(memory_format=memory_format)
    for channel in range(3):
        for digit in range(2):
            first = (channel * 2 + digit) * 4
            expected = table[y_t[:, channel, :, :, digit]].permute(0, 3, 1, 2)
            assert torch.equal(out[:, first : first + 4], expected)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_cast_is_that_of_the_result(
    table_dtype: torch.dtype, out_dtype: torch.dtype | None, backend: Backend, generator: torch.Generator
) -> None:
    table = random_table(generator, 6, 8, dtype=table_dtype)
    y_t = random_digits(generator, 6, 7, 3)
    expected = table[y_t].flatten(-2).to(out_dtype or table_dtype)
    out = embed_subtokens(y_t, table, out_dtype=out_dtype, backend=backend)
    # Triton's interpreter cuts numbers off where a GPU rounds them: an ulp of bfloat16.
    cut = backend == "triton" and DEVICE == "cpu" and expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-7 if cut else 0, atol=0)
    planes = embed_planes(y_t.view(7, 1, 1, 1, 3), table, out_dtype=out_dtype, backend=backend)
    torch.testing.assert_close(planes.flatten(1), expected, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize("num_columns", [1, 3, 16, 48, 300])
@pytest.mark.parametrize("shape", [(1, 1), (0, 2), (65, 3), (2, 3, 4, 2)])
def test_kernel_equals_reference_on_odd_shapes(
    shape: tuple[int, ...], num_columns: int, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    table, y_t = random_table(generator, 9, num_columns), random_digits(generator, 9, *shape)
    out = embed_subtokens(y_t, table, backend="triton")
    assert torch.equal(out, embed_subtokens(y_t, table, backend="reference"))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 17, 16, 2), (0, 3, 2, 2, 2), (3, 1, 2, 5, 3)])
def test_planes_of_odd_shapes(
    shape: tuple[int, ...], memory_format: torch.memory_format, generator: torch.Generator
) -> None:
    pytest.importorskip("triton")
    table, y_t = random_table(generator, 9, 10), random_digits(generator, 9, *shape)
    out, expected = (
        embed_planes(y_t, table, memory_format=memory_format, backend=name)
        for name in ("triton", "reference")
    )
    assert torch.equal(out, expected)


def test_strided_digits_and_tables(backend: Backend, generator: torch.Generator) -> None:
    y_t, table = random_digits(generator, 5, 3, 8).T, random_table(generator, 4, 5).T
    assert torch.equal(embed_subtokens(y_t, table, backend=backend), table[y_t].flatten(-2))
    pixels = random_digits(generator, 5, 2, 4, 3, 2, 2).permute(3, 4, 0, 1, 2)
    planes = embed_planes(pixels, table, backend=backend)
    assert torch.equal(planes, embed_planes(pixels.contiguous(), table.contiguous(), backend="reference"))


def test_a_kernel_gives_nan_for_wrong_digits() -> None:
    pytest.importorskip("triton")
    y_t = torch.tensor([[0, -1], [5, 4]], device=DEVICE)
    wrong = torch.tensor([[False, True], [True, False]], device=DEVICE)
    table = torch.zeros(5, 3, device=DEVICE)
    out = embed_subtokens(y_t, table, backend="triton").view(2, 2, 3)
    assert torch.equal(out.isnan(), wrong[..., None].expand(2, 2, 3))
    for memory_format in FORMATS:
        planes = embed_planes(y_t.view(2, 1, 1, 2, 1), table, memory_format=memory_format, backend="triton")
        assert torch.equal(planes.isnan(), wrong[:, None, None].expand(2, 3, 1, 2))


def test_other_memory_formats_are_refused() -> None:
    y_t = torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="memory_format must be"):
        embed_planes(y_t, torch.zeros(2, 1), memory_format=torch.channels_last_3d)


def test_the_path_that_was_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import kernels.triton_ops.embed as triton_embed

    launch, ran = triton_embed.launch_embed, []

    def counted(*args: object) -> Tensor:
        ran.append(args[-1])
        return launch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_embed, "launch_embed", counted)
    y_t, table = torch.zeros(1, 1, 1, 1, 2, dtype=torch.int64, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    embed_subtokens(y_t, table, backend="reference")
    embed_planes(y_t, table, backend="reference")
    assert not ran
    embed_subtokens(y_t, table, backend="triton")
    embed_planes(y_t, table, backend="triton")
    embed_planes(y_t, table, memory_format=torch.channels_last, backend="triton")
    assert ran == ["tokens", "channels_first", "channels_last"]
