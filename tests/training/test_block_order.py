"""The order of training blocks: permutations, purely a function of seed and position."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.shards import BlockOrder


@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 5))
def test_each_epoch_is_a_permutation_and_a_pure_function(num_blocks: int, seed: int, epoch: int) -> None:
    order = BlockOrder(num_blocks, seed)
    positions = range(epoch * num_blocks, (epoch + 1) * num_blocks)
    visited = [order.index(position) for position in positions]
    assert sorted(visited) == list(range(num_blocks))
    # Resuming anywhere, or asking backwards, gives the same blocks.
    assert [BlockOrder(num_blocks, seed).index(position) for position in positions] == visited
    backwards = [order.index(position) for position in reversed(range(positions.stop))]
    assert backwards[:num_blocks] == visited[::-1]


def test_order_depends_on_seed_and_epoch_and_is_stable_over_versions() -> None:
    first = [BlockOrder(1000, 1).index(position) for position in range(2000)]
    assert first[:1000] != first[1000:]
    assert first[:1000] != [BlockOrder(1000, 2).index(position) for position in range(1000)]
    assert [BlockOrder(8, 0).index(position) for position in range(16)] == [
        0,
        2,
        1,
        5,
        4,
        3,
        6,
        7,
        5,
        3,
        7,
        2,
        4,
        1,
        0,
        6,
    ]


@pytest.mark.parametrize(("num_blocks", "seed"), [(0, 0), (1, -1), (1, 2**64)])
def test_order_arguments_are_checked(num_blocks: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"num_blocks is|seed is"):
        BlockOrder(num_blocks, seed)
    with pytest.raises(ValueError, match="step_position is -1"):
        BlockOrder(1, 0).index(-1)
