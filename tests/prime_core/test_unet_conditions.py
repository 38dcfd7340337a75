"""Labels and times of the image network: those of each row count, and where they are wrong they are refused."""

import pytest
import torch
from torch import Tensor

from prime_core.models.unet import UNet
from tests.prime_core.small_unet import digits, make_network, packed


@pytest.fixture(scope="module")
def labelled() -> UNet:
    return make_network(labels="class", num_labels=4).requires_grad_(False)


class TestConditions:
    def test_labels_are_of_each_row(self, labelled: UNet) -> None:
        y_t = digits(1).expand(2, -1, -1, -1, -1)
        logits = labelled(y_t, labels=torch.tensor([0, 3]))
        assert not torch.allclose(logits[0], logits[1])
        torch.testing.assert_close(logits[1:], labelled(y_t[1:], labels=torch.tensor([3])))
        features = labelled.features(*packed(y_t), labels=torch.tensor([0, 3]))
        torch.testing.assert_close(labelled.head(features), logits.flatten(0, 3), rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "labels",
        [None, torch.tensor([0, 1]), torch.tensor([[0, 1, 2]]), torch.tensor([0.0, 1.0, 2.0])],
    )
    def test_labels_are_wanted(self, labelled: UNet, labels: Tensor | None) -> None:
        with pytest.raises(ValueError, match="labels"):
            labelled(digits(), labels=labels)

    @pytest.mark.parametrize("wrong", [-1, 4])
    def test_labels_have_a_range(self, labelled: UNet, wrong: int) -> None:
        labels = torch.tensor([0, wrong, 1])
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
            labelled(digits(), labels=labels)
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
            labelled.features(*packed(digits()), labels=labels)

    def test_labels_are_refused_without_need(self, network: UNet) -> None:
        with pytest.raises(ValueError, match="has no labels"):
            network(digits(), labels=torch.zeros(3, dtype=torch.int64))

    def test_uniform_labels_are_labels(self) -> None:
        mixture = make_network(labels="uniform", num_labels=2)
        y_t = digits(1).expand(2, -1, -1, -1, -1)
        logits = mixture(y_t, labels=torch.tensor([0, 1]))
        assert not torch.allclose(logits[0], logits[1])

    def test_time_and_labels(self) -> None:
        network = make_network(time_conditioned=True, labels="class", num_labels=2).requires_grad_(False)
        y_t, t, labels = digits(1).expand(4, -1, -1, -1, -1), torch.tensor([0.2, 0.7] * 2), [0, 0, 1, 1]
        logits = network(y_t, t, torch.tensor(labels))
        for first in range(4):
            for second in range(first):
                assert not torch.allclose(logits[first], logits[second])
        alone = network(y_t[:1], torch.tensor([0.7]), torch.tensor([1]))
        torch.testing.assert_close(alone[0], logits[3])
        for end in (0.0, 1.0):
            assert network(y_t, torch.full((4,), end), torch.tensor(labels)).isfinite().all()
        with pytest.raises(ValueError, match="t is required"):
            network(y_t, labels=torch.tensor(labels))
        with pytest.raises(ValueError, match="needs labels"):
            network(y_t, t)
        with pytest.raises(ValueError, match=r"t must be \(4,\), one an image, got \(1,\)"):
            network(y_t, t[:1], torch.tensor(labels))

    def test_time_free_networks_ignore_time(self, network: UNet) -> None:
        assert torch.equal(network(digits()), network(digits(), torch.tensor([0.3, 0.4, 0.5])))
