import pytest
import torch

from prime_core.corruption import antithetic_times, mask_subtokens


def test_times_fill_their_strata(generator: torch.Generator) -> None:
    t = antithetic_times(64, generator, eps=0.1)
    assert t.dtype == torch.float32
    place = (t.double() - 0.1) / 0.9 * 64 - torch.arange(64)
    assert place.min() > -1e-4 and place.max() < 1 + 1e-4  # float32 may round an ulp across an edge
    assert float(place.max() - place.min()) < 1e-4  # one shift for all


def test_the_last_time_may_round_to_one_and_none_goes_past() -> None:
    t = antithetic_times(2**20, torch.Generator().manual_seed(27), eps=1e-3)  # a shift of 0.985
    assert float(t.min()) >= 1e-3
    assert float(t.max()) == 1.0


def test_each_time_is_uniform_over_draws(generator: torch.Generator) -> None:
    first = torch.stack([antithetic_times(4, generator, eps=0.0)[0] for _ in range(4000)]) * 4
    assert first.mean().item() == pytest.approx(0.5, abs=0.02)
    assert first.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_masked_share_is_one_minus_alpha(generator: torch.Generator) -> None:
    y_0 = torch.randint(0, 5, (3, 200, 100), generator=generator)
    y_t = mask_subtokens(
        y_0, torch.tensor([0.0, 0.3, 1.0]), torch.rand(y_0.shape, generator=generator), mask_index=5
    )
    share = (y_t == 5).float().mean((1, 2))
    assert share[0] == 1 and share[2] == 0
    assert share[1].item() == pytest.approx(0.7, abs=0.01)
    assert torch.equal(y_t[y_t != 5], y_0[y_t != 5])
