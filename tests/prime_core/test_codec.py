import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prime_core.codec import SubtokenCodec, smallest_base


@given(st.integers(2, 10**7), st.integers(1, 24))
def test_base_is_the_smallest(vocab_size: int, target_length: int) -> None:
    base = smallest_base(vocab_size, target_length)
    assert base**target_length >= vocab_size
    assert base == 2 or (base - 1) ** target_length < vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "target_length", "base"),
    [(1000, 3, 10), (50257, 1, 50257), (50257, 2, 225), (50257, 3, 37), (50257, 4, 15), (50257, 6, 7),
     (50257, 8, 4), (256, 2, 16), (256, 8, 2), (2**24, 2, 4096), (3, 2, 2)],
)  # fmt: skip
def test_published_bases(vocab_size: int, target_length: int, base: int) -> None:
    assert smallest_base(vocab_size, target_length) == base


@given(st.data())
def test_round_trip_with_and_without_permutation(data: st.DataObject) -> None:
    vocab_size = data.draw(st.integers(2, 300))
    target_length = data.draw(st.integers(1, (vocab_size - 1).bit_length()))
    seed = data.draw(st.none() | st.integers(0, 100))
    permutation = (
        None if seed is None else torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))
    )
    codec = SubtokenCodec(vocab_size, target_length, permutation)
    x_0 = torch.arange(vocab_size).view(1, -1)
    y_0 = codec.encode(x_0)
    assert y_0.shape == (1, vocab_size, target_length)
    assert 0 <= int(y_0.min()) and int(y_0.max()) < codec.base == codec.mask_index
    assert torch.equal(codec.decode(y_0), x_0)
    assert len(torch.unique(y_0[0], dim=0)) == vocab_size


def test_digits_are_most_significant_first() -> None:
    assert SubtokenCodec(1000, 3).encode(torch.tensor([427])).tolist() == [[4, 2, 7]]


def test_one_digit_is_the_token_itself() -> None:
    assert SubtokenCodec(50257, 1).encode(torch.tensor([50256])).tolist() == [[50256]]


def test_permutation_is_applied_before_the_digits() -> None:
    codec = SubtokenCodec(4, 2, torch.tensor([3, 0, 2, 1]))
    assert codec.encode(torch.tensor([0])).tolist() == [[1, 1]]


def test_digits_go_to_a_device_once() -> None:
    codec = SubtokenCodec(10, 2)
    assert codec.digits_on(torch.device("cpu")) is codec.digits
    with torch.inference_mode():
        there = codec.digits_on(torch.device("meta"))
    assert there.device.type == "meta" and not there.is_inference()
    assert codec.digits_on(torch.device("meta")) is there


@pytest.mark.parametrize("tokens", [torch.tensor([2.9]), torch.tensor([True]), torch.tensor([1j])])
def test_tokens_are_integers(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="token ids must be integers, got torch"):
        SubtokenCodec(4, 2).encode(tokens)


@pytest.mark.parametrize(("vocab_size", "target_length"), [(1, 1), (0, 2), (4, 0), (4, 3), (256, 9)])
def test_sizes_out_of_range(vocab_size: int, target_length: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        SubtokenCodec(vocab_size, target_length)


@pytest.mark.parametrize("permutation", [[0, 1, 1, 3], [0, 1, 2], [0.0, 1.0, 2.0, 3.0], [0, 1, 2, 4]])
def test_bad_permutations(permutation: list[float]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        SubtokenCodec(4, 2, torch.tensor(permutation))


@pytest.mark.parametrize("token", [-1, 4])
def test_tokens_out_of_range(token: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        SubtokenCodec(4, 2).encode(torch.tensor([1, token, 2]))


@pytest.mark.parametrize("y", [[[2, 0]], [[-1, 1]], [[1]], [[1, 1]], [[0, 1], [1, 1]], [[0, 2], [0, 1]]])
def test_digits_that_are_no_token(y: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="digits"):
        SubtokenCodec(3, 2).decode(torch.tensor(y))


@pytest.mark.parametrize("digits", [torch.tensor([[0.9, 1.0]]), torch.tensor([[True, False]])])
def test_decode_takes_integers_only(digits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=f"digits must be integers, got {digits.dtype}"):
        SubtokenCodec(4, 2).decode(digits)
