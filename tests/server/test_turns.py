"""Fair shares of the engine's time, by the clocks alone and with two models in one engine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from prime_core.sampling.prepare import prepare_rows
from server.engine.batcher import Job
from server.engine.call_cost import CallCost
from server.engine.engine import Engine
from server.engine.retry import seconds_until_free
from server.engine.turns import Turns
from server.settings import Settings
from tests.server.image_model import NAME as IMAGES
from tests.server.running import NAME as TEXT
from tests.server.running import Hooked, make_engine, wait_until


def take_turns(turns: Turns, cost_s: dict[str, float], num: int) -> dict[str, float]:
    """Let the models of `cost_s`, all busy, take turns; return the time of each."""
    spent = dict.fromkeys(cost_s, 0.0)
    for _ in range(num):
        name = turns.choose(cost_s)
        assert name is not None
        turns.charge(name, cost_s[name])
        spent[name] += cost_s[name]
    return spent


def test_nobody_is_busy() -> None:
    assert Turns(["a"]).choose([]) is None


def test_the_first_of_those_equally_far_behind() -> None:
    turns = Turns(["b", "a"])
    assert turns.choose(["a", "b"]) == "b"
    assert turns.choose(["a"]) == "a"


def test_busy_models_get_equal_time_whatever_a_call_costs() -> None:
    cost_s = {"text": 0.005, "images": 0.05, "other": 0.0131}
    spent = take_turns(Turns(cost_s), cost_s, 2000)
    # Nobody is behind another by more than the dearest call.
    assert max(spent.values()) - min(spent.values()) <= 0.05 + 1e-9


def test_idle_time_is_no_claim_and_time_alone_no_debt() -> None:
    cost_s = {"a": 0.01, "b": 0.01}
    turns = Turns(cost_s)
    take_turns(turns, {"a": 0.01}, 10_000)  # alone
    spent = take_turns(turns, cost_s, 100)
    assert spent["a"] == pytest.approx(spent["b"], abs=0.011)
    take_turns(turns, {"b": 0.01}, 10_000)
    spent = take_turns(turns, cost_s, 100)
    assert spent["a"] == pytest.approx(spent["b"], abs=0.021)


def test_a_model_that_naps_after_every_call_gets_no_more_than_its_share() -> None:
    turns, rng = Turns(["steady", "napping"]), random.Random(0)
    spent = {"steady": 0.0, "napping": 0.0}
    for _ in range(5000):
        name = turns.choose(["steady", "napping"] if rng.random() < 0.7 else ["steady"])
        assert name is not None
        cost_s = 0.05 if name == "napping" else 0.01
        turns.charge(name, cost_s)
        spent[name] += cost_s
    assert spent["napping"] <= spent["steady"] + 0.06


def submit(engine: Engine, model: str, num_rows: int) -> Job:
    """Rows with an event for every digit."""
    rows = prepare_rows(engine.queues[model].checkpoint, n=num_rows, steps="exact", seed=0).rows
    engine.reserve(model, len(rows))
    job = Job(model, list(rows), time.monotonic())
    engine.submit(job)
    return job


def sleeping(seconds: float) -> Callable[[Sequence[int]], None]:
    return lambda lengths: time.sleep(seconds)


def hooked_of(engine: Engine, name: str) -> Hooked:
    denoiser = engine.queues[name].checkpoint.denoiser
    assert isinstance(denoiser, Hooked)
    return denoiser


def seconds_of(engine: Engine, model: str) -> float:
    value = engine.metrics.registry.get_sample_value("prime_step_duration_seconds_sum", {"model": model})
    assert value is not None
    return value


def test_neither_text_nor_images_starve(model_path: Path, images_path: Path) -> None:
    engine, _ = make_engine(
        Settings.model_validate({"model": [model_path, images_path], "max_batch_rows": 1})
    )
    hooked_of(engine, TEXT).hook = sleeping(0.005)
    hooked_of(engine, IMAGES).hook = sleeping(0.05)
    engine.start()
    wait_until(lambda: engine.state == "ready")
    before = {name: seconds_of(engine, name) for name in engine.queues}
    jobs = [submit(engine, TEXT, 16), submit(engine, IMAGES, 2)]
    wait_until(lambda: sum(seconds_of(engine, name) - before[name] for name in before) > 1.2)
    spent = {name: seconds_of(engine, name) - before[name] for name in before}
    assert not any(job.done.done() for job in jobs), "one was not busy all the time"
    assert all(seconds >= 0.4 * sum(spent.values()) for seconds in spent.values()), spent
    for job in jobs:
        job.done.cancel()
    wait_until(lambda: engine.held_rows == 0)
    engine.stop()


def test_a_turn_that_raises_is_counted(
    model_path: Path, images_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = make_engine(Settings.model_validate({"model": [model_path, images_path]}))
    submit(engine, TEXT, 1)
    submit(engine, IMAGES, 1)

    def fail_late(batch: Any) -> None:
        time.sleep(0.01)
        raise ZeroDivisionError

    monkeypatch.setattr(engine.queues[TEXT], "begin", fail_late)
    assert engine.step()
    assert engine.queues[TEXT].crashes == 1
    assert engine._turns.choose([TEXT, IMAGES]) == IMAGES


def test_retry_after_counts_the_shares_of_the_others(model_path: Path, images_path: Path) -> None:
    settings = {"model": [model_path, images_path], "max_batch_rows": 1, "max_queue_rows": 4, "max_n": 4}
    engine, _ = make_engine(Settings.model_validate(settings))
    engine.queues[TEXT].stopwatch.cost = CallCost(0.5, 0)
    engine.queues[IMAGES].stopwatch.cost = CallCost(2.0, 0)
    jobs = [submit(engine, TEXT, 1), submit(engine, IMAGES, 3)]
    text_s, image_s = (0.5 * jobs[0].rows[0].remaining, 2.0 * jobs[1].rows[0].remaining)
    assert (text_s, image_s) == (64.0, 256.0)
    queues = engine.queues.values()
    assert seconds_until_free(queues, 1) == 2 * text_s  # text has half of the time
    all_s = text_s + 3 * image_s
    assert seconds_until_free(queues, 2) == all_s  # the three of images come free together
    assert seconds_until_free(queues, 4) == all_s


def test_retry_after_counts_what_rows_that_are_reserved_only_will_take_of_the_calls(model_path: Path) -> None:
    settings = {"model": [model_path], "max_batch_rows": 1, "max_queue_rows": 16, "max_n": 16}
    engine, _ = make_engine(Settings.model_validate(settings))
    (queue,) = engine.queues.values()
    queue.stopwatch.cost = CallCost(0.5, 0)
    job = submit(engine, TEXT, 2)
    alone_s = 0.5 * 2 * job.rows[0].remaining
    assert seconds_until_free([queue], 2) == alone_s
    engine.reserve(TEXT, 2)  # of a request as large: when it comes, both get every other call
    assert seconds_until_free([queue], 2) == 2 * alone_s


def test_retry_after_counts_rows_that_are_reserved_only(model_path: Path) -> None:
    engine, _ = make_engine(Settings.model_validate({"model": [model_path], "max_batch_rows": 2}))
    (queue,) = engine.queues.values()
    queue.stopwatch.cost = CallCost(0.5, 0)
    job = submit(engine, TEXT, 1)
    engine.queues[TEXT].fail_all(RuntimeError("only to learn how many calls a row takes"))
    engine.reserve(TEXT, 8)
    assert seconds_until_free([queue], 1) == 8 * 0.5 * job.rows[0].remaining / 2
    engine.release(TEXT, 8)
    assert seconds_until_free([queue], 1) == 0


def test_retry_after_knows_of_which_model_the_rows_are_that_are_reserved_only(
    model_path: Path, images_path: Path
) -> None:
    """A picture may cost a hundred times what a line of text does."""
    settings = {"model": [model_path, images_path], "max_batch_rows": 2, "max_queue_rows": 64, "max_n": 16}
    engine, _ = make_engine(Settings.model_validate(settings))
    for name, seconds in ((TEXT, 0.5), (IMAGES, 100.0)):
        engine.queues[name].stopwatch.cost = CallCost(seconds, 0)
        submit(engine, name, 1)
        engine.queues[name].fail_all(RuntimeError("only to learn how many calls a row takes"))
    engine.reserve(TEXT, 8)
    text_s = 8 * engine.queues[TEXT].seconds_per_row
    assert 0 < seconds_until_free(engine.queues.values(), 1) == text_s
    engine.reserve(IMAGES, 1)
    assert seconds_until_free(engine.queues.values(), 1) == text_s + engine.queues[IMAGES].seconds_per_row
