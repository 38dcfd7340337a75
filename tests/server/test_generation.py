"""Weights that take over from others: at most two at a time, turn by turn, and none is kept without rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from prime_core.checkpoint import Checkpoint, load_checkpoint
from server.engine.batcher import Batcher, Job
from server.engine.generation import Generations
from tests.server.test_batcher import make_job


@pytest.fixture
def checkpoints(model_path: Path) -> list[Checkpoint]:
    return [load_checkpoint(model_path) for _ in range(3)]


def served(generations: Generations) -> list[Checkpoint]:
    return [each.checkpoint for each in generations]


def in_turn(generations: Generations, number: int) -> list[Checkpoint]:
    """The weights of so many calls, each of which has rows."""
    batches = [generations.choose() for _ in range(number)]
    assert all(batch.entries for batch in batches)
    return [batch.generation.checkpoint for batch in batches]


def test_idle_weights_are_replaced_and_let_go_at_once(checkpoints: list[Checkpoint]) -> None:
    first, second, third = checkpoints
    generations = Generations(first, Batcher(4, 16))
    assert not generations.renewable
    assert not generations.renew()
    generations.replace(second)
    generations.replace(third)  # before the other was taken, which never serves
    assert generations.renewable
    assert generations.renew()
    assert served(generations) == [third]
    assert not generations.renewable
    assert not generations.renew()
    assert generations.choose().entries == []


def test_weights_in_use_stay_until_their_rows_are_done_and_share_the_calls(
    checkpoints: list[Checkpoint],
) -> None:
    first, second, third = checkpoints
    generations = Generations(first, Batcher(4, 16))
    old, new = make_job((3, 9)), make_job((2, 9))
    generations.current.batcher.add(old)
    generations.replace(second)
    assert generations.renewable
    assert not generations.renew()  # nothing is let go
    assert served(generations) == [first, second]
    assert in_turn(generations, 3) == [first] * 3
    generations.current.batcher.add(new)
    turns = in_turn(generations, 4)
    assert turns in ([first, second] * 2, [second, first] * 2)

    generations.replace(third)  # would be the third at a time
    assert not generations.renewable
    assert not generations.renew()
    assert served(generations) == [first, second]

    drop(generations, 0, old)
    assert in_turn(generations, 2) == [second] * 2
    assert generations.renewable
    assert generations.renew()
    assert served(generations) == [second, third]
    drop(generations, 0, new)
    assert generations.renewable  # for nobody needs the second any more
    assert generations.renew()
    assert served(generations) == [third]
    assert not generations.renewable


def drop(generations: Generations, number: int, job: Job) -> None:
    list(generations)[number].batcher.drop([job])
