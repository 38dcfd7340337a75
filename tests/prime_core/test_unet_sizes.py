"""The sizes of the image network: its parameters are the published ones, and pictures that do not fit are refused."""

import pytest
import torch
from torch import Tensor

from prime_core.config import CodecConfig, UNetConfig
from prime_core.models.unet import UNet
from prime_core.schedule import PolynomialSchedule
from tests.prime_core.small_unet import CODEC, make_config
from tests.reference_unet import Net


class TestSizes:
    @pytest.mark.parametrize("rates", [(), (1,), (2,), (1, 2)])
    def test_attention_is_at_the_listed_rates(self, rates: tuple[int, ...]) -> None:
        with torch.device("meta"):
            network = UNet(make_config(attention_rates=rates), CODEC, PolynomialSchedule(3.0))
        found = {
            n.removesuffix(".qkv.weight") for n, _ in network.named_parameters() if n.endswith("qkv.weight")
        }
        # One block a level: input stages 1 and 3, output stages 0 and 1 (rate 2), 2 and 3 (rate 1).
        places = {
            1: {"input_blocks.1.1", "output_blocks.2.1", "output_blocks.3.1"},
            2: {"input_blocks.3.1", "output_blocks.0.1", "output_blocks.1.1"},
        }
        assert found == {"middle_block.1"}.union(*(places[rate] for rate in rates))

    def test_names_and_order_are_the_published_ones(self) -> None:
        net = Net(3, 2, 4, 16, (96, 64), blocks=1, rates=(2,))
        with torch.device("meta"):
            network = UNet(make_config(), CODEC, PolynomialSchedule(3.0))
        ours = [(name, tuple(p.shape)) for name, p in network.named_parameters()]
        names = {
            n.removeprefix("model.").removeprefix("unet."): tuple(t.shape) for n, t in net.tensors().items()
        }
        assert ours == list(names.items())
        assert [name for name, _ in ours] == list(network.state_dict())

    def test_the_full_size(self) -> None:
        codec = CodecConfig(vocab_size=256, target_length=2)
        with torch.device("meta"):
            network = UNet(UNetConfig(), codec, PolynomialSchedule(3.0))
        assert network.pixel_embedding.embedding_table.weight.shape == (17, 48)  # 96 * 3 / 3 / 2
        assert sum(parameter.numel() for parameter in network.parameters()) > 100_000_000

    @pytest.mark.parametrize(
        ("y_t", "message"),
        [
            (torch.zeros(2, 96, 2, dtype=torch.long), r"must be \(images, 3, height, width, 2\)"),
            (torch.zeros(2, 2, 8, 4, 2, dtype=torch.long), r"images, 3"),
            (torch.zeros(2, 3, 8, 4, 1, dtype=torch.long), r"width, 2"),
            (torch.zeros(2, 3, 8, 5, 2, dtype=torch.long), "multiples of 2"),
            (torch.zeros(0, 3, 8, 4, 2, dtype=torch.long), "must be"),
            (torch.zeros(2, 3, 0, 4, 2, dtype=torch.long), "must be"),
            (torch.zeros(2, 3, 8, 4, 2), "integers"),
            (torch.zeros(2, 3, 8, 4, 2, dtype=torch.bool), "integers"),
            (torch.full((1, 3, 8, 4, 2), 5), "or 4 where masked"),
            (torch.full((1, 3, 8, 4, 2), -1), "where masked"),
        ],
    )
    def test_digits_that_are_none_are_refused(self, network: UNet, y_t: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            network(y_t)

    def test_packed_rows_have_the_size_of_the_configuration(self, network: UNet) -> None:
        with pytest.raises(ValueError, match="has 96 tokens"):
            network.features(torch.zeros(192, 2, dtype=torch.long), [100, 92])
