"""The network: a row does not depend on what it is packed with; gathered positions equal the full output."""

import pytest
import torch
from torch import Tensor

from prime_core.config import CodecConfig, DiTConfig
from prime_core.models.dit import DiT
from prime_core.schedule import LinearSchedule

CODEC = CodecConfig(vocab_size=50, target_length=3)  # base 4
LENGTHS = [16, 23, 16, 40, 17]


def make_network(*, time_conditioned: bool = False, seed: int = 0) -> DiT:
    config = DiTConfig(
        hidden_size=24, num_blocks=2, num_heads=2, cond_dim=8, length=64, time_conditioned=time_conditioned
    )
    with torch.random.fork_rng(devices=[]):
        network = DiT(config, CODEC, LinearSchedule(1e-3))
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def digits(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, CODEC.base + 1, (num_tokens, 3), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network() -> DiT:
    return make_network()


@pytest.mark.parametrize("time_conditioned", [False, True])
def test_packed_rows_equal_separate_runs(time_conditioned: bool) -> None:
    network = make_network(time_conditioned=time_conditioned)
    y_t = digits(sum(LENGTHS))
    t = torch.linspace(0.1, 0.9, len(LENGTHS)) if time_conditioned else None
    packed = network.features(y_t, LENGTHS, t)
    for row, (tokens, length) in enumerate(zip(y_t.split(LENGTHS), LENGTHS, strict=True)):
        alone = network.features(tokens, [length], None if t is None else t[row : row + 1])
        # One row's conditioning is a product with a vector, several rows' with a matrix: rounded apart.
        tolerance = 0
        torch.testing.assert_close(packed.split(LENGTHS)[row], alone, rtol=0, atol=tolerance)
        torch.testing.assert_close(network.head(packed.split(LENGTHS)[row]), network.head(alone))


def test_rows_do_not_see_each_other(network: DiT) -> None:
    y_t = digits(sum(LENGTHS))
    changed = y_t.clone()
    changed[:16] = (changed[:16] + 1) % (CODEC.base + 1)
    before, after = network.features(y_t, LENGTHS), network.features(changed, LENGTHS)
    assert not torch.equal(before[:16], after[:16])
    assert torch.equal(before[16:], after[16:])


def test_positions_matter_inside_a_row(network: DiT) -> None:
    y_t = digits(1).expand(20, 3)
    features = network.features(torch.cat([y_t[:10], digits(10, seed=1)]), [20])
    assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize("time_conditioned", [False, True])
def test_gathered_positions_equal_the_full_output(time_conditioned: bool) -> None:
    network = make_network(time_conditioned=time_conditioned)
    y_t = digits(sum(LENGTHS))
    t = torch.linspace(0.1, 0.9, len(LENGTHS)) if time_conditioned else None
    positions = torch.tensor([111, 0, 5, 5, 60])
    gathered = network.features(y_t, LENGTHS, t, positions=positions)
    torch.testing.assert_close(gathered, network.features(y_t, LENGTHS, t)[positions], rtol=0, atol=1e-6)
    empty = network.features(y_t, LENGTHS, t, positions=torch.tensor([], dtype=torch.long))
    assert network.head(empty).shape == (0, 50)


def test_forward_is_features_and_head(network: DiT) -> None:
    y_t = digits(40).unflatten(0, (2, 20))
    logits = network(y_t)
    assert logits.shape == (2, 20, 50)
    assert logits.dtype == torch.float32
    expected = network.head(network.features(y_t.flatten(0, 1), [20, 20]))
    torch.testing.assert_close(logits.flatten(0, 1), expected)


def test_time_is_of_each_row() -> None:
    network = make_network(time_conditioned=True)
    y_t = digits(16).expand(2, 16, 3)
    logits = network(y_t, torch.tensor([0.2, 0.7]))
    assert not torch.allclose(logits[0], logits[1])
    torch.testing.assert_close(logits[1], network(y_t[1:], torch.tensor([0.7]))[0])
    with pytest.raises(ValueError, match="t is required"):
        network(y_t)
    for t in (0.0, 1.0):
        assert network(y_t, torch.full((2,), t)).isfinite().all()


def test_time_free_networks_ignore_time(network: DiT) -> None:
    y_t = digits(16).unsqueeze(0)
    assert torch.equal(network(y_t), network(y_t, torch.tensor([0.3])))


def test_context_is_a_limit(network: DiT) -> None:
    assert network(digits(64).unsqueeze(0)).shape == (1, 64, 50)
    with pytest.raises(ValueError, match="65 tokens, but the context holds 64"):
        network(digits(65).unsqueeze(0))
    with pytest.raises(ValueError, match="65 tokens"):
        network.features(digits(75), [10, 65])


def test_every_parameter_learns(network: DiT) -> None:
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network(digits(40).unflatten(0, (2, 20))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # sigma = 0 makes the sine half of the sinusoid zero, so only a part of this matrix learns.
        share = (parameter.grad != 0).float().mean()
        assert share > (0.4 if name == "sigma_map.mlp.0.weight" else 0.9), name


def test_layout_of_digits_does_not_matter(network: DiT) -> None:
    y_t = digits(40).unflatten(0, (2, 20))
    strided = y_t.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    for same in (strided, y_t.int(), y_t.clone()):
        assert torch.equal(network(y_t), network(same))


def test_order_of_digits_matters(network: DiT) -> None:
    y_t = digits(40).unflatten(0, (2, 20))
    assert not torch.allclose(network(y_t), network(y_t.flip(-1)))


def test_fresh_networks_predict_uniformly() -> None:
    with torch.random.fork_rng(devices=[]):
        network = DiT(make_network().config, CODEC, LinearSchedule())
    assert torch.equal(network(digits(20).unsqueeze(0)), torch.zeros(1, 20, 50))


def test_half_precision_stays_close(network: DiT) -> None:
    y_t = digits(40).unflatten(0, (2, 20))
    full = network(y_t)
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    half = network(y_t)
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize(
    ("y_t", "message"),
    [
        (torch.zeros(2, 3, 2, dtype=torch.long), "digits, got shape"),
        (torch.zeros(0, 3, 3, dtype=torch.long), "digits, got shape"),
        (torch.zeros(2, 0, 3, dtype=torch.long), "digits, got shape"),
        (torch.zeros(2, 3, 3), "integers"),
        (torch.full((1, 3, 3), 99), "where masked"),
        (torch.full((1, 3, 3), -1), "where masked"),
    ],
)
def test_digits_that_are_none_are_refused(y_t: Tensor, message: str) -> None:
    network = make_network()
    with pytest.raises(ValueError, match=message):
        network(y_t)


@pytest.mark.parametrize("time_conditioned", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS, [16, 16, 16]])
def test_features_of_some_positions_are_those_of_all(lengths: list[int], time_conditioned: bool) -> None:
    network = make_network(time_conditioned=time_conditioned)
    y_t, t = digits(sum(lengths)), torch.linspace(0.1, 0.9, len(lengths))
    everything = network.features(y_t, lengths, t)
    for positions in ([5], [0, 0, 0], [31, 2, 17, 2, sum(lengths) - 1], list(range(sum(lengths)))):
        wanted = torch.tensor(positions)
        some = network.features(y_t, lengths, t, wanted)
        torch.testing.assert_close(some, everything[wanted], rtol=0, atol=2e-6)


def test_the_last_block_computes_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network, y_t = make_network(), digits(48)
    rows: list[int] = []
    for block in network.blocks:
        block.mlp[0].register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    network.features(y_t, [16, 16, 16], None, torch.tensor([3, 40]))
    assert rows == [48, 2]


@pytest.mark.parametrize("time_conditioned", [False, True])
def test_a_prepared_network_computes_the_same(time_conditioned: bool) -> None:
    network = make_network(time_conditioned=time_conditioned)
    y_t, t = digits(sum(LENGTHS)), torch.linspace(0.1, 0.9, len(LENGTHS))
    with torch.no_grad():
        plain = network.head(network.features(y_t, LENGTHS, t))
        network.prepare()
        torch.testing.assert_close(
            network.head(network.features(y_t, LENGTHS, t)), plain, rtol=1e-5, atol=1e-5
        )

        network.bfloat16().prepare()
        rounded = network.head(network.features(y_t, LENGTHS, t))
    # bfloat16 keeps 8 bits: the norm of the error stays within a few of its steps.
    assert float((rounded - plain).norm() / plain.norm()) < 0.03


def test_training_drops_what_was_prepared() -> None:
    network = make_network()
    network.prepare()
    before = network.features(digits(16), [16])
    for parameter in network.parameters():
        parameter.data.mul_(1.5)
    network.train()
    network.eval()
    assert not torch.allclose(network.features(digits(16), [16]), before)
